"""What a tally is said to be worth, where its works are planted.

Mutations these catch: levels that do not overlap, an error without end or chains that end far below the cutoff taken
for an estimate, a remark without its remedy or with it twice, energies behind the wall reported.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from volumejax.annealing import Record
from volumejax.ensemble import FIELDS
from volumejax.ladder import Temperatures
from volumejax.results import Kind
from volumejax.summary import Plan, summarise
from volumejax.tally import COOLING, HEATING, Tally

CHAINS, LEVELS, BETAS = 8, 4, np.array([40.0, 20.0, 10.0])
PLAN = Plan(
    cutoff=0.3, cutoffs=np.array([0.1, 0.3]), dimension=3, prior_term=-1.0, proper=True, region="connected",
)  # fmt: skip


def record(rungs, lost):
    """Visits with little work, but for what is lost between the second level and the third, on both ways."""
    rng = np.random.default_rng(len(rungs))
    shape = (len(rungs), CHAINS)
    plain = {name: np.ones(shape) for name in Record._fields}
    costs = rng.gamma(3.0, 0.05, shape)
    works = {name: 0.1 * rng.normal(size=shape) for name in ("work_down", "work_up")}
    works["work_down"][np.array(rungs) == 1] += lost
    works["work_up"][np.array(rungs) == 2] += lost
    extra = {name: rng.lognormal(size=(*shape, width)) for name, width in
             (("leaf_squares", 1), ("stretchings", FIELDS), ("rises", FIELDS))}  # fmt: skip
    once = {"square": rng.lognormal(size=shape), "permitted": np.ones(shape, bool), "non_finite": np.zeros(shape)}
    return Record(**{**plain, **works, **extra, **once, "cost": costs, "reach": costs})


@pytest.fixture
def estimate_of(make_rungs):
    def made(
        lost,
        *,
        reference=-7.0,
        plan=PLAN,
        chains=CHAINS,
        apart=0.0,
        missed=(),
        natural=2,
        guide=None,
        acceptance=1.0,
        share=0.0,
    ):
        """Of passes that are so far apart in all, and of which one chain's image is outside where `missed` says so.

        With a `guide`, of a star: all samples have the same but for one of the cooling pass's last that has so much
        more.
        With a `share`, the ridge has it at the last temperature, and is all samples' cost.
        """
        shares = share * np.array([0.0, 0.0, 1.0])
        temperatures = dataclasses.replace(make_rungs(np.ones(3), BETAS), ridge=shares if share else None)
        tally = Tally(
            make_rungs(np.array([9.0, 9.0, 3.0, 1.0]), np.array([0.0, 20.0, 20.0, 20.0])),
            Temperatures(temperatures, 1, natural), reference, chains, 0.0,
        )  # fmt: skip
        down, up = list(range(LEVELS)), list(range(LEVELS - 1, 0, -1))
        for which, rungs, sign in ((COOLING, down, 1.0), (HEATING, up, -1.0)):
            seen = record(rungs, lost)
            seen.work_down[rungs.index(2)] += sign * apart
            seen.work_up[rungs.index(3)] -= sign * apart
            if which in missed:
                seen.work_down[rungs.index(2), 0] = np.inf
            seen, temperatures = (Record(*(x[:, :chains] for x in part)) for part in (seen, record([0, 1, 2], 0.0)))
            if guide is not None:
                costs = np.full_like(temperatures.cost, 0.1)
                costs[-1, 0] += guide * (which == COOLING)
                temperatures = temperatures._replace(cost=costs, reach=np.full_like(costs, 0.2))
            temperatures = temperatures._replace(ridge=temperatures.cost)
            temperatures.acceptance[:] = acceptance
            tally.add_kappa(which, rungs, seen)
            tally.add_temperature(which, [0, 1, 2], temperatures, weighs=which == COOLING)
        with jax.enable_x64(True):
            return summarise(tally, plan, jnp.full(chains, 0.1), 1000, 1.0, final=True)

    return made


@pytest.mark.parametrize("reference", [-7.0, -7000.0])
def test_passes_that_agree_across_a_gap_are_not_mixed(estimate_of, reference):
    """However large the answer: the error knows nothing of the gap."""
    estimate = estimate_of(50.0, reference=reference)
    assert np.diff(estimate.hysteresis) == pytest.approx(0.0, abs=0.5)
    assert estimate.kind == Kind.NOT_MIXED
    assert "hardly overlap" in estimate.status and estimate.status.count("raise effort") == 1


def test_an_error_without_end_is_no_estimate(estimate_of):
    """Of two chains one is lost at a level: without the other nothing is known there, and chance explains all."""
    estimate = estimate_of(0.0, chains=2, apart=100.0, missed=(COOLING, HEATING))
    assert estimate.kind == Kind.NOT_MIXED
    assert estimate_of(0.0, chains=2, missed=(COOLING, HEATING)).kind == Kind.NOT_MIXED


def test_chains_that_end_far_below_the_cutoff_are_not_mixed(estimate_of):
    estimate = estimate_of(0.0, plan=dataclasses.replace(PLAN, cutoff=2.0))
    assert estimate.kind == Kind.NOT_MIXED
    assert "standard deviations below the cutoff" in estimate.status


def test_a_star_that_one_sample_decides_is_not_mixed(estimate_of):
    """Its guide is higher by 0.6, where the warmest β is 10: it counts for as much as hundreds of others."""
    led, even = estimate_of(0.0, guide=0.6), estimate_of(0.0, guide=0.0)
    assert led.trace.leading > 0.8 and even.trace.leading == pytest.approx(1 / 48)
    assert led.kind == Kind.NOT_MIXED and "one sample makes" in led.status
    assert even.kind == Kind.ESTIMATE and "one sample" not in even.status


def test_chains_that_stand_still_at_the_wall_are_not_mixed(estimate_of):
    """They agree with each other about what they never saw."""
    moving, still = (estimate_of(0.0, share=0.5, acceptance=taken) for taken in (1.0, 0.0))
    assert moving.kind == Kind.ESTIMATE and moving.trace.blocked == 0.0
    assert still.kind == Kind.NOT_MIXED and still.trace.blocked == 1.0 and "stood still on 100 %" in still.status
    assert np.isnan(estimate_of(0.0, acceptance=0.0).trace.blocked)


def test_passes_that_agree_on_levels_that_overlap_are_an_estimate(estimate_of):
    estimate = estimate_of(0.0)
    assert estimate.kind == Kind.ESTIMATE and "overlap" not in estimate.status


def test_single_chains_have_an_error_too(estimate_of):
    """From halves of the temperatures and stretches of the ladder; what sets the passes apart counts as lag."""
    estimate, lagging = (estimate_of(0.0, chains=1, apart=apart) for apart in (0.0, 3.0))
    assert estimate.kind == Kind.ESTIMATE and 0.01 < estimate.std_error < 1.0
    assert np.isfinite(estimate.curve.std_error[-1]) and np.isfinite(estimate.learning_coefficient.std_error)
    assert lagging.std_error > estimate.std_error
    assert estimate_of(0.0, chains=1, missed=(COOLING, HEATING)).kind != Kind.ESTIMATE


def test_energies_beyond_the_natural_temperature_are_not_reported(estimate_of):
    """There the wall cuts them off."""
    whole, cut = (estimate_of(0.0, natural=natural).trace for natural in (2, 1))
    assert np.all(np.isfinite(whole.energies)) and len(whole.betas) == 3
    for name in ("betas", "energies", "energy_errors", "heat_capacities"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(whole, name)[:2])
