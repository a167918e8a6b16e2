"""Local volume of a trained network: the log probability of drawing one like it from the prior."""

from volumejax.behaviours import error_rate, kl_to_anchor, loss, loss_gap
from volumejax.chains import ChainTrace, Curve, LearningCoefficient
from volumejax.curvature import DiagonalEstimate, dense_ggn, diagonal_ggn, ggn_product, sampled_diagonal_ggn
from volumejax.eigenpairs import Eigenpairs, top_eigenpairs
from volumejax.hessian import dense_hessian, diagonal_hessian, hessian_product
from volumejax.islands import IslandTrace
from volumejax.laplace import DenseSpectrum, LanczosSpectrum, laplace_volume
from volumejax.learning import SGLD, Hamiltonian, learning_coefficient
from volumejax.low_rank import LowRank, LowRankPrecision
from volumejax.optax_moments import first_moments, second_moments
from volumejax.priors import Gaussian, Lebesgue, UniformBall, UniformBox
from volumejax.probe import VolumeProbe
from volumejax.proposals import Dense, Diagonal, Isotropic
from volumejax.rays import ray_stream, ray_volume
from volumejax.regions import Connected, Star
from volumejax.results import BoundKind, Kind, RayBatch, Status, VolumeEstimate
from volumejax.spectrum import SpectrumTrace
from volumejax.sweep import Sweep, TunedProposal, tune_proposal
from volumejax.temper import temper_stream, temper_volume
from volumejax.tether import tether_stream, tether_volume
from volumejax.tuning import adam_proposal, curvature_proposal, damped_proposal

__all__ = [
    "SGLD",
    "BoundKind",
    "ChainTrace",
    "Connected",
    "Curve",
    "Dense",
    "DenseSpectrum",
    "Diagonal",
    "DiagonalEstimate",
    "Eigenpairs",
    "Gaussian",
    "Hamiltonian",
    "IslandTrace",
    "Isotropic",
    "Kind",
    "LanczosSpectrum",
    "LearningCoefficient",
    "Lebesgue",
    "LowRank",
    "LowRankPrecision",
    "RayBatch",
    "SpectrumTrace",
    "Star",
    "Status",
    "Sweep",
    "TunedProposal",
    "UniformBall",
    "UniformBox",
    "VolumeEstimate",
    "VolumeProbe",
    "adam_proposal",
    "curvature_proposal",
    "damped_proposal",
    "dense_ggn",
    "dense_hessian",
    "diagonal_ggn",
    "diagonal_hessian",
    "error_rate",
    "first_moments",
    "ggn_product",
    "hessian_product",
    "kl_to_anchor",
    "laplace_volume",
    "learning_coefficient",
    "loss",
    "loss_gap",
    "ray_stream",
    "ray_volume",
    "sampled_diagonal_ggn",
    "second_moments",
    "temper_stream",
    "temper_volume",
    "tether_stream",
    "tether_volume",
    "top_eigenpairs",
    "tune_proposal",
]
