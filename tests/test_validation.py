"""What is refused before any long work, and in which words; and that nothing is asked of abstract values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from volumejax.priors import Gaussian, UniformBox
from volumejax.tree import is_traced
from volumejax.validation import check_deterministic, check_question

PARAMS = {"w": jnp.array([0.5, -0.5]), "b": jnp.array(0.25)}
PRIOR = Gaussian(1.0)


def cost(params):
    return 0.5 * jnp.sum((params["w"] - jnp.array([0.5, -0.5])) ** 2)


def shifted(by):
    return lambda params: cost(params) + by


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"cost": lambda p: p["w"]},
            r"cost must return one scalar in nats, got shape \(2,\); take the mean over examples",
        ),
        ({"cost": lambda p: (cost(p), p)}, "cost must return one scalar in nats, got tuple; drop auxiliary outputs"),
        ({"cost": lambda p: None}, "cost must return one scalar in nats, got NoneType"),
        (
            {"cost": lambda p: jnp.sum(p["w"] > 9)},
            "cost must return a floating-point scalar, got dtype int32; cast it to float32",
        ),
        ({"params": {"w": jnp.arange(2), "b": jnp.ones(())}}, r"params\['w'\] has dtype int32, .*equinox.partition"),
        ({"params": {}}, "params has no array leaves"),
        (
            {"params": {"w": jnp.array([0.5, jnp.nan]), "b": jnp.ones(())}},
            r"params\['w'\] contains NaN or infinity; .* checkpoint",
        ),
        ({"params": {"w": jnp.ones(2), "b": jnp.array(-jnp.inf)}}, r"params\['b'\] contains NaN or infinity"),
        ({"params": {"w": jnp.ones(2), "b": jnp.array(jnp.nan, jnp.bfloat16)}}, r"params\['b'\] contains NaN"),
        ({"cutoff": 0.0}, "cutoff must be a positive, finite number of nats, got 0.0"),
        ({"cutoff": -1e-2}, "cutoff must be a positive, finite number of nats, got -0.01"),
        ({"cutoff": float("nan")}, "cutoff must be a positive, finite number of nats, got nan"),
        ({"cutoff": float("inf")}, "cutoff must be a positive, finite"),
        ({"cutoff": jnp.ones(3)}, r"cutoff must be a scalar, got shape \(3,\); vmap over cutoffs instead"),
        (
            {"cost": shifted(0.5)},
            "the cost at the anchor is 0.5 nats, not within the cutoff 0.01; raise .* kl_to_anchor",
        ),
        ({"cost": shifted(jnp.nan)}, "the cost at the anchor is NaN; check the data"),
        ({"cost": shifted(jnp.inf)}, "the cost at the anchor is inf nats"),
        ({"prior": 0.5}, r"prior must be one such as vj.Gaussian\(sigma=0.5\) or vj.Lebesgue\(\), got float"),
        (
            {"cost": lambda p: float(np.sum(np.asarray(p["w"])))},
            r"the cost fails on parameters of shapes .*'w': \(2,\).*TracerArrayConversionError.*written with jax.numpy",
        ),
        ({"cost": lambda p: p["w"] @ jnp.ones(3)}, "the cost fails on parameters of shapes .*it must take such"),
        ({"prior": Gaussian}, "prior must be .*, got the class Gaussian"),
        ({"prior": Gaussian({"w": 1.0})}, "Gaussian sigma is a pytree of another structure"),
        ({"prior": UniformBox(0.0, 1.0)}, r"the anchor\['w'\] lies outside the UniformBox"),
    ],
)
def test_questions_that_make_no_sense(changed, message):
    question = {"cost": cost, "params": PARAMS, "prior": PRIOR, "cutoff": 0.01, **changed}
    with pytest.raises(ValueError, match=message):
        check_question(**question)


@pytest.mark.parametrize("cutoff", [0.01, 1, np.float64(1e-8), np.float32(0.5), jnp.float32(0.5)])
def test_questions_that_do(cutoff):
    assert check_question(cost, PARAMS, PRIOR, cutoff) == (PARAMS, cutoff)
    slightly_negative, _ = check_question(shifted(-1e-9), PARAMS, PRIOR, cutoff)
    assert jax.tree.structure(slightly_negative) == jax.tree.structure(PARAMS)


def test_an_anchor_at_the_cutoff_is_inside_whatever_the_precision():
    # 0.2 in float32 is above 0.2, and 0.3 in bfloat16 above 0.3.
    for value, dtype in ((0.2, jnp.float32), (0.3, jnp.bfloat16)):
        at = lambda p, value=value, dtype=dtype: jnp.asarray(value, dtype) + 0.0 * p["b"].astype(dtype)
        assert float(at(PARAMS)) > value
        assert check_question(at, PARAMS, PRIOR, value)[1] == float(at(PARAMS))
    assert check_question(cost, PARAMS, PRIOR, 0.01)[1] == 0.01


def test_numpy_parameters_become_jax_arrays():
    params, _ = check_question(cost, jax.tree.map(np.asarray, PARAMS), PRIOR, 0.01)
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_the_cost_at_the_cutoff_is_inside():
    check_question(shifted(0.5), PARAMS, PRIOR, 0.5)
    with pytest.raises(ValueError, match="not within the cutoff"):
        check_question(shifted(0.5), PARAMS, PRIOR, 0.4999)


def test_abstract_values_are_not_asked_for():
    """Under a trace only shapes and dtypes can be wrong."""

    @jax.jit
    def traced(params, cutoff, by):
        check_question(cost, params, PRIOR, cutoff)
        check_question(shifted(by), PARAMS, PRIOR, 0.01)  # traced by what it closes over
        check_question(cost, PARAMS, PRIOR, 0.01)
        with pytest.raises(ValueError, match="got shape"):
            check_question(lambda p: p["w"], params, PRIOR, cutoff)
        with pytest.raises(ValueError, match="int32"):
            check_question(cost, {"w": params["w"].astype(jnp.int32)}, PRIOR, cutoff)
        with pytest.raises(ValueError, match="contains NaN"):
            check_question(cost, {"w": np.float32([np.nan, 0.0]), "b": params["b"]}, PRIOR, cutoff)
        return cost(params)

    bad = jax.tree.map(lambda x: x * jnp.float32(jnp.nan), PARAMS)
    assert np.isnan(float(traced(bad, -1.0, 100.0)))


def test_what_counts_as_traced():
    assert not is_traced((1.0, np.ones(2), jnp.ones(2), None, cost))
    seen = []
    jax.jit(lambda x: seen.append((is_traced(x), is_traced({"a": [x, 1.0]}))) or x)(1.0)
    jax.vmap(lambda x: seen.append((is_traced(x), is_traced((cost, x)))) or x)(jnp.ones(2))
    assert seen == [(True, True), (True, True)]


def test_a_cost_that_changes_between_evaluations():
    draws = iter(range(10))

    def dropout(params):
        return cost(params) + 1e-6 * jax.random.normal(jax.random.key(next(draws)))

    with pytest.raises(ValueError, match=r"not deterministic: two evaluations at one point gave .* random keys"):
        check_deterministic(dropout, PARAMS)


def test_a_cost_that_is_deterministic_passes():
    check_deterministic(cost, PARAMS)
    check_deterministic(jax.jit(cost), PARAMS)
    # What is no number is no number twice, and the anchor itself is not looked at.
    check_deterministic(shifted(jnp.nan), PARAMS)
    seen = []
    check_deterministic(lambda p: jax.debug.callback(seen.append, p["b"]) or cost(p), PARAMS)
    jax.effects_barrier()
    assert len(seen) == 2 and np.isclose(float(seen[0]), 0.25125)


def test_half_precision_is_checked_in_its_own_dtype():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    check_deterministic(lambda p: jnp.sum(p["w"]) * p["b"], params)
