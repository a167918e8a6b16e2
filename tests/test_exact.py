"""The exact log masses against the published rows, and against independent integrals."""

import functools
import re

import mpmath
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import erf

from volumejax import exact
from volumejax.tails import log_gamma_p, log_total, weighted_log_gamma

_HARMONIC = 1.0 / np.arange(1, 21)
_RANK_FIVE = np.repeat([1.0, 0.0], [5, 45])

_ROWS = [
    (exact.quadratic, (np.ones(10),), {"cutoff": 0.01}, "-27.821675"),
    # The table prints -2958.40303; 40 digits of the incomplete gamma function give -2958.403050240.
    (exact.quadratic, (np.ones(1000),), {"cutoff": 0.5}, "-2958.40305"),
    (exact.quadratic, (np.ones(10**4),), {"cutoff": 25.0}, "-21521.75937"),
    (exact.quadratic, (np.ones(10**6),), {"cutoff": 25.0}, "-4451776.256"),
    (exact.quadratic, (_HARMONIC,), {"cutoff": 1e-3}, "-63.023701"),
    (exact.quadratic, (_HARMONIC,), {"cutoff": 1e-2}, "-40.083597"),
    (exact.quadratic, (_HARMONIC,), {"cutoff": 1e-1}, "-17.900633"),
    (exact.quadratic, (_HARMONIC,), {"cutoff": 1.0}, "-1.913485"),
    (exact.quadratic, (_RANK_FIVE,), {"cutoff": 1e-6}, "-35.739751"),
    (exact.quadratic, (_RANK_FIVE,), {"cutoff": 1e-4}, "-24.226896"),
    (exact.quadratic, (_RANK_FIVE,), {"cutoff": 1e-2}, "-12.721040"),
    (exact.ellipsoid, (np.logspace(-3, 2, 100),), {"cutoff": 0.01}, "-229.277796"),
    (exact.normal_crossing, ((1, 1),), {"cutoff": 1e-2, "gaussian": True}, "-1.524047"),
    (exact.normal_crossing, ((1, 1),), {"cutoff": 1e-4, "gaussian": True}, "-3.312583"),
    (exact.normal_crossing, ((1, 1),), {"cutoff": 1e-6, "gaussian": True}, "-5.276940"),
    (exact.tanh_neuron, (1, 1), {"cutoff": 1e-2}, "-1.374812"),
    (exact.tanh_neuron, (1, 1), {"cutoff": 1e-4}, "-3.218402"),
    (exact.tanh_neuron, (1, 1), {"cutoff": 1e-6}, "-5.208861"),
    (exact.tanh_neuron, (3, 5), {"cutoff": 1e-2}, "-9.471281"),
    (exact.tanh_neuron, (3, 5), {"cutoff": 1e-4}, "-16.462802"),
    (exact.tanh_neuron, (3, 5), {"cutoff": 1e-6}, "-23.372052"),
    (exact.tanh_neuron, (20, 20), {"cutoff": 1e-2}, "-66.014459"),
    (exact.tanh_neuron, (20, 20), {"cutoff": 1e-4}, "-112.060569"),
    (exact.tanh_neuron, (20, 20), {"cutoff": 1e-6}, "-158.112215"),
    (exact.tanh_neuron, (50, 10), {"cutoff": 1e-2}, "-30.678417"),
    (exact.tanh_neuron, (50, 10), {"cutoff": 1e-4}, "-53.699610"),
    (exact.tanh_neuron, (50, 10), {"cutoff": 1e-6}, "-76.725414"),
    (exact.tanh_neuron, (2400, 2410), {"cutoff": 1e-2}, "-13712.664885"),
    (exact.shell, (3,), {"cutoff": 1e-2}, "0.22802"),
    (exact.shell, (10,), {"cutoff": 1e-2}, "0.95598"),
    (exact.shell_star, (3,), {"cutoff": 1e-2}, "-2.10531"),
    (exact.shell_star, (10,), {"cutoff": 1e-2}, "-5.06363"),
    (exact.shell_star, (3,), {"cutoff": 1e-2, "gaussian": True}, "-5.371"),
]

_ROWS_WITH_SLOPE = [
    (exact.normal_crossing, ((1, 1),), 1e-2, "-1.107880", ".34860"),
    (exact.normal_crossing, ((1, 1),), 1e-6, "-4.839911", ".43677"),
    (exact.normal_crossing, ((1, 1, 1),), 1e-2, "-0.518600", ".22264"),
    (exact.normal_crossing, ((1, 1, 1),), 1e-6, "-3.449349", ".37553"),
    (exact.normal_crossing, ((1, 2),), 1e-2, "-0.630256", ".20305"),
    (exact.normal_crossing, ((1, 2),), 1e-6, "-2.776668", ".24598"),
    (exact.normal_crossing, ((2, 2),), 1e-2, "-0.385224", ".13379"),
    (exact.normal_crossing, ((2, 2),), 1e-6, "-1.960103", ".19387"),
    (exact.rank_one, (3, 5), 1e-2, "-9.565972", "1.492"),
    (exact.rank_one, (3, 5), 1e-4, "-16.464480", "1.4999"),
    (exact.rank_one, (3, 5), 1e-6, "-23.372075", "1.5000"),
    (exact.rank_one, (4, 4), 1e-2, "-10.999168", "1.815"),
    (exact.rank_one, (4, 4), 1e-4, "-19.589608", "1.899"),
    (exact.rank_one, (4, 4), 1e-6, "-28.419346", "1.931"),
]


def _matches(value: float, printed: str) -> bool:
    """Within two units of the last printed digit."""
    decimals = len(printed.split(".")[1])
    return abs(value - float(printed)) <= 2.0 * 10.0**-decimals


@pytest.mark.parametrize("family, args, options, printed", _ROWS)
def test_published_log_mass(family, args, options, printed):
    assert _matches(family(*args, **options).log_mass, printed)


@pytest.mark.parametrize("family, args, cutoff, log_mass, slope", _ROWS_WITH_SLOPE)
def test_published_log_mass_and_slope(family, args, cutoff, log_mass, slope):
    answer = family(*args, cutoff=cutoff)
    assert _matches(answer.log_mass, log_mass) and _matches(answer.slope, slope)


_FAMILIES = [
    lambda cutoff: exact.quadratic(np.ones(10), cutoff=cutoff),
    lambda cutoff: exact.quadratic(_HARMONIC, cutoff=cutoff, sigma=0.7, minimum=0.4),
    lambda cutoff: exact.quadratic(np.logspace(-3, 3, 40), cutoff=cutoff, minimum=np.linspace(-1, 1, 40)),
    lambda cutoff: exact.ellipsoid(_HARMONIC, cutoff=cutoff),
    lambda cutoff: exact.normal_crossing((1, 2, 2), cutoff=cutoff),
    lambda cutoff: exact.normal_crossing((1, 2, 2), cutoff=cutoff, gaussian=True),
    lambda cutoff: exact.rank_one(3, 20, cutoff=cutoff),
    lambda cutoff: exact.tanh_neuron(20, 3, cutoff=cutoff),
    lambda cutoff: exact.shell(5, cutoff=cutoff),
    lambda cutoff: exact.shell(5, cutoff=cutoff, gaussian=True),
    lambda cutoff: exact.shell_star(5, cutoff=cutoff),
    lambda cutoff: exact.shell_star(5, cutoff=cutoff, gaussian=True),
]


@pytest.mark.parametrize("family", _FAMILIES)
@pytest.mark.parametrize("cutoff", [1e-5, 1e-2, 0.5])
def test_slope_is_the_derivative(family, cutoff):
    step = 1e-3
    below, above = family(cutoff * np.exp(-step)).log_mass, family(cutoff * np.exp(step)).log_mass
    slope = family(cutoff).slope
    assert abs((above - below) / (2.0 * step) - slope) <= 2e-6 * (1.0 + slope)


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("cutoff", [1e-3, 0.3])
def test_normal_crossing_against_quadrature(gaussian, cutoff):
    """K = w₁²w₂⁴: integrate over w₂ the chance that |w₁| ≤ √ε/w₂²."""

    def inner(w):
        bound = np.sqrt(cutoff) / max(w, 1e-150) ** 2
        if not gaussian:
            return min(bound, 1.0)
        return 2.0 * np.exp(-0.5 * w * w) / np.sqrt(2.0 * np.pi) * erf(bound / np.sqrt(2.0))

    kink = cutoff**0.25
    end = 12.0 if gaussian else 1.0
    points = (quad(inner, 0.0, kink, epsabs=1e-12), quad(inner, kink, end, epsabs=1e-12))
    expected = np.log(points[0][0] + points[1][0])
    assert abs(exact.normal_crossing((1, 2), cutoff=cutoff, gaussian=gaussian).log_mass - expected) <= 1e-9


@pytest.mark.parametrize("m, n", [(1, 1), (3, 5), (4, 4), (30, 200)])
@pytest.mark.parametrize("cutoff", [1e-200, 1e-4, 1.0])
def test_rank_one_against_mellin(m, n, cutoff):
    """|a|²|b|² is a product of χ² variables: its moments give the mass with no integral over radii."""
    answer = exact.rank_one(m, n, cutoff=cutoff)
    expected = weighted_log_gamma([0.5 * m, 0.5 * n], [1.0, 1.0], float(np.log(cutoff)))
    assert np.allclose(answer, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rho", [1e-6, 1e-3, 0.1, 0.999, 1.0, 1.001, 2.0, 7.0, 40.0, 1e3])
def test_tanh_gain_matches_mpmath(rho):
    with mpmath.workdps(25):
        cuts = [0.0, *sorted(c for c in (0.5 / rho, 3.0 / rho, 15.0 / rho, 1.0, 4.0) if c < 14.0), 14.0]
        expected = 2 * mpmath.quad(lambda z: mpmath.tanh(rho * z) ** 2 * mpmath.npdf(z), cuts)
        error = abs(float(exact.tanh_gain(rho) / expected - 1))
    assert error <= 1e-13


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("dimension", [2, 3, 10])
@pytest.mark.parametrize("cutoff", [1e-4, 1e-2, 0.6])
def test_star_against_the_integral_over_rays(dimension, cutoff, gaussian):
    """The definition: r^{D−1}π(e₁ + ru) over every direction u up to the first crossing.

    Mutation caught: taking the whole thickness of the shell beyond the tangent angle α₁.
    """
    s = np.sqrt(cutoff)
    tangent = np.arccos(-np.sqrt(s))
    angles, weights = zip(*(_legendre(*ends) for ends in ((0.0, tangent), (tangent, np.pi))), strict=True)
    angle, weight = np.concatenate(angles), np.concatenate(weights)
    c = np.cos(angle)
    far = -c + np.sqrt(c**2 + s)
    near = -c - np.sqrt(np.maximum(c**2 - s, 0.0))
    radius = np.where((c < 0) & (angle > tangent), near, far)
    node, node_weight = _rule(60)
    r = radius[:, None] * 0.5 * (1.0 + node)
    square = 1.0 + 2.0 * r * c[:, None] + r**2
    density = np.exp(-0.5 * square) / (2.0 * np.pi) ** (0.5 * dimension) if gaussian else np.ones_like(r)
    radial = (r ** (dimension - 1) * density) @ (0.5 * node_weight) * radius
    area = np.exp(exact.shell(dimension - 1, cutoff=1.0).log_mass) if dimension > 2 else None
    # Area of S^{D−2}: (D−1) times the volume of the unit (D−1)-ball, here from the ball {|w|² ≤ 2}.
    area = 2.0 if area is None else (dimension - 1) * area / 2.0 ** (0.5 * (dimension - 1))
    expected = np.log(area * np.sum(weight * np.sin(angle) ** (dimension - 2) * radial))
    answer = exact.shell_star(dimension, cutoff=cutoff, gaussian=gaussian).log_mass
    assert abs(answer - expected) <= 1e-6
    assert answer < exact.shell(dimension, cutoff=cutoff, gaussian=gaussian).log_mass


_rule = functools.cache(np.polynomial.legendre.leggauss)


def _legendre(start, stop, order=300):
    """Gauss-Legendre, denser towards the ends, where the radius has branch points."""
    nodes, weights = _rule(order)
    t = 0.5 * np.pi * (nodes + 1.0)
    width = stop - start
    return start + width * np.sin(0.5 * t) ** 2, 0.5 * np.pi * weights * width * 0.5 * np.sin(t)


def test_shell_from_one_nat_on_is_a_ball():
    ball = np.log(4.0 * np.pi / 3.0) + 1.5 * np.log(3.0)
    for answer in (exact.shell(3, cutoff=4.0), exact.shell_star(3, cutoff=4.0)):
        assert abs(answer.log_mass - ball) <= 1e-14
    gaussian = exact.shell_star(3, cutoff=4.0, gaussian=True).log_mass
    assert abs(gaussian - float(log_gamma_p(1.5, 1.5))) <= 1e-14


def test_flat_directions_do_not_count():
    some, all_flat = (
        exact.quadratic([2.0, 0.0], cutoff=0.1, minimum=[0.5, 9.0]),
        exact.quadratic([0.0], cutoff=1.0),
    )
    assert some == exact.quadratic([2.0], cutoff=0.1, minimum=0.5)
    assert all_flat == (0.0, 0.0)


def test_quadratic_depends_on_scale_free_ratios():
    one = exact.quadratic(_HARMONIC, cutoff=0.01, sigma=2.0, minimum=1.0)
    other = exact.quadratic(4.0 * _HARMONIC, cutoff=0.01, sigma=1.0, minimum=0.5)
    assert np.allclose(one, other, rtol=1e-13)


def test_deep_tail_of_a_large_unequal_quadratic():
    """Mass below a tiny cutoff is the ellipsoid's volume times the prior's density at its centre."""
    h = np.logspace(-2, 2, 2000)
    density = -0.5 * 2000 * np.log(2.0 * np.pi)
    volume = exact.ellipsoid(h, cutoff=1e-9).log_mass
    assert abs(exact.quadratic(h, cutoff=1e-9).log_mass - volume - density) <= 1e-5


def test_large_cutoffs_hold_everything():
    assert exact.quadratic(_HARMONIC, cutoff=1e6).log_mass == pytest.approx(0.0, abs=1e-12)
    assert exact.normal_crossing((1, 1), cutoff=2.0) == (0.0, 0.0)
    for family in (exact.rank_one, exact.tanh_neuron):
        assert family(2, 3, cutoff=1e300).log_mass == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: exact.quadratic([1.0], cutoff=0.0), "cutoff must be positive"),
        (lambda: exact.quadratic([1.0], cutoff=1.0, sigma=-1.0), "sigma must be positive"),
        (lambda: exact.quadratic([-1.0], cutoff=1.0), "clip it at zero"),
        (lambda: exact.ellipsoid([1.0, 0.0], cutoff=1.0), "drop the flat directions"),
        (lambda: exact.normal_crossing((1, 0), cutoff=0.1), "drop directions with k = 0"),
        (lambda: exact.rank_one(0, 3, cutoff=0.1), "at least 1"),
        (lambda: exact.tanh_neuron(2, 3, cutoff=float("nan")), "cutoff must be positive"),
        (lambda: exact.shell(1, cutoff=0.1), "dimension 2 or more"),
    ],
)
def test_misuse_names_the_remedy(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_product_rule_has_converged():
    """The tanh neuron over a radius grid ten times as fine."""
    t = np.linspace(-60.0, 4.0, 20_000)
    rho = np.exp(t)
    y = 0.5 * 1e-3 / np.maximum(exact.tanh_gain(rho), 1e-60)
    log_chi = np.log(2.0 * rho**2 / 2.0) - 0.5 * rho**2
    expected = log_total(log_chi + log_gamma_p(1.5, y)) + np.log(t[1] - t[0])
    assert abs(exact.tanh_neuron(2, 3, cutoff=1e-3).log_mass - expected) <= 1e-12
