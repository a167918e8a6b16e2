"""Local volume of a trained network: the log probability of drawing one like it from the prior."""

from volumejax.behaviours import error_rate, kl_to_anchor, loss, loss_gap
from volumejax.chains import ChainTrace, Curve, LearningCoefficient
from volumejax.curvature import dense_ggn, diagonal_ggn
from volumejax.optax_moments import second_moments
from volumejax.priors import Gaussian, Lebesgue, UniformBall, UniformBox
from volumejax.proposals import Dense, Diagonal, Isotropic
from volumejax.rays import ray_stream, ray_volume
from volumejax.regions import Connected, Star
from volumejax.results import BoundKind, Kind, RayBatch, Status, VolumeEstimate
from volumejax.tether import tether_stream, tether_volume
from volumejax.tuning import adam_proposal, curvature_proposal, damped_proposal

__all__ = [
    "BoundKind",
    "ChainTrace",
    "Connected",
    "Curve",
    "Dense",
    "Diagonal",
    "Gaussian",
    "Isotropic",
    "Kind",
    "LearningCoefficient",
    "Lebesgue",
    "RayBatch",
    "Star",
    "Status",
    "UniformBall",
    "UniformBox",
    "VolumeEstimate",
    "adam_proposal",
    "curvature_proposal",
    "damped_proposal",
    "dense_ggn",
    "diagonal_ggn",
    "error_rate",
    "kl_to_anchor",
    "loss",
    "loss_gap",
    "ray_stream",
    "ray_volume",
    "second_moments",
    "tether_stream",
    "tether_volume",
]
