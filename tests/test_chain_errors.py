"""Standard errors of planted works, whose scatter is known."""

import dataclasses

import numpy as np
import pytest

from volumejax.chain_errors import colder_error, ladder_error, ladder_noise, standard_errors
from volumejax.ladder import Temperatures
from volumejax.tally import COOLING, HEATING, Tally


def test_the_error_of_single_chains_is_that_of_stretches_and_not_of_an_even_lag(make_rungs):
    """Mutations: the lag of all stretches counted as scatter, nothing left once a chain's own mean is taken out."""
    levels, rng = 2_401, np.random.default_rng(0)

    def tally_of(noise, lag):
        tally = Tally(
            make_rungs(np.full(levels, 3.0), np.full(levels, 20.0)),
            Temperatures(make_rungs(np.ones(5), np.full(5, 20.0)), 2, 4), -7.0, 1, 0.02,
        )  # fmt: skip
        for which, sign in ((COOLING, 1.0), (HEATING, -1.0)):
            # What one rung says on the way down the next one says on the way up.
            work = noise * rng.normal(size=levels) + sign * lag
            tally.kappa_seen["work_down"][which, :, 0] = work
            tally.kappa_seen["work_up"][which, :, 0] = -noise * rng.normal(size=levels) - sign * lag
            for rung in range(2, 5):
                seen = {name: np.ones(1) for name in ("cost", "ridge", "reach", "acceptance")}
                works = {name: np.zeros(1) for name in ("work_down", "work_up")}
                tally.temperature_seen.append((which, rung, {**seen, **works}))
        return tally

    def found(tally):
        sums = tally.sums(np.array([0.3]), 0.3, chains=np.arange(1))
        return [of(tally, sums.kappa_differences, sums.beta_differences) for of in (ladder_error, ladder_noise)]

    errors = [found(tally_of(0.1, 0.0)) for _ in range(20)]
    # Four works at each of 2,400 gaps, whose mean is half of them down and half up.
    truth = 0.1 * np.sqrt(2400 / 4)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(errors), axis=0)), [truth, truth], rtol=0.15)
    # The passes are 96 nats apart, and the stretches differ by a gap.
    assert max(found(tally_of(0.0, 0.02))) < 0.05


def single_chains(make_rungs, works):
    """One chain of each pass with these works at each κ rung, (passes, 2, levels), and none at the temperatures."""
    levels = works.shape[-1]
    tally = Tally(
        make_rungs(np.full(levels, 3.0), np.full(levels, 20.0)),
        Temperatures(make_rungs(np.ones(2), np.full(2, 20.0)), 0, 1), -7.0, 1, 0.02,
    )  # fmt: skip
    for which in (COOLING, HEATING):
        tally.kappa_seen["work_down"][which, :, 0], tally.kappa_seen["work_up"][which, :, 0] = works[which]
        for rung in (0, 1):
            seen = {name: np.ones(1) for name in ("cost", "ridge", "reach", "acceptance")}
            nothing = {name: np.zeros(1) for name in ("work_down", "work_up")}
            tally.temperature_seen.append((which, rung, {**seen, **nothing}))
    return tally


def dragged(rng, steps, memory):
    """Works (passes, 2, levels) of a particle in a harmonic trap that goes by `steps`, and back: ΔF is 0."""
    trap, keep = np.append(0.0, np.cumsum(steps)), np.exp(-1.0 / memory)
    works = np.zeros((2, 2, len(trap)))
    for which, order in ((COOLING, range(len(trap))), (HEATING, range(len(trap) - 1, -1, -1))):
        lag = rng.normal()
        for i, at in enumerate(order):
            if i:
                lag += trap[order[i - 1]] - trap[at]
            lag = keep * lag + np.sqrt(1.0 - keep**2) * rng.normal()
            for way, ahead in enumerate((at + 1, at - 1)):
                if 0 <= ahead < len(trap):
                    works[which, way, at] = 0.5 * (lag + trap[at] - trap[ahead]) ** 2 - 0.5 * lag**2
    return works


@pytest.mark.parametrize(("memory", "fastest"), [(60.0, 0.15), (200.0, 0.1)])
def test_a_lag_that_grows_along_the_ladder_is_no_scatter_either(make_rungs, memory, fastest):
    """Passes some 400 nats apart, of which the joint estimate is off by 13.

    Mutations: the growing lag counted as scatter (eight times too large), nothing for what lags, or twice as much.
    """
    steps = fastest * np.linspace(0.0, 1.0, 1_499) ** 4
    offs, claimed, gaps = [], [], []
    for seed in range(30):
        works = dragged(np.random.default_rng(seed), steps, memory)
        tally = single_chains(make_rungs, works)
        sums = tally.sums(np.array([0.3]), 0.3, chains=np.arange(1))
        # Out of the reference, whose works are all the cooling pass has, nothing is gained.
        offs.append(float(np.sum(sums.kappa_differences[1:])))
        claimed.append(ladder_error(tally, sums.kappa_differences, sums.beta_differences))
        one, other = (0.5 * np.sum(down[1:-1] - up[2:]) for down, up in works)
        gaps.append(one - other)
    assert 300.0 < np.mean(gaps) < 500.0
    assert 0.7 < np.sqrt(np.mean(np.square(np.array(offs) / claimed))) < 1.05
    assert np.mean(claimed) < 20.0


@pytest.mark.parametrize(("first", "is_told"), [(1_200, False), (2, False), (2_358, False), (1_280, True), (2, True)])
def test_what_one_stretch_has_apart_is_scatter(make_rungs, first, is_told):
    """In the middle and at either end; over two stretches where the chain is seen to stand still. 100 rungs are one.

    Mutations: a median, or the mean of neighbours, for it; the ends by half; a chain that stood still taken for lag.
    """
    levels, jump = 2_401, 20.0
    works, gaps = np.zeros((2, 2, levels)), np.arange(first, first + 40)
    for which, sign in ((COOLING, 1.0), (HEATING, -1.0)):
        works[which, 0, gaps], works[which, 1, gaps + 1] = sign * jump / 40, -sign * jump / 40
    tally = single_chains(make_rungs, works)
    if is_told:
        tally.kappa_seen["acceptance"][COOLING, first : first + 60] = 0.0
    sums = tally.sums(np.array([0.3]), 0.3, chains=np.arange(1))
    assert ladder_error(tally, sums.kappa_differences, sums.beta_differences) == pytest.approx(jump, rel=0.15)


@pytest.mark.parametrize(("share", "chains"), [(0.0, 1), (1.0, 1), (0.0, 2), (0.0, 8), (1.0, 8)])
def test_temperatures_of_few_chains_have_an_error_too(make_rungs, share, chains):
    """As many works at each of 400 gaps, beside a κ ladder without noise. Many chains have a jackknife.

    Mutations: passes split at the wrong visit, the work of the way up paired off with the rung below.
    """
    rng, count = np.random.default_rng(0), 401
    shares = share * np.linspace(0.0, 1.0, count)
    rungs = dataclasses.replace(make_rungs(np.ones(count), np.full(count, 20.0)), ridge=shares if share else None)

    def error(visits, joint=0):
        tally = Tally(
            make_rungs(np.full(50, 3.0), np.full(50, 20.0)),
            Temperatures(rungs, joint, count - 1), -7.0, chains, 0.02,
        )  # fmt: skip
        for name in ("work_down", "work_up"):
            tally.kappa_seen[name][:] = 0.0
        for which, route in ((COOLING, range(count)), (HEATING, range(count - 1, -1, -1))):
            for rung in np.repeat(route, visits[which]):
                down, up = 0.1 * rng.normal(size=(2, chains)) + 0.02 * (which == COOLING)
                seen = {name: np.ones(chains) for name in ("cost", "ridge", "reach", "acceptance")}
                tally.temperature_seen.append((which, int(rung), {**seen, "work_down": down, "work_up": up}))
        differences = tally.sums(np.array([0.3]), 0.3, chains=np.arange(chains)).beta_differences
        return ladder_error(tally, np.zeros(49), differences), colder_error(tally, differences)

    # What is colder than the joint has a part of its own.
    known = share or chains < 8
    for visits, joint in (((1, 1), 0), ((3, 1), 0), ((2, 2), 0), ((1, 1), 200)):
        errors = np.sqrt(np.mean(np.square([error(visits, joint) for _ in range(40)]), axis=0))
        expected = [0.1 * np.sqrt(gaps / (2 * sum(visits) * chains)) for gaps in (known * (400 - joint), joint)]
        np.testing.assert_allclose(errors, expected, rtol=0.2, atol=1e-9)


@pytest.mark.parametrize(("of_chains", "of_time"), [(0.0, 0.3), (0.3, 0.0), (0.0, 0.0)])
def test_few_chains_have_the_larger_error_of_chains_and_of_time(make_rungs, of_chains, of_time):
    """Two chains that differ from each other at the second of two temperatures, or both from visit to visit.

    The temperatures are alike, and the mass is the mean of e^{βC} over both.
    Mutations: the jackknife alone, the stretches alone, their sum, chains left out by time.
    """
    beta, visits = 20.0, 6
    tally = Tally(
        make_rungs(np.ones(4), np.full(4, beta)), Temperatures(make_rungs(np.ones(2), np.full(2, beta)), 0, 1),
        -7.0, 2, 0.0,
    )  # fmt: skip
    for name in ("work_down", "work_up"):
        tally.kappa_seen[name][:] = 0.0
    energies = np.ones((2, visits, 2))
    energies[1] += of_chains * np.array([-1.0, 1.0]) + of_time * np.linspace(-1.0, 1.0, visits)[:, None]
    for rung in (0, 1):
        for visit, energy in enumerate(energies[rung]):
            seen = {name: energy / beta for name in ("cost", "ridge")} | {"reach": np.ones(2)}
            works = {name: np.zeros(2) for name in ("work_down", "work_up")}
            which = COOLING if visit < visits // 2 else HEATING
            tally.temperature_seen.append((which, rung, seen | works))
    whole = tally.sums(np.array([1.0]), 1.0, chains=np.arange(2))
    errors = standard_errors(tally, whole, np.array([1.0]), 1.0, (COOLING, HEATING))

    def jackknife(axis):
        left = np.log([np.mean(np.delete(np.exp(energies), k, axis)) for k in range(energies.shape[axis])])
        return np.sqrt((len(left) - 1) * np.mean((left - left.mean()) ** 2))

    expected = max(jackknife(1), jackknife(2))
    assert errors.mass == pytest.approx(expected, abs=1e-9)
    assert errors.curve[0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("chains", "least"), [(1, 1.0), (32, 4.0)])
def test_what_colder_chains_lag_by_on_their_way_and_back_is_an_error_of_the_curve(make_rungs, chains, least):
    """The ways part at each of four gaps, by four and a half nats in all at the coldest cutoff; half of it counts.

    Chance explains most of that for a single chain. Mutations: halves exchanged at some rungs, works or samples of both
    ways in one, the mass at the cutoff made uncertain by what is colder.
    """
    joint, last, cutoffs = 4, 6, np.array([1e-4, 1e-3, 1e-2, 0.3])
    beta = 2e5 * np.exp(-2.0 * np.arange(last + 1))

    def errors_of(lag):
        rng = np.random.default_rng(1)
        tally = Tally(
            make_rungs(np.full(9, 3.0), np.full(9, beta[joint])),
            Temperatures(make_rungs(np.ones(last + 1), beta), joint, last), -7.0, chains, 0.0,
        )  # fmt: skip
        for which in (COOLING, HEATING):
            for name in ("work_down", "work_up"):
                tally.kappa_seen[name][which] = 0.0
        there_and_back = [(rung, 0) for rung in range(last, -1, -1)] + [(rung, 1) for rung in range(last + 1)]
        visits = [(COOLING, *visit) for visit in there_and_back]
        for which, rung, way in visits + [(HEATING, rung, 0) for rung in range(last, joint - 1, -1)]:
            cost = rng.gamma(1.5, 1.0 / beta[rung], size=chains)
            seen = {name: cost for name in ("cost", "ridge", "reach")} | {"acceptance": np.ones(chains)}
            sign = 0.0 if which == HEATING or rung > joint else lag * (-1.0) ** way
            down = np.log(1.0 / 3.0) + sign + 0.01 * rng.normal(size=chains)
            up = -np.log(1.0 / 3.0) - sign + 0.01 * rng.normal(size=chains)
            # From the joint on all is alike.
            works = {"work_down": down if rung < joint else 0.0 * down, "work_up": up if rung <= joint else 0.0 * up}
            tally.temperature_seen.append((which, rung, seen | works))
        whole = tally.sums(cutoffs, 0.3, chains=np.arange(chains))
        return standard_errors(tally, whole, cutoffs, 0.3, (COOLING, HEATING))

    still, lagging = errors_of(0.0), errors_of(2.0)
    more = 2.0 * np.sqrt(np.maximum(lagging.curve**2 - still.curve**2, 0.0))
    assert least < more[0] < 5.0 and more[0] > more[1] > more[2]
    assert lagging.mass == pytest.approx(still.mass, abs=0.02)
