"""Hamiltonian moves on two coordinates, against quadrature: behind hard walls, in boxes and balls, in stars.

Mutations these catch: a full kick at either end, the work of the quadratic part counted twice or not at all, a
reflection about the wrong normal or without the masses, a position outside kept, walls that let the velocity through,
the start's reach used for the end's, NaN accepted.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from volumejax import ensemble as ensemble_module
from volumejax.ensemble import FIELDS, Ensemble, Rung, with_bulges, with_ridge
from volumejax.frames import frame_of
from volumejax.kernels import JITTER, hmc, rescaled
from volumejax.metric import Metric, plain_metric
from volumejax.priors import Gaussian, UniformBall, UniformBox
from volumejax.regions import Connected, Star

ANCHOR = {"u": jnp.float32(0.5), "v": jnp.float32(-1.0)}
CHAINS, SETTLING, DRAWS = 48, 40, 260


class Valley(eqx.Module):
    """½ stiff·(u, v − bend·u²)² + quartic·(u² + v²)² about the anchor, and no number at all beyond the fence."""

    stiff: jax.Array
    bend: jax.Array
    quartic: jax.Array
    fence: jax.Array

    def __call__(self, params):
        u, v = params["u"] - ANCHOR["u"], params["v"] - ANCHOR["v"]
        curve = 0.5 * self.stiff[0] * u**2 + 0.5 * self.stiff[1] * (v - self.bend * u**2) ** 2
        return jnp.where(u > self.fence, jnp.nan, curve + self.quartic * (u**2 + v**2) ** 2)


def number(x):
    with jax.enable_x64(True):
        return jnp.float64(x)


def ensemble_of(prior, cutoff, stiff=(1.0, 4.0), bend=0.0, quartic=0.0, fence=np.inf, region=Connected()):  # noqa: B008
    parts = (jnp.asarray(x, jnp.float32) for x in (np.array(stiff), bend, quartic, fence))
    ensemble = Ensemble(Valley(*parts), frame_of(prior, ANCHOR), number(cutoff), region, False)
    return with_bulges(ensemble, [0.7]) if isinstance(region, Star) else ensemble


def rung_of(precision=1.0, beta=1.0, masses=(1.0, 1.0), step_size=0.3, spread=0.0, num_steps=5, ridge=None):
    with jax.enable_x64(True):
        single = [jnp.float64(x) for x in (precision, beta, step_size, spread)]
        masses, still = jnp.asarray(masses, jnp.float64), jnp.zeros(FIELDS * len(masses), jnp.float64)
        return Rung(
            *single[:2], masses, *single[2:], jnp.int32(num_steps), jnp.int32(1), still, ridge and jnp.float64(ridge)
        )


def on_host(function):
    """Results are float64, which jax.numpy would round outside enable_x64."""
    compiled = eqx.filter_jit(function)
    return lambda *args: jax.tree.map(np.asarray, compiled(*args))


PLAIN = plain_metric(ANCHOR, turns=True)


@on_host
def walk(ensemble, rung, key, metric=PLAIN, rescales=False):
    """All chains from the anchor: what each draw looked like, axes [draws, chains]."""
    init, step = hmc(ensemble, rung, metric)

    def advance(position, keys):
        if rescales:
            with jax.enable_x64(False):
                others = jax.vmap(lambda key: jax.random.fold_in(key, 7))(keys)
            position = jax.vmap(lambda key, start: rescaled(ensemble, rung, key, start))(others, position)
        position, info = jax.vmap(step)(keys, position)
        d = position.displacement
        fits = jax.vmap(ensemble.permits)(position.reach, d)
        return position, (position.cost, d, info, fits)

    with jax.enable_x64(True):
        start = jax.vmap(init)(
            jax.tree.map(lambda x: jnp.zeros((CHAINS, *x.shape), jnp.float32), ensemble.frame.anchor)
        )
        with jax.enable_x64(False):
            keys = jax.random.split(key, (SETTLING + DRAWS, CHAINS))
        return jax.lax.scan(advance, start, keys)[1]


def grid_truth(log_density, inside, extent, at):
    """E C, E|δ|² and P(|δ|² ≤ at) by the midpoint rule over δ; `log_density` returns (−U, C)."""
    edges = np.linspace(-extent, extent, 1601)
    middle = 0.5 * (edges[1:] + edges[:-1])
    x, y = np.meshgrid(middle, middle, indexing="ij")
    minus, cost = log_density(x, y)
    allowed = inside(x, y, cost)
    weight = np.where(allowed, np.exp(np.where(allowed, minus, 0.0)), 0.0)
    weight /= weight.sum()
    cost, square = np.where(allowed, cost, 0.0), x * x + y * y
    return np.array([np.sum(weight * cost), np.sum(weight * square), *(np.sum(weight * (square <= t)) for t in at)])


def energy(ensemble, rung):
    """NumPy twin of −U and C over δ."""
    s = [float(x) for x in jax.tree.leaves(ensemble.frame.scale)]
    pull = [0.0, 0.0] if ensemble.frame.pull is None else [float(x) for x in jax.tree.leaves(ensemble.frame.pull)]
    stiff, bend, quartic = (np.asarray(x, float) for x in jax.tree.leaves(ensemble.cost)[:3])

    def cost_at(x, y):
        u, v = s[0] * x, s[1] * y
        curve = 0.5 * stiff[0] * u**2 + 0.5 * stiff[1] * (v - bend * u**2) ** 2
        return curve + quartic * (u**2 + v**2) ** 2

    def log_density(x, y):
        cost = np.mean([cost_at(t * x, t * y) for t in ensemble.guides], axis=0)
        a, beta, held = float(rung.precision), float(rung.beta), cost
        if rung.ridge is not None:
            sharpness, s = float(ensemble.ridge.sharpness), float(rung.ridge)
            top = logsumexp(sharpness * np.stack([cost_at(t * x, t * y) for t in ensemble.eyes]), axis=0) / sharpness
            held = (1.0 - s) * cost + s * float(ensemble.ridge.share) * top
        return -beta * held - 0.5 * a * (x * x + y * y) - pull[0] * x - pull[1] * y, cost

    return cost_at, log_density


def agree(seen, truth, at, cap):
    """Means over chains within four standard errors, which are small."""
    cost, d = np.asarray(seen[0])[SETTLING:], jax.tree.leaves(seen[1])
    square = sum(np.asarray(x, np.float64)[SETTLING:] ** 2 for x in d)
    per_chain = np.stack([cost.mean(0), square.mean(0), *(np.mean(square <= t, axis=0) for t in at)])
    error = per_chain.std(1, ddof=1) / np.sqrt(CHAINS)
    assert np.all(np.abs(per_chain.mean(1) - truth) <= 4 * error), (per_chain.mean(1), truth, error)
    assert np.all(error <= cap * np.maximum(truth, 0.3)), error


PULLED = Gaussian(0.8, {"u": 0.1, "v": -1.0})
BOXED = UniformBox({"u": 0.2, "v": -1.5}, {"u": 1.3, "v": -0.4})
BALLED = UniformBall(1.1, {"u": 0.9, "v": -0.8})
TARGETS = {
    "quadratic behind a wall": (ensemble_of(PULLED, 1.0), rung_of(1.4, 0.8, (1.0, 3.0))),
    "bent and quartic behind a wall": (
        ensemble_of(PULLED, 1.0, (0.6, 9.0), 0.8, 0.1), rung_of(1.1, 1.5, (2.0, 4.0), 0.15, 0.5, 10)
    ),
    "box": (ensemble_of(BOXED, 1e3), rung_of(0.6, 1.0, (1.0, 2.0))),
    "box behind a wall": (ensemble_of(BOXED, 0.35), rung_of(0.6, 1.0, (1.0, 2.0))),
    "ball": (ensemble_of(BALLED, 1e3), rung_of(0.7, 0.5, (1.0, 2.0))),
    "ball behind a wall": (ensemble_of(BALLED, 0.5), rung_of(0.7, 0.5, (1.0, 2.0))),
    "star": (ensemble_of(PULLED, 0.25, (0.15, 12.0), 0.9, region=Star(4)), rung_of(1.0, 1.0, (1.0, 6.0), 0.2)),
    "star with a ridge": (
        with_ridge(ensemble_of(PULLED, 0.25, (0.15, 12.0), 0.9, region=Star(4)), -0.55, 1.25),
        rung_of(1.0, 12.0, (1.0, 6.0), 0.1, ridge=0.7),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rescales"),
    [(name, False) for name in TARGETS]
    + [(name, True) for name in ("bent and quartic behind a wall", "box behind a wall", "star with a ridge")],
)
def test_moves_leave_the_ensemble_as_it_is(name, rescales):
    """Long runs against quadrature, three seeds; with changes of the leaves' scales between trajectories or without."""
    ensemble, rung = TARGETS[name]
    frame, cutoff = ensemble.frame, float(ensemble.cutoff)
    cost_at, log_density = energy(ensemble, rung)
    at = (0.1, 0.4, 1.5)

    def inside(x, y, _):
        fits = cost_at(x, y) <= cutoff
        if frame.walls is not None:
            low, high = jax.tree.leaves(frame.walls.low), jax.tree.leaves(frame.walls.high)
            fits &= (x >= low[0]) & (x <= high[0]) & (y >= low[1]) & (y <= high[1])
        if frame.ball is not None:
            c = [float(part) for part in jax.tree.leaves(frame.ball.centre)]
            fits &= (x + c[0]) ** 2 + (y + c[1]) ** 2 <= float(frame.ball.radius) ** 2
        if isinstance(ensemble.region, Star):
            checks = ensemble.region.num_checks
            for k in range(1, checks):
                fits &= cost_at(k / checks * x, k / checks * y) <= cutoff
        return fits

    truth = grid_truth(log_density, inside, 6.0, at)
    for seed in range(3):
        cost, d, info, fits = seen = walk(ensemble, rung, jax.random.key(seed), PLAIN, rescales)
        assert np.all(fits)
        agree(seen, truth, at, 0.05)
        assert np.mean(info.acceptance) > 0.3
        assert np.sum(info.non_finite) == 0
        felt = np.mean(info.bounces)
        assert (felt > 0.05) == (name != "box")
        twin = log_density(*(np.asarray(x, np.float64) for x in jax.tree.leaves(d)))[1]
        np.testing.assert_allclose(cost, twin, rtol=1e-4, atol=1e-5)
        if name == "box":
            low, high = (np.array(jax.tree.leaves(wall)) for wall in (frame.walls.low, frame.walls.high))
            near = [np.mean((x < lo + 0.05) | (x > hi - 0.05)) for x, lo, hi in zip(d.values(), low, high, strict=True)]
            assert min(near) > 0.01
        if name.startswith("star"):
            outside = ~np.asarray(info.inside)
            assert np.mean(outside) > 0.01


LEAVES = {"a": jnp.full(3, 0.4), "b": jnp.full((2, 2), -0.3), "c": jnp.float32(1.0)}


@on_host
def rescale_often(ensemble, rung, key, draws, moves):
    """Exact draws of the reference, and where so many changes of their scales have taken them."""

    def start(key):
        return ensemble.position(ensemble.frame.draw_reference(key, jnp.float32(rung.precision)))

    def go_on(key, position):
        def move(m, position):
            with jax.enable_x64(False):
                move_key = jax.random.fold_in(key, m)
            return rescaled(ensemble, rung, move_key, position)

        return jax.lax.fori_loop(0, moves, move, position)

    with jax.enable_x64(False):
        starts, others = jax.random.split(key, (2, draws))
    with jax.enable_x64(True):
        before = jax.vmap(start)(starts)
        return before, jax.vmap(go_on)(others, before)


def test_leaves_that_change_their_scales_keep_their_gaussian():
    """Leaves of several sizes, of a prior that pulls.

    Mutations: the Jacobian left out, of the wrong sign or of one leaf, a move that never happens.
    """
    prior = Gaussian(jax.tree.map(lambda x: jnp.float32(0.5 + 0.3 * x.size), LEAVES), 0.1)
    ensemble = Ensemble(lambda w: 0.0 * jnp.sum(w["a"]), frame_of(prior, LEAVES), number(1.0), Connected(), False)
    rung = rung_of(precision=2.5, beta=0.0, masses=(1.0, 1.0, 1.0))
    for seed in range(3):
        before, after = rescale_often(ensemble, rung, jax.random.key(seed), 20_000, 10)
        for name in LEAVES:
            old, new = (position.displacement[name].reshape(20_000, -1) for position in (before, after))
            assert np.mean(np.any(old != new, axis=1)) > 0.5
            for power in (1, 2):
                change = np.mean(new.astype(float) ** power - old.astype(float) ** power, axis=1)
                assert abs(change.mean()) <= 4.0 * change.std() / np.sqrt(len(change)), (name, power)
                assert change.std() < 5.0


class OnVector(eqx.Module):
    """The valley on a vector of two."""

    valley: Valley

    def __call__(self, w):
        return self.valley({"u": w[0], "v": w[1]})


@pytest.mark.slow
def test_a_turned_metric_leaves_the_ensemble_as_it_is():
    """Oblique axes of unequal masses, behind a wall. Mutations: a slope not turned, a place not restored."""
    apart, rung = TARGETS["bent and quartic behind a wall"]
    vector = jnp.stack(list(ANCHOR.values()))
    prior = Gaussian(0.8, jnp.array([0.1, -1.0]))
    ensemble = eqx.tree_at(lambda e: (e.cost, e.frame), apart, (OnVector(apart.cost), frame_of(prior, vector)))
    turn = jnp.array([[0.8, -0.6], [0.6, 0.8]], jnp.float32)
    curvature = [jnp.array([0.2, 6.0], jnp.float32)]
    metric = Metric([None], [turn], curvature, jnp.float32(1.5), jnp.float32(1.0), jnp.full(1, jnp.nan, jnp.float32))
    rung = eqx.tree_at(lambda r: r.masses, rung, rung.masses[:1])
    at = (0.1, 0.4, 1.5)
    truth = grid_truth(energy(apart, rung)[1], lambda x, y, cost: cost <= 1.0, 6.0, at)
    for seed in range(3):
        cost, d, info, fits = walk(ensemble, rung, jax.random.key(seed), metric)
        assert np.all(fits) and np.mean(info.acceptance) > 0.3 and np.mean(info.bounces) > 0.05
        agree((cost, {"u": d[..., 0], "v": d[..., 1]}), truth, at, 0.05)


@pytest.mark.slow
def test_moves_agree_with_blackjax():
    """A quartic in two coordinates without a wall."""
    blackjax = pytest.importorskip("blackjax")
    ensemble, rung = ensemble_of(PULLED, 1e6, quartic=0.7), rung_of(1.3, 1.2, step_size=0.25, num_steps=8)
    pull = jnp.stack(jax.tree.leaves(ensemble.frame.pull))

    def log_density(d):
        cost = ensemble.cost(ensemble.frame.params({"u": d[0], "v": d[1]}))
        return -1.2 * cost - 0.65 * jnp.sum(d**2) - jnp.sum(pull * d)

    theirs = blackjax.hmc(log_density, step_size=0.25, inverse_mass_matrix=jnp.ones(2), num_integration_steps=8)

    @jax.jit
    def sample(key):
        def advance(state, keys):
            state, _ = jax.vmap(theirs.step)(keys, state)
            d = state.position
            cost = jax.vmap(lambda d: ensemble.cost(ensemble.frame.params({"u": d[0], "v": d[1]})))(d)
            return state, (cost, jnp.sum(d**2, axis=1))

        start = jax.vmap(theirs.init)(jnp.zeros((CHAINS, 2)))
        return jax.lax.scan(advance, start, jax.random.split(key, (SETTLING + DRAWS, CHAINS)))[1]

    at = (0.1, 0.4, 1.5)
    truth = grid_truth(energy(ensemble, rung)[1], lambda x, y, cost: cost < 1e6, 6.0, at)
    for seed in range(3):
        cost, d, _, _ = seen = walk(ensemble, rung, jax.random.key(seed))
        agree(seen, truth, at, 0.05)
        square = np.asarray(d["u"]) ** 2 + np.asarray(d["v"]) ** 2
        for mine, other in zip((cost, square), sample(jax.random.key(100 + seed)), strict=True):
            mine, other = (np.asarray(x, np.float64)[SETTLING:].mean(0) for x in (mine, other))
            error = np.hypot(mine.std(ddof=1), other.std(ddof=1)) / np.sqrt(CHAINS)
            assert abs(mine.mean() - other.mean()) <= 4 * error and error < 0.05 * mine.mean()


@on_host
def strides(ensemble, rung, keys, displacement):
    """One trajectory for each key, all from one place."""
    init, step = hmc(ensemble, rung, PLAIN)
    with jax.enable_x64(True):
        start = init(displacement)
        return start, *jax.vmap(lambda key: step(key, start))(keys)


KEYS = jax.random.split(jax.random.key(7), 400)
HERE = {"u": jnp.float32(0.4), "v": jnp.float32(-0.3)}


def test_the_energy_error_falls_with_the_square_of_the_step():
    ensemble = ensemble_of(PULLED, 1e6, quartic=0.5)

    def error(step_size, num_steps):
        rung = rung_of(2.0, 1.0, (1.0, 2.0), step_size, 0.0, num_steps)
        return -np.log(np.asarray(strides(ensemble, rung, KEYS, HERE)[2].acceptance)).sum()

    coarse, middle, fine = error(0.2, 4), error(0.1, 8), error(0.05, 16)
    assert coarse > 1.0
    assert 3.3 < coarse / middle < 4.8 and 3.6 < middle / fine < 4.4


@pytest.mark.parametrize("step_size", [0.1, 1.0, 20.0])
def test_the_gaussian_part_is_exact_at_any_step(step_size):
    ensemble = ensemble_of(PULLED, 1e6)
    rung = rung_of(37.0, 0.0, (10.0, 40.0), step_size, 0.0, 6)
    start, moved, info = strides(ensemble, rung, KEYS, HERE)
    assert np.min(info.acceptance) > 1 - 1e-5
    assert np.all(info.inside) and not np.any(info.bounces)
    # Where it goes is a matter of angle and of launch, not of the start: the orbit about −b/a goes round.
    x = np.asarray(moved.displacement["u"])
    assert np.std(x) > 0.05 and start.displacement["u"].shape == ()


def test_the_number_of_steps_can_be_given():
    ensemble, rung = ensemble_of(PULLED, 1e6), rung_of(2.0, 1.0, num_steps=3)
    init, step = hmc(ensemble, rung, PLAIN)
    once = eqx.filter_jit(lambda n: step(KEYS[0], init(HERE), n)[0].displacement)
    by_default = eqx.filter_jit(lambda: step(KEYS[0], init(HERE))[0].displacement)()
    assert float(once(jnp.int32(3))["u"]) == float(by_default["u"]) != float(once(jnp.int32(4))["u"])


def test_steps_are_jittered_and_spread():
    """With one step at β = 0 and unit masses the orbit's angle is the step: its cosine times the start is the mean."""
    ensemble = ensemble_of(Gaussian(1.0, ANCHOR), 1e6)
    assert 0.0 < JITTER < 0.5
    for spread in (0.0, 2.0):
        rung = rung_of(1e-6, 0.0, (1.0, 1.0), 1e-2, spread, 1)
        moved = strides(ensemble, rung, KEYS, HERE)[1].displacement
        speed = np.hypot(np.asarray(moved["u"]) - 0.4, np.asarray(moved["v"]) + 0.3) / 1e-2
        # |velocity|² of two coordinates has mean 2, times the mean square of the step's factor.
        factor = 1.0 if spread == 0.0 else (1 - np.exp(-2 * spread)) / (2 * spread)
        expected = 2.0 * (1 + JITTER**2 / 3) * factor
        assert abs(np.mean(speed**2) - expected) < 4 * np.std(speed**2) / 20


def test_virials_are_measured_where_the_chain_stands():
    """Of each leaf, plain; a leaf of one coordinate is as soft as its mean. So few coordinates do not slide."""
    ensemble = ensemble_of(PULLED, 1.0, bend=0.5)
    _, moved, _ = strides(ensemble, rung_of(1.0, 1.0, step_size=0.6), KEYS, HERE)
    d = jax.tree.map(lambda x: x[:20], moved.displacement)
    _, slope = jax.vmap(lambda x: ensemble.slope(x, jnp.float32(0.0)))(d)
    expected = np.stack([d[k] * np.asarray(slope[k]) for k in d], axis=1)
    for row in (0, 1):
        np.testing.assert_allclose(moved.virials[:20, row], expected, atol=1e-4)
    assert np.all(moved.virials[:, 2:] == 0.0)
    stayed = np.asarray(moved.displacement["u"][:20]) == 0.4
    assert 0 < stayed.sum() < 20


def test_many_coordinates_slide_against_the_pull_as_far_as_the_cost_lets_them(monkeypatch):
    """By b/a times the square of the tether's share a/(a + βc), and by b/a alone."""
    monkeypatch.setattr(ensemble_module, "CHEAP", 1)
    ensemble = ensemble_of(PULLED, 1.0)
    metric = eqx.tree_at(lambda m: m.curvature, PLAIN, [jnp.full(x.shape, 3.0) for x in PLAIN.curvature])
    ones = jax.tree.map(jnp.ones_like, HERE)
    plain, softened, slid, freely = ensemble.fields(metric, ones, (jnp.float32(2.0), jnp.float32(4.0)), HERE)
    assert plain is HERE and softened.keys() == HERE.keys()
    for name, value in slid.items():
        np.testing.assert_allclose(value, -0.5 * ensemble.frame.pull[name] * (2.0 / 14.0) ** 2, rtol=1e-6)
        np.testing.assert_allclose(freely[name], -0.5 * ensemble.frame.pull[name], rtol=1e-6)
    assert abs(float(slid["u"])) > 1e-4


@pytest.mark.parametrize("num_steps", [1, 12])
def test_trajectories_that_meet_no_number_are_rejected_and_counted(num_steps):
    ensemble = ensemble_of(PULLED, 1e6, fence=0.45)
    start, moved, info = strides(ensemble, rung_of(1.0, 0.1, num_steps=num_steps), KEYS, HERE)
    met = np.asarray(info.non_finite) > 0
    assert 0.1 < np.mean(met) < 1.0
    assert not np.any(np.asarray(info.inside)[met]) and not np.any(np.asarray(info.acceptance)[met])
    assert np.all(np.asarray(moved.displacement["u"])[met] == 0.4)
    assert np.all(np.asarray(moved.cost)[met] == float(start.cost))
    assert np.all(np.isfinite(moved.cost)) and np.any(np.asarray(info.acceptance)[~met] > 0.5)


def test_an_end_outside_is_rejected_and_a_point_outside_on_the_way_is_not():
    ensemble = ensemble_of(PULLED, 0.4)
    _, moved, info = strides(ensemble, rung_of(1.0, 1.0, step_size=0.5, num_steps=1), KEYS, HERE)
    out = np.asarray(info.bounces) > 0
    assert 0.05 < np.mean(out) < 0.95 and not np.any(np.asarray(info.inside)[out])
    assert np.all(np.asarray(moved.displacement["u"])[out] == 0.4) and np.all(moved.cost <= 0.4)
    _, moved, info = strides(ensemble, rung_of(1.0, 1.0, step_size=0.2, num_steps=8), KEYS, HERE)
    bounced = np.asarray(info.bounces) > 0
    assert np.mean(np.asarray(info.inside)[bounced]) > 0.3


@pytest.mark.parametrize(
    "ensemble", [ensemble_of(PULLED, 0.4), ensemble_of(BALLED, 1e3, (0.0, 0.0))], ids=["cutoff", "ball"]
)
def test_nothing_but_the_reflection_turns_a_trajectory_back(ensemble):
    """Without the cost's kicks. Mutations: no reflection, or one about a slope that vanishes outside the ball."""
    rung = rung_of(0.7, 0.0, step_size=0.2, num_steps=8)
    _, _, info = strides(ensemble, rung, KEYS, {"u": jnp.float32(0.1), "v": jnp.float32(-0.1)})
    bounced = info.bounces > 0
    assert np.mean(bounced) > 0.1 and np.mean(info.inside[bounced]) > 0.5
