r"""Exact learning coefficients, and what estimators of them should say, in float64 on the host.

The learning coefficient λ of a cost K with minimum zero, and its multiplicity m, are read off the volume near the
minimum, or off the free energy:

.. math:: \int e^{-\beta K(\theta)} \pi(\theta)\,d\theta \sim c\,\beta^{-\lambda} (\log\beta)^{m-1}, \quad
          \beta\,\mathbb{E}_\beta K = \lambda - \frac{m-1}{\log\beta} + \dots
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from volumejax.tails import Numbers

__all__ = ["Singularity", "deep_linear", "langevin_quadratic", "localised_quadratic", "reduced_rank"]

Vector = NDArray[np.float64]


class Singularity(NamedTuple):
    """λ and m."""

    learning_coefficient: float
    multiplicity: int


def reduced_rank(num_inputs: int, num_hidden: int, num_outputs: int, rank: int) -> Singularity:
    """Return λ and m of the network x ↦ BAx whose true map has the given rank.

    Where one of the three sides outgrows the other two, as if it were free, λ is half of a number of equations.
    Between those cases it is a quadratic in the sides, and m = 2 where their sum is odd.

    Args:
        num_inputs: M.
        num_hidden: H.
        num_outputs: N.
        rank: r of the true map, at most the smallest side.

    Raises:
        ValueError: a side below one, or a rank that the network cannot have.

    Example:
        >>> import volumejax.coefficients as vc
        >>> tuple(vc.reduced_rank(5, 3, 5, 0))
        (6.5, 2)

    Reference: Aoyagi & Watanabe, Neural Networks 18, 924 (2005), main theorem.
    """
    _check_widths((num_inputs, num_hidden, num_outputs), rank)
    m, h, n, r = num_inputs, num_hidden, num_outputs, rank
    if m + h < n + r:
        return Singularity((h * m - h * r + n * r) / 2, 1)
    if n + h < m + r:
        return Singularity((h * n - h * r + m * r) / 2, 1)
    if m + n < h + r:
        return Singularity(m * n / 2, 1)
    odd = (m + h + n + r) % 2
    k = h + r
    return Singularity((odd - (k * k + m * m + n * n) + 2 * (k * m + k * n + m * n)) / 8, 1 + odd)


def deep_linear(widths: Sequence[int], rank: int) -> Singularity:
    r"""Return λ and m of the linear network with these widths whose true map has the given rank.

    With excesses Mₛ = widthₛ − r in rising order, the first ℓ+1 of them compete, ℓ being the largest number with
    M₁ + … + M_{ℓ+1} ≥ ℓ M_{ℓ+1}. With S their sum and a = S − (⌈S/ℓ⌉ − 1) ℓ,

    .. math:: \lambda = \frac{r(d_{in} + d_{out} - r)}{2} + \frac{a(\ell - a)}{4\ell}
              - \frac{(\ell - 1) S^2}{4 \ell} + \frac12 \sum_{i<j} M_i M_j, \quad m = a(\ell - a) + 1 .

    Args:
        widths: [d_in, hidden …, d_out], at least two.
        rank: r of the true map, at most the smallest width.

    Raises:
        ValueError: fewer than two widths, one below 1, or a rank that the network cannot have.

    Example:
        >>> import volumejax.coefficients as vc
        >>> tuple(vc.deep_linear([20, 10, 20, 10, 20], 3))
        (80.0, 1)

    Reference: Aoyagi, "Consideration on the learning efficiency of multiple-layered neural networks with linear
    units", Neural Networks 172 (2024), main theorem.
    """
    _check_widths(widths, rank)
    excess = np.sort(np.asarray(widths, np.int64)) - rank
    sums = np.cumsum(excess)
    # The margin only falls with ℓ, and is M₁ ≥ 0 at ℓ = 1.
    layers = int(np.flatnonzero(sums[1:] >= np.arange(1, excess.size) * excess[1:])[-1]) + 1
    total, squares = int(sums[layers]), int(np.sum(excess[: layers + 1] ** 2))
    remainder = total - (-(-total // layers) - 1) * layers
    shared = remainder * (layers - remainder)
    value = (
        rank * (widths[0] + widths[-1] - rank) / 2
        + shared / (4 * layers)
        - (layers - 1) * total**2 / (4 * layers)
        + (total**2 - squares) / 4
    )
    return Singularity(value, shared + 1)


def localised_quadratic(h: Numbers, *, beta: float, gamma: float) -> float:
    """Return β E[C] of C = ½ Σ hᵢxᵢ² under the density ∝ exp(−βC − γ|x|²/2): ½ Σ βhᵢ / (βhᵢ + γ).

    Directions with hᵢ = 0 count for nothing. Localisation is harmless where γ ≪ βhᵢ, and hides directions with
    βhᵢ ≪ γ.

    Args:
        h: curvatures, shape (D,), non-negative.
        beta: inverse temperature β > 0, the literature's nβ.
        gamma: γ ≥ 0, in inverse squared units of x.

    Example:
        >>> import volumejax.coefficients as vc
        >>> round(vc.localised_quadratic([10, 1, 0.1, 0.01, 0], beta=100.0, gamma=1.0), 6)
        1.699095
    """
    stiff = _stiffness(h, beta, gamma)
    return float(0.5 * np.sum(stiff / (stiff + gamma)))


def langevin_quadratic(h: Numbers, *, beta: float, gamma: float, step: float) -> float:
    """Return β E[C] as the unadjusted Langevin chain of step e has it, with aᵢ = βhᵢ + γ: ½ Σ βhᵢ / (aᵢ (1 − e aᵢ/4)).

    The chain x ← x − (e/2)(βh + γ)x + √e ξ has the stationary variance 1/(a (1 − e a/4)): too wide, more so in stiff
    directions, and none at all from e a = 4 on.

    Args:
        h: as for `localised_quadratic`.
        beta: as for `localised_quadratic`.
        gamma: as for `localised_quadratic`.
        step: e > 0, in squared units of x.

    Raises:
        ValueError: a step of 4/a or more in some direction, where the chain diverges.

    Example:
        >>> import volumejax.coefficients as vc
        >>> round(vc.langevin_quadratic([10, 1, 0.1, 0.01, 0], beta=100.0, gamma=1.0, step=1e-4), 6)
        1.713307
    """
    stiff = _stiffness(h, beta, gamma)
    a = stiff + gamma
    if not 0.0 < step < 4.0 / np.max(a):
        raise ValueError(f"step must lie between 0 and 4/max(βh + γ) = {4.0 / np.max(a):.3g}, got {step}; shorten it")
    return float(0.5 * np.sum(stiff / (a * (1.0 - 0.25 * step * a))))


def _stiffness(h: Numbers, beta: float, gamma: float) -> Vector:
    """Return βh of the directions that the cost feels."""
    h = np.atleast_1d(np.asarray(h, np.float64))
    if h.ndim != 1 or not np.all(np.isfinite(h) & (h >= 0)) or not np.any(h > 0):
        raise ValueError("h must be a vector of finite curvatures, none below zero and not all zero; clip it at zero")
    if not (np.isfinite(beta) and beta > 0.0 and np.isfinite(gamma) and gamma >= 0.0):
        raise ValueError(f"beta must be positive and gamma zero or positive, got {beta} and {gamma}")
    return beta * h[h > 0]


def _check_widths(widths: Sequence[int], rank: int) -> None:
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths must be at least two positive numbers, got {list(widths)}")
    if not 0 <= rank <= min(widths):
        raise ValueError(f"rank must lie between 0 and the smallest width, {min(widths)}, got {rank}")
