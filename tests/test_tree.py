"""A pytree as a vector, against float64 NumPy.

Mutations these catch: products or scale rounded to float32, the sum in float32, one key for all leaves, the leaf's
dtype lost, uniform draws for normal ones, points of a ball crowded at its centre.
"""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from volumejax import tree

LARGE = {"a": (1000, 700), "b": [(500_000,), ()]}
SMALL = {"w": jnp.ones((2, 3)), "b": [jnp.zeros(3), jnp.ones(())]}
AXPY, NORMAL_LIKE = jax.jit(tree.axpy), jax.jit(tree.normal_like)


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def large(seed):
    """1.2 million float32 numbers on the host."""
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)
    return jax.tree.map(lambda shape: rng.normal(size=shape).astype(np.float32), LARGE, is_leaf=is_shape)


def wide(number):
    with jax.enable_x64(True):
        return jnp.float64(number)


def flat(vector):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(vector)]).astype(np.float64)


def test_size():
    assert tree.size(SMALL) == 10
    assert tree.size(jnp.ones(())) == 1
    assert tree.size({}) == 0
    assert tree.size(jax.eval_shape(lambda: jnp.zeros((30_000, 100_000)))) == 3 * 10**9


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dot_of_a_million_is_exact(seed):
    a, b = large(seed), large(seed + 10)
    got = tree.dot(a, b)
    assert got.dtype == jnp.float64 and got.shape == ()
    # Products of two float32 numbers are exact in float64, and fsum adds them exactly.
    terms = flat(a) * flat(b)
    assert abs(float(got) - math.fsum(terms)) <= 1e-14 * np.abs(terms).sum()


def test_products_with_a_common_rounding_error_do_not_drift():
    """0.1² in float32 is off by 4e-9 in every term: 0.05 in the sum of these."""
    a = jax.tree.map(lambda x: np.full_like(x, 0.1), large(0))
    value = float(np.float32(0.1))
    assert abs(float(tree.dot(a, a)) - 1_200_001 * value * value) < 1e-9


def test_dot_of_half_precision_is_taken_in_float64():
    x = jnp.full(4096, 1.0078125, jnp.bfloat16)
    assert float(tree.dot({"x": x}, {"x": x})) == 4096 * 1.0078125**2
    assert float(tree.dot({"x": x}, {"x": jnp.full(4096, 3.0, jnp.float32)})) == 4096 * 3.0234375


def test_dot_under_jit_and_vmap():
    a = jnp.arange(12, dtype=jnp.float32).reshape(4, 3)
    each = np.asarray(jax.jit(jax.vmap(tree.dot))({"x": a}, {"x": a}))
    assert each.dtype == np.float64 and np.array_equal(each, (np.arange(12).reshape(4, 3) ** 2).sum(1))
    assert float(tree.dot({}, {})) == 0.0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_axpy_rounds_once(seed):
    origin, direction = large(seed), large(seed + 10)
    moved = AXPY(wide(math.pi), direction, origin)
    assert [leaf.dtype for leaf in jax.tree.leaves(moved)] == [jnp.float32] * 3
    truth = (flat(origin) + math.pi * flat(direction)).astype(np.float32)
    # A fused multiply-add may settle a float64 tie the other way; float32 arithmetic differs in many entries.
    assert np.mean(flat(moved) != truth) < 1e-5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_axpy_does_not_stretch_the_step(seed):
    """A scale rounded to float32 stretches all 1.2 million coordinates alike: 0.036 nats of volume for 1/3."""
    direction = large(seed)
    moved = flat(AXPY(wide(1.0 / 3.0), direction, jax.tree.map(np.zeros_like, direction)))
    stretch = moved @ flat(direction) / (flat(direction) @ flat(direction)) * 3.0 - 1.0
    assert 1_200_001 * abs(stretch) < 1e-3


def test_axpy_keeps_the_dtype_of_every_leaf_of_the_origin():
    origin = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3, jnp.float16), "c": jnp.ones(3, jnp.float32)}
    direction = jax.tree.map(lambda x: jnp.full(3, 0.5, jnp.float32), origin)
    moved = tree.axpy(0.25, direction, origin)
    for name, leaf in moved.items():
        assert leaf.dtype == origin[name].dtype
        assert np.array_equal(leaf.astype(jnp.float32), np.full(3, 1.125))


FIVE = hnp.arrays(np.float32, 5, elements=st.floats(-1e6, 1e6, width=32))


@hypothesis.given(FIVE, FIVE, st.floats(-100.0, 100.0))
def test_dot_and_axpy_agree_with_numpy(a, b, scale):
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    got = float(tree.dot({"x": a}, {"x": b}))
    assert abs(got - math.fsum(wide_a * wide_b)) <= 1e-15 * np.abs(wide_a * wide_b).sum()
    assert got == float(tree.dot({"x": b}, {"x": a}))
    moved = np.asarray(AXPY(wide(scale), {"x": a}, {"x": b})["x"])
    truth = wide_b + scale * wide_a
    assert np.all(
        np.abs(moved - truth) <= 2.0**-24 * np.abs(truth) + 1e-15 * (np.abs(wide_b) + 1e2 * np.abs(wide_a)) + 1e-45
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_draws_are_standard_normal(seed):
    """Mutations: uniforms of variance 1 (kurtosis 1.8), a scale off by 1 %."""
    draw = NORMAL_LIKE(jax.random.key(seed), large(0))
    x = flat(draw)
    n = x.size
    for moment, truth, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        error = math.sqrt(variance / n)
        assert error < 0.01 and abs(np.mean(x**moment) - truth) <= 4 * error
    assert stats.kstest(x[:100_000], "norm").statistic < 1.95 / math.sqrt(100_000)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_leaves_and_keys_are_independent(seed):
    """Mutation: the same key for every leaf makes the correlation 1."""
    like = {"a": jnp.zeros(50_000), "b": jnp.zeros(50_000)}
    here = NORMAL_LIKE(jax.random.key(seed), like)
    there = NORMAL_LIKE(jax.random.key(seed + 100), like)
    for x, y in ((here["a"], here["b"]), (here["a"], there["a"]), (here["a"], there["b"])):
        assert abs(np.mean(np.asarray(x) * np.asarray(y))) <= 4 / math.sqrt(50_000)


def test_a_draw_depends_on_key_shape_and_position_alone():
    key = jax.random.key(7)
    draw = tree.normal_like(key, SMALL)
    assert jax.tree.structure(draw) == jax.tree.structure(SMALL)
    halves = tree.normal_like(key, jax.tree.map(lambda x: x.astype(jnp.bfloat16), SMALL))
    mapped = jax.jit(jax.vmap(lambda key: tree.normal_like(key, SMALL)))(jax.random.split(key, 3))
    alone = tree.normal_like(jax.random.split(key, 3)[1], SMALL)
    for leaf, other, one, many in zip(*map(jax.tree.leaves, (draw, halves, alone, mapped)), strict=True):
        assert leaf.dtype == jnp.float32
        assert np.array_equal(leaf, other)
        assert np.array_equal(one, many[1])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_uniform_draws(seed):
    """Mutations: one key for all leaves, the interval [−1, 1)."""
    like = {"a": jnp.zeros((100, 500), jnp.bfloat16), "b": jnp.zeros(50_000)}
    draw = tree.uniform_like(jax.random.key(seed), like)
    assert jax.tree.map(jnp.shape, draw) == jax.tree.map(jnp.shape, like)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(draw))
    assert stats.kstest(flat(draw), "uniform").statistic < 1.95 / math.sqrt(100_000)
    assert abs(np.corrcoef(np.ravel(draw["a"]), draw["b"])[0, 1]) <= 4 / math.sqrt(50_000)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_draws_from_the_unit_ball(seed):
    """Mutations: the surface alone, a radius that is uniform, the power of D + 1: |x|^D is uniform."""
    like = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    keys = jax.random.split(jax.random.key(seed), 4000)
    direction, factor = jax.jit(jax.vmap(lambda key: tree.unit_ball_like(key, like)))(keys)
    assert factor.dtype == jnp.float64
    points = np.asarray(factor)[:, None] * np.concatenate([direction["a"], direction["b"]], axis=1)
    assert stats.kstest(np.linalg.norm(points, axis=1) ** 5, "uniform").statistic < 1.95 / math.sqrt(4000)
    assert np.all(np.abs(np.mean(points, axis=0)) <= 4 * np.std(points, axis=0) / math.sqrt(4000))


def test_scalars_and_matching_trees_broadcast():
    assert tree.broadcast_to(0.5, SMALL, "sigma") == {"w": 0.5, "b": [0.5, 0.5]}
    matching = {"w": jnp.ones((2, 3)), "b": [2.0, jnp.ones(())]}
    assert tree.broadcast_to(matching, SMALL, "sigma") is matching
    assert tree.broadcast_to(3.0, jnp.ones(4), "sigma") == 3.0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"w": 1.0}, "sigma is a pytree of another structure"),
        (jnp.ones(3), "sigma is a pytree of another structure"),
        (None, "sigma is a pytree of another structure"),
        (
            {"w": jnp.ones((3, 2)), "b": [1.0, 1.0]},
            r"sigma\['w'\] has shape \(3, 2\), the parameter there has shape \(2, 3\)",
        ),
        ({"w": 1.0, "b": [jnp.ones(1), 1.0]}, r"sigma\['b'\]\[0\] has shape \(1,\)"),
    ],
)
def test_what_does_not_fit_is_named(value, message):
    with pytest.raises(ValueError, match=message):
        tree.broadcast_to(value, SMALL, "sigma")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "params has no array leaves"),
        ({"a": [jnp.ones(2), jnp.arange(3)]}, r"params\['a'\]\[1\] has dtype int32, .*equinox.partition"),
        ({"a": jnp.ones(2, jnp.complex64)}, r"params\['a'\] has dtype complex64"),
        ({"a": 1.0}, r"params\['a'\] has float"),
        ({"a": jax.random.key(0)}, r"params\['a'\] has dtype key"),
    ],
)
def test_only_floating_leaves_pass(value, message):
    with pytest.raises(ValueError, match=message):
        tree.check_floating(value, "params")


def test_every_float_passes():
    tree.check_floating({"a": jnp.ones(1, jnp.bfloat16), "b": np.ones(1), "c": jnp.ones((), jnp.float16)}, "params")
