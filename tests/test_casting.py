"""Scouts, plans and the loop that runs them, on costs whose crossing, power and noise are planted.

Mutations these catch: the largest crossing for the median, noise without its √6, powers from scouts that never crossed,
audits of the wrong rays, lanes without a ray written over ray 0, float64 left on while the user's cost runs.
"""

import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from volumejax.casting import (
    NUM_SCOUTS,
    Campaign,
    Errand,
    Question,
    cast,
    cost_along,
    plan_rays,
    plan_scouts,
    position_floor,
)
from volumejax.parallel import ABSENT
from volumejax.priors import Gaussian
from volumejax.proposals import Diagonal
from volumejax.regions import Star
from volumejax.results import Status
from volumejax.tree import normal_like

D, CUTOFF, TOLERANCE = 6, 0.01, 0.1


class Planted(eqx.Module):
    """scale·|w|^power, with absolute noise uniform in ±noise that changes with the last bit of |w|²."""

    scale: jax.Array
    power: jax.Array
    noise: jax.Array

    def __call__(self, params):
        square = jnp.sum(params["w"] ** 2) + jnp.sum(params["b"] ** 2)
        bits = jax.lax.bitcast_convert_type(square, jnp.uint32) * jnp.uint32(2654435761)
        unit = (bits >> 8).astype(jnp.float32) / jnp.float32(2**23) - 1.0
        smooth = self.scale * jnp.exp(0.5 * self.power * jnp.log(jnp.where(square > 0, square, 1.0)))
        return jnp.where(square > 0, smooth + self.noise * unit, 0.0 * self.scale)


def question(scale=0.5, power=2.0, noise=0.0):
    single = lambda x: jnp.asarray(x, jnp.float32)
    return Question(
        cost=Planted(single(scale), single(power), single(noise)),
        params={"w": jnp.zeros(4), "b": jnp.zeros(2)},
        prior=Gaussian(1.0),
        proposal=Diagonal({"w": 1.0, "b": 0.25}),
        cutoff=(single(CUTOFF), jnp.zeros(())),
        tolerance=(single(TOLERANCE), jnp.zeros(())),
        region=Star(8),
        max_evaluations=100,
        mesh=None,
        callers_x64=False,
    )


@eqx.filter_jit
def run(key, question, campaign, errands, indices):
    campaign, rays = cast(key, question, campaign, errands, indices)
    return campaign, rays, campaign.scouting(question)


def send(seed, question, *plans, num_rays=20):
    """Run the plans one after the other and rest until six chunks are full, so that one program serves all."""
    errands, indices = (np.concatenate(parts) for parts in zip(*plans, strict=True))
    missing = 6 - len(errands)
    errands = np.pad(errands, (0, missing), constant_values=Errand.REST)
    indices = np.pad(indices, ((0, missing), (0, 0)), constant_values=ABSENT)
    out = run(jax.random.key(seed), question, Campaign.begin(num_rays), jnp.asarray(errands), jnp.asarray(indices))
    return jax.tree.map(np.asarray, out)


def scout(seed, question, lanes=8):
    campaign, _, scouting = send(seed, question, plan_scouts(lanes))
    return campaign, scouting


def lengths_of(key, question, count):
    """|y| of the first directions of a key."""
    draws = [question.proposal.draw(jax.random.fold_in(key, i), question.params).direction for i in range(count)]
    return np.array(
        [np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(y))) for y in draws]
    )


def test_plans_by_hand():
    rest = [ABSENT]
    errands, indices = plan_scouts(3)
    assert errands.tolist() == [Errand.SCOUT] * 3 + [Errand.MEASURE] * 3
    assert indices.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, *rest]] * 2
    errands, indices = plan_rays(5, 4, 3, 2)
    assert errands.tolist() == [Errand.TRACE, Errand.TRACE, Errand.AUDIT]
    assert indices.tolist() == [[5, 6], [7, 8], [6, *rest]]
    errands, _ = plan_rays(0, 4, 0, 2)
    assert errands.tolist() == [Errand.TRACE] * 2


@hypothesis.given(st.integers(0, 50), st.integers(1, 50), st.integers(1, 9), st.integers(1, 20))
def test_every_ray_is_traced_once_and_audited_by_its_place_in_the_run(first, count, stride, lanes):
    errands, indices = plan_rays(first, count, stride, lanes)
    of = lambda errand: sorted(i for i in indices[errands == errand].ravel() if i != ABSENT)
    assert of(Errand.TRACE) == list(range(first, first + count))
    assert of(Errand.AUDIT) == [i for i in range(first, first + count) if i % stride == 0]
    assert sorted(errands) == list(errands)


@pytest.mark.parametrize("power", [2.0, 4.0])
def test_scouts_find_the_crossing_and_the_power(power):
    asked = question(power=power)
    campaign, scouting = scout(0, asked)
    truth = (CUTOFF / 0.5) ** (1 / power) / lengths_of(jax.random.fold_in(jax.random.key(0), 1), asked, NUM_SCOUTS)
    short = D * np.log(truth / campaign.scout_reach)
    assert np.all(short >= -1e-3) and np.all(short <= TOLERANCE)
    assert abs(np.log(scouting.start) - np.median(np.log(truth))) <= TOLERANCE / D
    assert abs(float(scouting.power) - power) <= 0.02 * power
    # Half a unit in the last place of the cutoff is all the noise that a float32 number can have hidden here.
    assert 0.499 * 2.0**-23 * CUTOFF <= scouting.noise <= 10 * 2.0**-23 * CUTOFF


def test_scouts_measure_the_noise():
    """Uniform noise in ±σ√3. Mutation: without √6 the answer is 2.4 times too large."""
    planted = 1e-3 * CUTOFF
    ratios = [float(scout(seed, question(noise=planted))[1].noise) / (planted / np.sqrt(3)) for seed in (0, 1, 2)]
    # 24 second differences, which know σ to 17 %.
    assert 0.65 < np.sqrt(np.mean(np.square(ratios))) < 1.5


def test_lanes_do_not_matter():
    all_at_once, by_threes = (scout(3, question(), lanes)[0] for lanes in (8, 3))
    np.testing.assert_allclose(all_at_once.scout_reach, by_threes.scout_reach, rtol=1e-6)
    assert np.array_equal(all_at_once.scout_evaluations, by_threes.scout_evaluations)
    assert np.all(all_at_once.scout_evaluations > 3) and np.all(all_at_once.scout_evaluations < 40)


def test_a_cost_that_never_crosses_or_is_no_number_leaves_the_defaults():
    campaign, scouting = scout(0, question(scale=0.0))
    assert np.all(np.isfinite(campaign.scout_reach)) and np.all(np.isnan(campaign.scout_power))
    assert scouting.power == 2.0 and scouting.noise == 0.5 * 2.0**-23 * np.float64(np.float32(CUTOFF))
    campaign, scouting = scout(0, question(scale=np.nan))
    assert np.all(np.isnan(campaign.scout_reach))
    assert scouting.start == 1.0 and scouting.power == 2.0 and scouting.noise > 0.0


def test_rays_start_from_the_scouts_and_are_audited():
    """20 rays in 8 lanes, every fourth audited."""
    asked = question()
    campaign, rays, _ = send(0, asked, plan_scouts(8), plan_rays(0, 20, 4, 8))
    errands = np.concatenate([plan_scouts(8)[0], plan_rays(0, 20, 4, 8)[0]])
    truth = np.sqrt(2 * CUTOFF) / lengths_of(jax.random.fold_in(jax.random.key(0), 0), asked, 20)
    short = D * np.log(truth / campaign.reach)
    assert np.all(short >= -1e-3) and np.all(short <= TOLERANCE)

    traced = jax.tree.map(lambda x: x[errands == Errand.TRACE], rays)
    assert np.all(traced.status == Status.CONVERGED) and not traced.audited.any() and not traced.audit_evaluations.any()
    # In a vmapped loop all lanes run as long as the slowest.
    assert np.array_equal(traced.executed, np.repeat(traced.evaluations.max(axis=1, keepdims=True), 8, axis=1))
    assert np.median(traced.evaluations.ravel()[:20]) <= 6
    distance = traced.radius.ravel()[:20]
    np.testing.assert_allclose(distance, campaign.reach * np.sqrt(2 * CUTOFF) / truth, rtol=1e-5)

    audits = jax.tree.map(lambda x: x[errands == Errand.AUDIT], rays)
    assert audits.audited.all() and not audits.violated.any()
    assert np.all(audits.audit_evaluations == 8)


def test_the_cost_along_a_ray_runs_in_the_callers_precision():
    seen = []

    def cost(params):
        seen.append((jax.config.jax_enable_x64, {leaf.dtype for leaf in jax.tree.leaves(params)}))
        return jnp.sum(params["w"]) + jnp.zeros(())

    asked = eqx.tree_at(lambda q: q.cost, question(), cost)
    direction = normal_like(jax.random.key(0), asked.params)
    with jax.enable_x64(True):
        value = cost_along(asked, direction)(jnp.float64(0.5))
    assert value.dtype == jnp.float64
    assert np.isclose(float(value), 0.5 * float(jnp.sum(direction["w"])), rtol=1e-6)
    assert seen == [(False, {jnp.dtype("float32")})]


def test_the_floor_is_a_rounding_of_the_parameters():
    direction = {"w": jnp.full(4, 2.0), "b": jnp.zeros(2)}
    single = {"w": jnp.full(4, 3.0), "b": jnp.zeros(2)}
    assert np.isclose(float(position_floor(single, direction)), 2.0**-23 * 3.0 / 2.0)
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), single)
    assert np.isclose(float(position_floor(halves, direction)), 2.0**-7 * 3.0 / 2.0)
    # The parameter that feels a step first decides: a large one beside it must not hide the step.
    mixed = {"w": jnp.array([3.0, 3.0, 3e5, 3.0]), "b": jnp.zeros(2)}
    assert float(position_floor(mixed, direction)) == float(position_floor(single, direction))
    at_zero = float(position_floor(jax.tree.map(jnp.zeros_like, single), direction))
    assert 0.0 < at_zero < 1e-30
