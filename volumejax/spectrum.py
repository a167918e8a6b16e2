r"""The spectrum of a large symmetric matrix as a quadrature rule: nodes with weights, in float64 on the host.

k steps of Lanczos from a vector v leave a tridiagonal matrix T whose eigenvalues and first components are the Gauss
rule of the measure of v over the spectrum. With one node prescribed at the lower end it is Gauss–Radau's. Where the
derivatives of f of even and odd order have fixed and opposite signs, as those of log do, the two rules bracket vᵀf(H)v.

Reference: Golub & Meurant, Matrices, Moments and Quadrature with Applications (2010), chapters 3, 6 and 7.
"""

import math
from typing import NamedTuple

import equinox as eqx
import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal

__all__ = ["Rule", "SpectrumTrace", "Tridiagonal", "gauss", "gauss_radau"]

Vector = NDArray[np.float64]

_NOTABLE = 0.01
"""Share from which on a gradient at the anchor is worth a remark."""


class Tridiagonal(NamedTuple):
    """What Lanczos leaves behind: T, the norm that step k + 1 would have started from, and |v|²."""

    diagonal: Vector
    off_diagonal: Vector
    residual: float
    square: float


class Rule(NamedTuple):
    """Nodes in rising order and their weights, which sum to one."""

    nodes: Vector
    weights: Vector


class SpectrumTrace(eqx.Module):
    """The evidence of a quadratic model: the curvature's spectrum in whitened coordinates, as far as it was looked at.

    `counts` says how many directions a node stands for: one each of a dense spectrum, fractions from Lanczos.
    """

    nodes: Float[np.ndarray, "nodes"]
    """Curvatures in nats per squared unit of the prior's σ, or of the parameters under a flat prior."""
    counts: Float[np.ndarray, "nodes"]
    bracket: Float[np.ndarray, "2"]
    """log mass from the Gauss and the Gauss–Radau rule, the smaller first: equal for a dense spectrum."""
    log_det: Float[np.ndarray, "2"]
    """Bracket of log det H under a flat prior, NaN otherwise."""
    probe_error: Float[np.ndarray, ""]
    """Standard error of log mass from the random probes alone."""
    floor: Float[np.ndarray, ""]
    """Lower end of the spectrum as used for the Gauss–Radau rule; NaN for a dense spectrum."""
    products: Int[np.ndarray, ""]
    """Curvature–vector products."""
    negative: Float[np.ndarray, ""]
    """Most negative curvature seen, 0 if none; such directions count as flat."""
    descent: Float[np.ndarray, ""] = eqx.field(default_factory=lambda: np.zeros(()))
    """By how much the cost falls along its gradient at the anchor, which the model leaves out, as a share of the cutoff
    less the cost there."""

    def labelled(self) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """Return the arrays with the names of their axes."""
        axes = {"nodes": ("node",), "counts": ("node",), "bracket": ("rule",), "log_det": ("rule",)}
        return {name: (dims, np.asarray(getattr(self, name))) for name, dims in axes.items()}

    def remarks(self) -> list[str]:
        """Return what a reader must know about the spectrum."""
        remarks = []
        if not np.any(self.nodes):
            remarks.append(
                "no curvature at all, as of an error rate, so that the model says nothing; use a smooth cost"
            )
        if self.descent > _NOTABLE:
            share = 100.0 * float(self.descent)
            fall = f"by {share:.3g} % of what the cutoff leaves" if math.isfinite(share) else "without end"
            remarks.append(
                f"along its gradient the cost falls below the anchor's {fall}, and the model has no gradient: move the "
                "anchor to the minimum, or take a cost that is smallest at the anchor such as kl_to_anchor"
            )
        if self.negative < 0.0:
            remarks.append(
                f"curvature down to {float(self.negative):.3g}: the anchor is no minimum; such directions count as flat"
            )
        width = float(np.ptp(self.bracket)) if np.all(np.isfinite(self.bracket)) else math.inf
        if width > 3.0 * float(self.probe_error) + 1.0 and self.bracket[0] < math.inf:
            remarks.append(f"Lanczos leaves {width:.3g} nats open; take more steps, or give a floor if one is known")
        return remarks


def gauss(lanczos: Tridiagonal) -> Rule:
    """Return the Gauss rule; its sum of a function whose even derivatives are negative is too large, as of log.

    Example:
        >>> import numpy as np
        >>> rule = gauss(Tridiagonal(np.array([2.0, 2.0]), np.array([1.0]), 0.0, 1.0))
        >>> print(rule.nodes, rule.weights.round(6))
        [1. 3.] [0.5 0.5]
    """
    nodes, vectors = eigh_tridiagonal(lanczos.diagonal, lanczos.off_diagonal)
    return Rule(np.asarray(nodes), np.square(vectors[0]))


def gauss_radau(lanczos: Tridiagonal, floor: float) -> Rule:
    """Return the rule with one more node, at `floor`; its sum of log is too small if no eigenvalue lies below.

    Args:
        lanczos: T.
        floor: at most the smallest eigenvalue of the matrix; where it is above T's smallest, the Gauss rule is all
            that there is.

    Example:
        >>> import numpy as np
        >>> rule = gauss_radau(Tridiagonal(np.array([2.0]), np.array([]), 1.0, 1.0), 0.5)
        >>> print(rule.nodes.round(6), float(rule.weights @ rule.nodes))
        [0.5      2.666667] 2.0
    """
    rule = gauss(lanczos)
    if lanczos.residual == 0.0 or floor >= rule.nodes[0]:
        return rule
    # The last entry of (T − floor)⁻¹ e_k, by the recursion of its pivots, which are positive above the floor.
    pivot = lanczos.diagonal[0] - floor
    for a, b in zip(lanczos.diagonal[1:], lanczos.off_diagonal, strict=True):
        pivot = a - floor - b * b / pivot
    last = floor + lanczos.residual**2 / pivot
    return gauss(
        Tridiagonal(
            np.append(lanczos.diagonal, last), np.append(lanczos.off_diagonal, lanczos.residual), 0.0, lanczos.square
        )
    )
