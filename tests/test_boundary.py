"""The first crossing along one ray: where it is, how well it is known, what it cost, and what can go wrong.

Mutations these catch: returning the next guess instead of the last inside point, stopping on the cost instead of on
the volume, expansion by 2 or more, NaN taken for inside, log of a cost that rounding made negative.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from volumejax.boundary import GROWTH, Bracket, first_crossing, log_ratio
from volumejax.radial import radial, radial_and_slope
from volumejax.results import Status

D = 1000


def find(cost_at, *, cutoff=0.01, start=0.05, dimension=D, tolerance=0.1, curvature=0.0, **options):
    """The crossing of a cost on a flat prior, or a Gaussian one with the given curvature."""

    def run(start):
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            return first_crossing(
                cost_at,
                lambda s: radial_and_slope(dimension, curvature, 0.0, s),
                cutoff=cutoff,
                start=start,
                total=radial(dimension, curvature, 0.0, jnp.inf),
                tolerance=tolerance,
                **options,
            )

    return jax.tree.map(np.asarray, jax.jit(run)(start))


class Recorder:
    """A cost that remembers at what distances it was asked for."""

    def __init__(self, cost_at):
        self.cost_at, self.asked = cost_at, []

    def __call__(self, s):
        jax.debug.callback(lambda s: self.asked.append(float(s)), s, ordered=True)
        return self.cost_at(s)


@pytest.mark.parametrize("power", [1.0, 2.0, 2.7, 8.0])
@pytest.mark.parametrize("start", [1e-4, 0.09, 0.1, 0.13, 50.0])
def test_power_laws_are_bracketed_to_the_tolerance(power, start):
    found = find(lambda s: 0.01 * (s / 0.1) ** power, start=start)
    assert found.status == Status.CONVERGED
    assert found.bracket.inside <= 0.1 * (1 + 1e-12) and found.bracket.outside > 0.1
    assert D * np.log(found.bracket.outside / found.bracket.inside) <= 0.1
    # What counts is the inner end, and it is close.
    gap = D * np.log(0.1 / found.bracket.inside)
    assert gap <= 0.05
    assert abs(found.shortfall - gap) < 0.01
    assert abs(found.power - power) < 0.1 * power
    assert found.evaluations <= (8 if 0.05 < start < 0.2 else 40)


@pytest.mark.parametrize("dimension", [1, 10, 10**6, 10**9])
def test_the_tolerance_is_in_nats_of_volume(dimension):
    found = find(lambda s: s**2 + s**3, cutoff=0.02, start=0.1, dimension=dimension, tolerance=0.01)
    volume = lambda s: float(np.asarray(radial(dimension, 0.0, 0.0, s)))
    assert found.status == Status.CONVERGED
    assert volume(found.bracket.outside) - volume(found.bracket.inside) <= 0.0100001
    assert found.evaluations <= 8
    assert np.isclose(found.log_volume, volume(found.bracket.inside), rtol=1e-14)


def test_the_volume_of_the_prior_counts_not_the_radius():
    # Far beyond the prior's mass a radius may be wrong by half without harm.
    found = find(lambda s: s**2, cutoff=100.0, start=0.5, dimension=10, curvature=1.0)
    assert found.status == Status.NEVER_CROSSES
    assert found.evaluations < 12


def test_expansion_never_skips_more_than_the_growth_factor():
    cost = Recorder(lambda s: s**2)
    find(cost, cutoff=1.0, start=1e-3)
    inside = 0.0
    for s in cost.asked:
        assert s <= max(GROWTH * inside * (1 + 1e-6), 0.001001)
        inside = max(inside, s) if s**2 <= 1.0 else inside
    assert GROWTH <= 1.5


def test_a_double_well_gets_its_first_crossing():
    # Out at 0.102, back in at 0.988, out for good at 1.0099.
    cost = lambda s: (s * (s - 1.0)) ** 2 + 1e-4 * s
    first = find(cost, cutoff=0.0085, start=0.01)
    assert first.status == Status.CONVERGED
    root = first.bracket.inside
    assert 0.09 < root < 0.12 and cost(root) <= 0.0085 < cost(first.bracket.outside)
    # From a thousand times too close, with leaps through the quadratic part.
    leapt = find(cost, cutoff=0.0085, start=1e-5, leap=True)
    assert D * abs(np.log(leapt.bracket.inside / root)) < 0.1
    assert leapt.evaluations < first.evaluations + 6


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_costs_that_are_not_finite_are_outside(bad):
    found = find(lambda s: jnp.where(s < 0.3, 1e-4 * s**2, bad), start=0.1)
    assert found.status == Status.NON_FINITE
    assert found.bracket.inside < 0.3 <= found.bracket.outside
    assert D * np.log(found.bracket.outside / found.bracket.inside) <= 0.1
    everywhere = find(lambda s: jnp.full_like(s, bad), start=0.1)
    assert everywhere.status == Status.NEVER_INSIDE


def test_a_cost_that_never_crosses():
    proper = find(lambda s: 1e-3 * jnp.tanh(s), dimension=10, curvature=1.0)
    assert proper.status == Status.NEVER_CROSSES
    whole = float(np.asarray(radial(10, 1.0, 0.0, np.inf)))
    assert whole - 1e-4 <= proper.log_volume <= whole
    improper = find(lambda s: jnp.zeros_like(s), dimension=10)
    assert improper.status == Status.NEVER_CROSSES and np.isposinf(improper.log_volume)


def test_the_end_of_the_prior_is_a_crossing_of_its_own():
    found = find(lambda s: jnp.zeros_like(s), limit=0.7)
    assert found.status == Status.NEVER_CROSSES and found.bracket.inside == 0.7
    assert find(lambda s: s, limit=0.0).status == Status.NEVER_INSIDE


def test_a_cost_above_the_cutoff_next_to_the_anchor():
    found = find(lambda s: jnp.where(s > 0.0, 0.02, 0.0))
    assert found.status == Status.NEVER_INSIDE and found.bracket.inside == 0.0 and found.log_volume == -np.inf
    assert found.evaluations < 40
    # The parameters' rounding ends the search earlier.
    assert find(lambda s: jnp.where(s > 1e-9, 0.02, 0.0), floor=1e-8).status == Status.NEVER_INSIDE


def test_costs_that_rounding_makes_negative():
    rounded = lambda s: jnp.round(s**2 / 1e-3) * 1e-3 - 1e-9
    found = find(rounded, cutoff=0.01, start=0.01, dimension=3, tolerance=0.3)
    assert found.status in (Status.CONVERGED, Status.NOISE_LIMITED)
    assert rounded(found.bracket.inside) <= 0.01
    assert log_ratio(jnp.float32(-1e-9), jnp.float32(1.0)) == -jnp.inf


def test_noise_ends_the_search_and_is_named():
    # A millionth of the cutoff is 0.5 nats at D = 10⁶: a tolerance of 0.1 is out of reach.
    wobble = lambda s: s**2 * (1 + 1e-6 * jnp.sin(1e12 * s))
    found = find(wobble, start=0.1, dimension=10**6, noise=1e-8)
    assert found.status == Status.NOISE_LIMITED
    assert found.evaluations < 15
    drowned = find(lambda s: s**2, cutoff=1e-9, start=1e-5, noise=1e-8)
    assert drowned.status == Status.NOISE_LIMITED


def test_steps_are_found_by_bisection():
    found = find(lambda s: jnp.floor(s * 100.0), cutoff=0.5, start=0.003, dimension=100)
    assert found.status == Status.CONVERGED
    assert found.bracket.inside < 0.01 <= found.bracket.outside
    assert found.evaluations < 25


def test_steps_do_not_trap_the_search_wherever_it_starts():
    def one(start):
        return first_crossing(
            lambda s: jnp.where(s <= 0.1, 0.003, 0.02),
            lambda s: radial_and_slope(3000, 0.0, 0.0, s),
            cutoff=0.01,
            start=start,
            total=jnp.inf,
        )

    found = jax.jit(jax.vmap(one))(jnp.linspace(0.05, 0.2, 500))
    assert np.all(found.status == Status.CONVERGED)
    assert np.max(found.evaluations) < 40


def test_the_budget_is_kept_and_the_last_inside_point_counts():
    found = find(lambda s: s**2, cutoff=1.0, start=1e-3, max_evaluations=4)
    assert found.evaluations == 4 and found.status == Status.UNRESOLVED
    stuck = find(lambda s: jnp.floor(s * 100.0), cutoff=0.5, start=0.003, dimension=10**6, max_evaluations=8)
    assert stuck.status == Status.UNRESOLVED and 0.0 < stuck.bracket.inside < 0.01


def test_a_search_resumes_from_a_bracket():
    with jax.enable_x64(True):
        wide = Bracket(*map(jnp.float64, (0.05, 0.2, np.log(0.25), np.log(4.0))))
    found = find(lambda s: s**2, bracket=wide)
    assert found.status == Status.CONVERGED and found.evaluations <= 5
    assert D * np.log(0.1 / found.bracket.inside) <= 0.1
    with jax.enable_x64(True):
        point = Bracket(*map(jnp.float64, (0.1, 0.1, 0.0, 0.0)))
    assert find(lambda s: s**2, bracket=point).evaluations == 0


def test_each_lane_of_a_batch_finds_what_it_finds_alone():
    scales = jnp.array([0.03, 0.1, 2.0])

    def one(scale):
        found = first_crossing(
            lambda s: 0.01 * (s / scale) ** 2,
            lambda s: radial_and_slope(D, 0.0, 0.0, s),
            cutoff=0.01,
            start=0.1,
            total=jnp.inf,
        )
        return found.bracket.inside, found.evaluations

    together = jax.jit(jax.vmap(one))(scales)
    for i, scale in enumerate(scales):
        alone = jax.jit(one)(scale)
        assert float(alone[0]) == pytest.approx(float(together[0][i]), rel=1e-12)
        assert int(alone[1]) == int(together[1][i])
