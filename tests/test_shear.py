"""The shear against NumPy, the ensemble in its coordinates against autodiff, and runs with it against runs without.

Mutations these catch: a slip of the wrong sign, masked positions in the mean, a mean over classes left in, a hidden
bias or a squashed one taken for the offset, a toll without the pull or halved, left out of the acceptance, of the
slope, or of the work, or felt by the reference.
"""

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from volumejax import behaviours, tree
from volumejax.ensemble import Ensemble, Rung
from volumejax.frames import frame_of
from volumejax.kernels import hmc
from volumejax.metric import plain_metric
from volumejax.priors import Gaussian, Lebesgue, UniformBox
from volumejax.regions import Connected, Star
from volumejax.shear import find_shear
from volumejax.tether import _shear, tether_stream, tether_volume

CLASSES = 4
WIDTHS = {"a": 0.7, "b": 1.3, "c": 0.4, "v": 0.9}


def network(params, inputs):
    """A hidden layer as wide as there are classes, so that both biases have the same shape."""
    c, b = (params[name].reshape(1, 1, CLASSES) for name in "cb")
    return jnp.tanh(inputs @ params["a"] + c) @ params["v"] + b


def squashed(params, inputs):
    return 5.0 * jnp.tanh(network(params, inputs) / 5.0)


def scaled(params, inputs):
    return 2.0 * network(params, inputs)


def without(params, inputs):
    return network({**params, "b": jnp.zeros(CLASSES)}, inputs)


@pytest.fixture(scope="module")
def anchor():
    rng = np.random.default_rng(0)
    shapes = {"a": (3, CLASSES), "b": (CLASSES,), "c": (CLASSES,), "v": (CLASSES, CLASSES)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def moved(anchor):
    return jax.tree.map(lambda x, z: x + 0.5 * z, anchor, tree.normal_like(jax.random.key(1), anchor))


@pytest.fixture(scope="module")
def inputs():
    return jnp.asarray(np.random.default_rng(1).normal(1.0, 1.0, size=(12, 5, 3)), jnp.float32)


@pytest.fixture(scope="module")
def mask():
    return jnp.asarray(np.random.default_rng(2).random((12, 5)) < 0.6)


@pytest.fixture(scope="module")
def shear(anchor, moved, inputs, mask):
    return find_shear(behaviours.kl_to_anchor(network, anchor, inputs, mask=mask), anchor, [moved])


@pytest.fixture(scope="module")
def ensemble(shear, anchor):
    with jax.enable_x64(True):
        cutoff = jnp.float64(50.0)
    return Ensemble(shear.behaviour, frame_of(Gaussian(WIDTHS, 0.3), anchor), cutoff, Connected(), False, shear)


def test_the_offset_is_told_from_a_bias_that_is_not(shear, anchor):
    assert list(anchor)[shear.leaf] == "b"


@pytest.mark.parametrize("apply_fn", [squashed, scaled, without])
def test_other_networks_have_none(apply_fn, anchor, moved, inputs):
    assert find_shear(behaviours.kl_to_anchor(apply_fn, anchor, inputs), anchor, [moved]) is None


def test_a_leaf_that_is_added_at_the_anchor_alone_is_none(anchor, moved, inputs):
    def turning(params, inputs):
        """Where v is what it was, b is added; elsewhere it is not."""
        return network(params, inputs) + jnp.sum(jnp.square(params["v"] - anchor["v"])) * params["b"].reshape(
            1, 1, CLASSES
        )

    assert find_shear(behaviours.kl_to_anchor(turning, anchor, inputs), anchor, []) is not None
    assert find_shear(behaviours.kl_to_anchor(turning, anchor, inputs), anchor, [moved]) is None


@pytest.mark.parametrize("constant", [-1e4, -1e6, float(np.finfo(np.float32).min)])
def test_an_output_that_is_a_constant_is_none(constant, anchor, moved, inputs):
    """However large: what is too small to be seen beside it is not added to it."""

    def closed(params, inputs):
        return jnp.where(jnp.arange(CLASSES).reshape(1, 1, CLASSES) == 2, constant, network(params, inputs))

    assert find_shear(behaviours.kl_to_anchor(closed, anchor, inputs), anchor, [moved]) is None


def tied(params, inputs):
    """The bias is added to the logits, and to hidden units that sleep at the anchor."""
    b = params["b"].reshape(1, 1, CLASSES)
    return jax.nn.relu(inputs @ params["a"] + b - 8.0) @ params["v"] + b


def test_a_bias_that_wakes_hidden_units_elsewhere_is_no_offset_under_a_flat_prior(inputs):
    anchor = {"a": jnp.zeros((3, CLASSES)), "b": jnp.zeros(CLASSES), "v": 3.0 * jnp.eye(CLASSES)}
    cost = behaviours.kl_to_anchor(tied, anchor, inputs)
    assert find_shear(cost, anchor, []) is not None
    assert sheared(cost, anchor, Lebesgue()) is None


def test_costs_that_are_not_what_the_coordinates_say_end_the_run(inputs, monkeypatch):
    """Should a network's bias do other things where no draw came, no volume is told."""
    anchor = {"a": jnp.zeros((3, CLASSES)), "b": jnp.zeros(CLASSES), "v": jnp.eye(CLASSES)}
    cost = behaviours.kl_to_anchor(tied, anchor, inputs)
    monkeypatch.setattr("volumejax.tether._shear", lambda *_: find_shear(cost, anchor, []))
    with pytest.raises(RuntimeError, match=r"not what they were plus an offset.*lambda params: cost\(params\)"):
        tether_volume(jax.random.key(0), cost, anchor, Gaussian(5.0), cutoff=1.0, effort=0.01, decades=0.0)


def sheared(cost, params, prior):
    """The shear that `tether_stream` takes."""
    return _shear(cost, params, frame_of(prior, params), Connected(), 0.1)


def test_a_prior_that_holds_the_offset_itself_has_none(anchor, inputs):
    cost = behaviours.kl_to_anchor(network, anchor, inputs)
    assert sheared(cost, anchor, Gaussian(WIDTHS)) is not None
    assert sheared(cost, anchor, Gaussian({**WIDTHS, "b": 0.01})) is None
    assert sheared(cost, anchor, Lebesgue()) is not None


def test_curvature_in_the_offset_is_the_mean_over_directions(shear, anchor):
    """Those that a softmax sees; the whole matrix by autodiff."""
    matrix = jax.hessian(lambda b: shear.behaviour({**anchor, "b": b}))(anchor["b"])
    assert np.isclose(shear.curvature(anchor), np.trace(matrix) / (CLASSES - 1), rtol=0.2)


def test_other_costs_and_micro_batches_have_none(anchor, moved, inputs):
    cost = behaviours.kl_to_anchor(network, anchor, inputs)
    assert find_shear(lambda params: cost(params), anchor, [moved]) is None
    assert find_shear(behaviours.kl_to_anchor(network, anchor, inputs, batch_size=4), anchor, [moved]) is None
    assert find_shear(behaviours.kl_to_anchor(network, anchor, inputs, batch_size=12), anchor, [moved]) is not None


def test_the_anchor_stays_where_it_is(shear, anchor):
    cost, slip = shear(anchor)
    assert float(cost) == 0.0 and np.allclose(slip, 0.0, atol=1e-6)


def test_the_cost_is_that_of_the_parameters_meant(shear, moved):
    cost, slip = shear(moved)
    meant = shear.restored(moved)
    assert np.allclose(meant["b"] - moved["b"], slip, atol=1e-6) and np.all(meant["v"] == moved["v"])
    assert np.isclose(float(cost), float(shear.behaviour(meant)), rtol=1e-5)
    assert not np.isclose(float(cost), float(shear.behaviour(moved)), rtol=1e-2)


def test_the_mean_output_depends_on_the_offset_alone(shear, anchor, moved, inputs, mask):
    """Relative to its mean over classes, over the positions that count."""

    def centre(params):
        mean = np.asarray(network(params, inputs))[np.asarray(mask)].mean(axis=0)
        return mean - mean.mean()

    other = {**moved, "b": anchor["b"]}
    assert np.allclose(centre(shear.restored(other)), centre(anchor), atol=1e-5)
    push = jnp.asarray([1.0, -2.0, 0.5, 0.5], jnp.float32)
    pushed = {**moved, "b": anchor["b"] + push}
    assert np.allclose(centre(shear.restored(pushed)) - centre(anchor), push, atol=1e-5)


def test_what_no_softmax_sees_does_not_move(shear, moved):
    assert abs(float(jnp.sum(shear(moved)[1]))) < 1e-5


def test_its_determinant_is_one(shear, moved):
    flat, unravel = jax.flatten_util.ravel_pytree(moved)
    jacobian = jax.jacobian(lambda x: jax.flatten_util.ravel_pytree(shear.restored(unravel(x)))[0])(flat)
    sign, log_size = np.linalg.slogdet(np.asarray(jacobian, np.float64))
    assert sign == 1.0 and abs(log_size) < 1e-4
    assert np.abs(np.asarray(jacobian) - np.eye(len(flat))).max() > 0.1


def place(ensemble, key=3):
    return tree.normal_like(jax.random.key(key), ensemble.frame.anchor)


def whitened(ensemble, displacement):
    """δ of the parameters meant, float64."""
    meant = ensemble.shear.restored(ensemble.frame.params(displacement))
    return {name: np.asarray(meant[name] - ensemble.frame.anchor[name], np.float64) / WIDTHS[name] for name in meant}


def test_energy_is_that_of_the_parameters_meant_but_for_the_tether(ensemble):
    """βC + ½|δ|² + b·δ there, and ½κ|δ'|² of the sheared coordinates; U at the anchor is 0 in both."""
    d, beta, precision = place(ensemble), 7.0, 3.5
    with jax.enable_x64(True):
        found = float(ensemble.potential(ensemble.position(d), jnp.float64(precision), jnp.float64(beta)))
    true, pull = whitened(ensemble, d), ensemble.frame.pull
    prior = sum(0.5 * np.sum(true[n] ** 2) + np.sum(np.asarray(pull[n], np.float64) * true[n]) for n in true)
    tether = 0.5 * (precision - 1.0) * sum(np.sum(np.asarray(x, np.float64) ** 2) for x in d.values())
    cost = float(ensemble.cost(ensemble.shear.restored(ensemble.frame.params(d))))
    assert np.isclose(found, beta * cost + prior + tether, rtol=1e-5)


def test_the_reference_pays_no_toll(ensemble):
    position = ensemble.position(place(ensemble))
    assert abs(float(position.toll)) > 0.1
    with jax.enable_x64(True):
        free = ensemble.potential(position, jnp.float64(2.0), jnp.float64(0.0))
        d = position.displacement
        assert float(free) == float(tree.dot(d, d) + ensemble.frame.pulled(d))


def test_beyond_the_end_of_the_tether_the_toll_goes_with_the_prior(ensemble):
    """½|δ|² of the parameters meant is then weaker, and not that of the coordinates alone."""
    d, pull = place(ensemble), ensemble.frame.pull
    with jax.enable_x64(True):
        position = ensemble.position(d)
        states = [(jnp.float64(a), jnp.float64(5.0)) for a in (1.0, 0.9)]
        whole, weak = (float(ensemble.potential(position, *state)) - 5.0 * float(position.cost) for state in states)
    along = sum(float(np.sum(np.asarray(pull[n], np.float64) * np.asarray(d[n], np.float64))) for n in d)
    assert np.isclose(weak, 0.9 * (whole - along) + along, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 40.0])
def test_the_slope_is_that_of_cost_and_toll(ensemble, beta):
    d = place(ensemble)
    (cost, _, toll, _), slope = ensemble.slope(d, jnp.float32(1.0 / beta))
    position = ensemble.position(d)
    assert np.isclose(float(cost), float(position.cost), rtol=1e-6) and np.isclose(float(toll), float(position.toll))

    def energy(x):
        moved = ensemble.position(x)
        return float(moved.cost) + float(moved.toll) / beta

    v = tree.normal_like(jax.random.key(4), d)
    ahead, behind = (jax.tree.map(lambda x, y, h=h: x + h * y, d, v) for h in (1e-2, -1e-2))
    assert np.isclose((energy(ahead) - energy(behind)) / 2e-2, float(tree.dot(slope, v)), rtol=5e-3)


def test_the_work_of_a_map_holds_the_toll(ensemble):
    """Into the ladder from the reference, and on the way."""
    d = place(ensemble)
    position, metric = ensemble.position(d), plain_metric(d, turns=False)
    gains = jax.tree.map(lambda x: jnp.full(x.shape, 0.05, jnp.float32), d)
    size = sum(x.size for x in d.values())
    with jax.enable_x64(True):
        for here, there in (((4.0, 0.0), (4.0, 6.0)), ((4.0, 6.0), (3.0, 6.0)), ((4.0, 6.0), (4.0, 0.0))):
            a, b = (tuple(jnp.float64(v) for v in state) for state in (here, there))
            image, work = ensemble.carry(position, metric, gains, None, a, b)
            change = ensemble.potential(image, *b) - ensemble.potential(position, *a)
            assert np.isclose(float(work), float(change) - size * np.log1p(0.05), atol=1e-3)


def test_short_steps_are_nearly_all_taken_and_the_toll_is_carried_along(ensemble):
    """Energy is conserved only if slope, toll and acceptance belong together."""
    d = place(ensemble)
    with jax.enable_x64(True):
        one = jnp.float64(1.0)
        rung = Rung(one, jnp.float64(5.0), jnp.ones(4, jnp.float64), jnp.float64(0.02), jnp.float64(0.0),
                    np.int32(40), np.int32(1), jnp.zeros(12, jnp.float64))  # fmt: skip
    init, step = hmc(ensemble, rung, plain_metric(d, turns=False))
    move = eqx.filter_jit(jax.vmap(lambda key, start: step(key, start), in_axes=(0, None)))
    ends, info = move(jax.random.split(jax.random.key(5), 32), init(d))
    assert np.all(np.asarray(info.acceptance) > 0.97)
    fresh = jax.vmap(ensemble.position)(ends.displacement)
    assert np.allclose(ends.toll, fresh.toll, atol=1e-3) and np.allclose(ends.cost, fresh.cost, rtol=1e-4)
    assert np.std(np.asarray(ends.toll)) > 0.1


QUESTIONS = {
    "star": dict(prior=Gaussian(1.0), region=Star()),
    "box": dict(prior=UniformBox(-3.0, 3.0), region=Connected()),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_where_segments_or_walls_are_straight_nothing_is_sheared(name, anchor, inputs, monkeypatch):
    """Chains there would leave the rays, or meet walls that are bent."""
    seen = []
    monkeypatch.setattr("volumejax.tether.find_shear", lambda *args: seen.append(args))
    question = QUESTIONS[name]
    cost = behaviours.kl_to_anchor(network, anchor, inputs)
    tether_stream(jax.random.key(0), cost, anchor, question["prior"], cutoff=0.1, region=question["region"])
    assert not seen
    tether_stream(jax.random.key(0), cost, anchor, Lebesgue(), cutoff=0.1, region=Connected())
    assert len(seen) == 1


def logistic(params, inputs):
    return inputs @ params["v"] + params["b"].reshape(1, 2)


LOGISTIC = {"b": np.array([0.4, -0.3]), "v": np.array([[0.6, -0.2]])}
POINTS = np.random.default_rng(3).normal(2.0, 0.5, size=20)
SIGMA, CUTOFF = 1.5, 0.02


@pytest.fixture(scope="module")
def exact():
    """Of two classes only the differences count, independent Gaussians; a sum over a grid of 1,000 by 1,000."""

    def log_odds(slope, offset):
        return slope * POINTS + offset

    def divergence(slope, offset):
        z, z0 = log_odds(slope[..., None], offset[..., None]), log_odds(-0.8, -0.7)
        p0 = 1.0 / (1.0 + np.exp(-z0))
        return np.mean(p0 * (z0 - z) + np.logaddexp(0.0, z) - np.logaddexp(0.0, z0), axis=-1)

    slope, offset = np.linspace(-3.3, 1.7, 1000), np.linspace(-6.0, 4.6, 1000)
    inside = np.stack([divergence(np.full(1000, s), offset) <= CUTOFF for s in slope])
    assert not (inside[0].any() or inside[-1].any() or inside[:, 0].any() or inside[:, -1].any())
    density = np.exp(-(slope[:, None] ** 2 + offset**2) / (4.0 * SIGMA**2)) / (4.0 * np.pi * SIGMA**2)
    return float(np.log(np.sum(inside * density) * (slope[1] - slope[0]) * (offset[1] - offset[0])))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_exact_mass_of_a_logistic_regression(exact, seed):
    anchor = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), LOGISTIC)
    cost = behaviours.kl_to_anchor(logistic, anchor, jnp.asarray(POINTS[:, None], jnp.float32))
    assert find_shear(cost, anchor, []) is not None
    found = tether_volume(jax.random.key(seed), cost, anchor, Gaussian(SIGMA), cutoff=CUTOFF, effort=0.02, decades=0.0)
    assert found.std_error < 0.2 and abs(found.log_mass - exact) < 4.0 * found.std_error
    assert exact - 2.0 < found.lower < exact
