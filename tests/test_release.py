"""What chains weigh after their release from the anchor, and which of them are given up.

Mutations these catch: the ½ of the weight or its sign, the virial's share with the wrong sign, a copy that keeps the
old weight, the many given up instead of the few.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import volumejax as vj
from volumejax.ensemble import Ensemble
from volumejax.frames import frame_of
from volumejax.regions import Connected
from volumejax.release import _Draws, _Journey, _lost, _mean_square

H, BETA = np.array([10.0, 1.0, 0.1, 0.0]), 100.0


def journey(seed=0, num_chains=24):
    cost = lambda w: 0.5 * jnp.sum(jnp.asarray(H, jnp.float32) * w**2)
    with jax.enable_x64(True):
        frame = frame_of(vj.Gaussian(1.0), jnp.zeros(4, jnp.float32))
        cutoff = jnp.asarray(jnp.inf, jnp.float64)
    made = _Journey(Ensemble(cost, frame, cutoff, Connected(), False), jax.random.key(seed), BETA, 8)
    made.start(1e4, num_chains)
    return made


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_weights_are_the_normalisers_along_the_way(seed):
    """Z(a) ∝ Π (a + βh)^(−½) on a quadratic; twenty rungs of a fifth each."""
    made = journey(seed)
    first = made.precision
    for _ in range(20):
        made.go(made.precision / 1.2)
        made.visit()
    last = made.precision
    truth = 0.5 * np.sum(np.log((first + BETA * H) / (last + BETA * H)))
    error = made.log_weights.std(ddof=1) / np.sqrt(len(made.log_weights))
    # A rung's end stands for the whole of it: 0.09 of the change from the first rung to the last of ½ E a|δ|².
    ends = 0.5 * np.sum(first / (first + BETA * H) - last / (last + BETA * H))
    assert abs(made.log_weights.mean() - truth) <= 4.0 * error + 0.1 * ends
    assert error <= 0.05 * truth and truth >= 5.0


def test_a_chain_without_weight_is_replaced_by_a_copy_of_another():
    made = journey()
    made.go(made.precision / 1.2)
    made.visit()
    made.log_weights = np.linspace(-1.0, 1.0, 24)
    made.log_weights[5] = -100.0
    before, weights = np.asarray(made.positions.displacement), made.log_weights.copy()
    slopes = made.seen[-1][0][0]
    made.cull()
    after = np.asarray(made.positions.displacement)
    (source,) = np.flatnonzero((before == after[5]).all(axis=1))
    others = np.arange(24) != 5
    assert source != 5 and made.log_weights[5] == weights[source]
    assert np.array_equal(after[others], before[others]) and np.array_equal(made.log_weights[others], weights[others])
    assert np.array_equal(made.seen[-1][0][0][5], slopes[source])
    made.cull()
    assert np.array_equal(np.asarray(made.positions.displacement), after)


def test_only_a_few_far_below_most_are_given_up():
    quiet = np.zeros(32)
    quiet[[3, 7]] = -5.5, -4.5
    assert np.flatnonzero(_lost(quiet)).tolist() == [3]
    noisy = np.linspace(-10.0, 10.0, 32)
    noisy[4] = 200.0
    noisy[9] = -90.0
    assert np.flatnonzero(_lost(noisy)).tolist() == [9]
    two = np.repeat([0.0, -50.0], 16)
    assert not _lost(two).any()


def test_the_virial_takes_noise_out_and_no_mean():
    generator = np.random.default_rng(0)
    square, virial = generator.chisquare(30, (8, 4000)), generator.chisquare(20, (8, 4000))
    draws = lambda virial: _Draws(square, square, square, virial)
    means = _mean_square(draws(virial), 50)
    assert abs(means.mean() - 30.0) <= 4.0 * means.std() / np.sqrt(4000)
    # Of the variances 60 and 40 the best mixture leaves 24.
    assert means.var() <= 1.1 * 24.0 / 8.0
    broken = virial.copy()
    broken[0, 0] = np.nan
    assert np.array_equal(_mean_square(draws(broken), 50), square.mean(axis=0))
