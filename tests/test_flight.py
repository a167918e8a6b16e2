"""The pilot's chains on a flat cost under a Gaussian prior, where the best maps are known.

Mutations these catch: a map taken at the rung that it leads to, a fit that never waits or never ends waiting.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from volumejax import flight as module
from volumejax.annealing import Record
from volumejax.ensemble import FIELDS, ensemble_of
from volumejax.flight import Flight, Gait, stretchings
from volumejax.frames import frame_of
from volumejax.parallel import Launcher
from volumejax.priors import Gaussian

D, CHAINS = 1200, 16
PARAMS = jnp.full(D, 3.0)


def free_flight(groups=1):
    """A flight of all chains, at a prior three widths away."""
    ensemble = ensemble_of(lambda p: 0.0 * jnp.sum(p), frame_of(Gaussian(1.0), PARAMS), cutoff=1.0)
    flight = Flight(ensemble, jax.random.key(0), CHAINS // groups, 0.0, None, [Launcher(None)], groups=groups)
    flight.reference_precision(1.0)
    return flight


def everyone(flight):
    return np.concatenate([np.asarray(group.displacement) for group in flight.positions])


@pytest.fixture
def free():
    """Chains that settle in one visit."""
    return free_flight()


def test_groups_that_go_one_after_the_other_are_the_same_chains():
    one, four = free_flight(), free_flight(groups=4)
    np.testing.assert_array_equal(everyone(one), everyone(four))
    records = [f.visit(2.0, 1.0, Gait(0.5), np.exp([-2.0]), 0.0) for f in (one, four)]
    np.testing.assert_allclose(everyone(one), everyone(four), rtol=1e-4, atol=1e-4)
    for name, whole, parts in zip(Record._fields, *records, strict=True):
        np.testing.assert_allclose(whole, parts, rtol=1e-3, atol=1e-3, err_msg=name)
    for f in (one, four):
        f.learn(2.0, 1.0, keep=12)
    np.testing.assert_array_equal(one.slopes[0][1][0], four.slopes[0][1][0])
    assert one.gradients == four.gradients and four.chains.shape == (4, CHAINS // 4)


@pytest.mark.parametrize("groups", [1, 4])
def test_chains_outside_restart_from_those_inside_in_any_group(groups):
    flight, lost = free_flight(groups), 10
    before, reach = everyone(flight), np.where(np.arange(CHAINS) < lost, np.inf, 0.0)
    with jax.enable_x64(True):
        flight.positions = [
            eqx.tree_at(lambda p: p.reach, group, jnp.asarray(part))
            for group, part in zip(flight.positions, np.split(reach, groups), strict=True)
        ]
    flight.revive()
    np.testing.assert_array_equal(everyone(flight)[lost:], before[lost:])
    np.testing.assert_array_equal(everyone(flight)[:lost], before[lost + np.arange(lost) % (CHAINS - lost)])


def settled_at(flight, x):
    """Whether √a(δ + b/a) is standard normal: its square has mean D and deviation √2D, its part along b mean 0."""
    z = np.exp(0.5 * x) * (everyone(flight).astype(np.float64) + 3.0 * np.exp(-x))
    fits = np.all(np.abs(np.sum(z**2, axis=1) - D) < 5.0 * np.sqrt(2.0 * D))
    return fits and abs(np.mean(np.sum(z, axis=1)) / np.sqrt(D)) < 4.0 / np.sqrt(CHAINS)


@pytest.mark.parametrize("step", [-0.6, 0.5])
def test_free_chains_arrive_where_they_belong(free, step):
    """A few visits settle them; the map alone then takes them to the Gaussian of another tether."""
    x = 2.0
    for _ in range(6):
        free.visit(x, 1.0, Gait(0.5), np.exp([-x]), 0.0)
    assert settled_at(free, x)
    free.pending = -0.5 * step * np.array([1.0, 0.0, 1.0, 0.0])
    # A step so short that nothing but the map moves them.
    free.visit(x + step, 1.0, Gait(1e-6), np.exp([-x]), 0.0)
    assert settled_at(free, x + step)
    assert np.all(free.pending == 0.0) and len(free.pending) == FIELDS


def test_settled_chains_scatter_as_the_gaussian_says(free):
    x, found = 0.5, []
    gait = Gait(0.5)
    for _ in range(40):
        record = free.visit(x, 1.0, gait, np.exp([-x]), 0.0)
        found.append(stretchings(free.ensemble, record, x, 1.0)[-1])
    # 16 chains and some 30 independent visits tell a deviation to 3 per cent.
    assert np.std(found[8:]) == pytest.approx(free.gaussian_scatter(x), rel=0.15)
    assert free.gaussian_scatter(x) == pytest.approx(np.sqrt(2.0 * D + 9.0 * D * np.exp(-x)))


def test_a_dear_metric_is_fitted_when_a_quarter_is_new(free, monkeypatch):
    fits = []
    plain = free.metric
    monkeypatch.setattr(module, "fit_metric", lambda *args, **options: fits.append(len(args[0][0])) or plain)
    free.visit(1.0, 1.0, Gait(0.5), np.exp([-1.0]), 0.0)
    for _ in range(3):
        free.learn(1.0, 1.0, keep=12)
    assert fits == [CHAINS, 2 * CHAINS, 3 * CHAINS]
    monkeypatch.setattr(module, "_DEAR_FIT", 1)
    fits.clear()
    for _ in range(14):
        free.learn(1.0, 1.0, keep=12)
    assert fits == [CHAINS * n for n in (4, 6, 8, 11, 12, 12)]
    fits.clear()
    free.learn(1.0, 1.0, keep=12, settled=True)
    assert len(fits) == 1
