"""What an estimate says of itself: texts with remedies, flat dictionaries, trees for xarray, and its life as a pytree.

Mutations these catch: a bound printed as an equality, counts by position instead of by status, a remark without its
remedy.
"""

import dataclasses
import json
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from volumejax.results import BoundKind, Kind, Status, VolumeEstimate, last_estimate, to_host

LOG_WEIGHTS = np.linspace(-101.0, -99.0, 40)


@pytest.fixture
def settled(make_estimate):
    return make_estimate(LOG_WEIGHTS, settled=True)


@pytest.fixture
def bound(make_estimate):
    return make_estimate(LOG_WEIGHTS)


def replaced(estimate, **values):
    """The estimate with other leaves, of the same dtypes."""
    names = tuple(values)
    where = lambda e: [getattr(e, name) for name in names]
    return eqx.tree_at(where, estimate, [np.asarray(v, getattr(estimate, k).dtype) for k, v in values.items()])


def test_units(settled):
    assert math.isclose(float(settled.bits), -float(settled.log_mass) / math.log(2), rel_tol=1e-6)
    assert math.isclose(10 ** float(settled.log10), math.exp(float(settled.log_mass)), rel_tol=1e-3)


def test_an_estimate_without_trouble_is_ok(settled):
    assert settled.status == "ok"
    assert settled.counts == {"converged": 40}


def test_a_bound_says_what_would_help(bound):
    assert bound.status.startswith("a lower bound: a few of 40 rays carry the weight (ESS 1.0, k-hat inf)")
    assert "a proposal closer to the region's shape helps" in bound.status


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (Status.NOISE_LIMITED, ("3 of 40 radii are limited by the cost's rounding", "raise the cutoff")),
        (Status.NON_FINITE, ("3 of 40 rays end where the cost is NaN or infinite",)),
        (Status.UNRESOLVED, ("3 of 40 rays used up their evaluations", "raise max_evaluations")),
    ],
)
def test_trouble_of_single_rays_is_counted_and_has_a_remedy(make_estimate, status, words):
    estimate = make_estimate(LOG_WEIGHTS, status=[int(status)] * 3 + [0] * 37, settled=True)
    assert estimate.counts == {"converged": 37, status.name.lower(): 3}
    assert all(word in estimate.status for word in words)
    assert estimate.to_dict()[f"rays_{status.name.lower()}"] == 3


@pytest.mark.parametrize("status", [Status.NEVER_CROSSES, Status.NON_MONOTONE, Status.NEVER_INSIDE])
def test_what_needs_no_remedy_is_only_counted(make_estimate, status):
    estimate = make_estimate(LOG_WEIGHTS, status=[0] * 30 + [int(status)] * 10, settled=True)
    assert estimate.counts == {"converged": 30, status.name.lower(): 10}
    assert estimate.status == "ok"


def test_no_volume_at_all(make_estimate):
    estimate = make_estimate(np.full(40, -np.inf), status=[int(Status.NEVER_INSIDE)] * 40)
    assert "no ray found volume" in estimate.status and "raise the cutoff" in estimate.status
    assert float(estimate.log_mass) == -np.inf
    assert "-inf" in estimate.summary()
    assert estimate.to_dict()["bits"] == math.inf


def test_an_infinite_volume_says_why(settled):
    assert "use a proper prior" in replaced(settled, log_mass=np.inf).status


def test_violations_are_reported_as_a_share_of_the_audited(settled):
    assert math.isnan(settled.violation_rate)
    audited = np.arange(40) % 4 == 0
    trace = dataclasses.replace(
        settled.trace, audited=audited, violated=np.arange(40) == 8, audit_evaluations=32 * audited
    )
    estimate = dataclasses.replace(settled, trace=trace)
    assert estimate.violation_rate == 0.1
    assert "10.0 % of audited rays had left the region" in estimate.status and "audit_fraction=1" in estimate.status
    # Six for each ray of the fixture, none for its scouts, and the audit's.
    assert estimate.evaluations == 40 * 6 + 10 * 32 == settled.evaluations + 320


def test_several_remarks_stand_side_by_side(make_estimate):
    estimate = make_estimate(LOG_WEIGHTS, status=[1, 3, 6] + [0] * 37)
    assert estimate.status.count("; ") >= 3


def test_summary_of_an_estimate(settled):
    lines = settled.summary().splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(f"log mass = {float(settled.log_mass):.2f} ± 0.25 nats, in [")
    assert lines[0].endswith("[star region]")
    assert "prior term -65.20" in lines[1] and "bits" in lines[1]
    assert "40 rays" in lines[2] and "ESS 20.0" in lines[2] and "240 evaluations" in lines[2]
    assert lines[3] == "  status: ok"


def test_summary_of_a_bound_never_states_an_equality(bound):
    first = bound.summary().splitlines()[0]
    assert first.startswith(f"log mass ≥ {float(bound.lower):.2f} nats (95 %)")
    assert " = " not in first and "±" not in first


def test_dictionaries_are_flat_and_survive_json(settled, bound):
    for estimate in (settled, bound):
        flat = estimate.to_dict()
        assert all(type(value) in (float, int, str, bool) for value in flat.values())
        again = json.loads(json.dumps(flat))
        assert [k for k in flat if again[k] != flat[k] and not math.isnan(flat[k])] == []
    assert (settled.to_dict()["kind"], bound.to_dict()["kind"]) == ("estimate", "lower_bound")
    flat = settled.to_dict()
    assert (flat["region"], flat["num_rays"], flat["bound_kind"], flat["rays_converged"]) == (
        "star",
        40,
        "certified",
        40,
    )
    assert flat["log_mass"] == float(settled.log_mass) and flat["std_error"] == 0.25


def test_every_kind_has_a_name(settled):
    for kind in Kind:
        assert replaced(settled, kind=int(kind)).to_dict()["kind"] == kind.name.lower()
    for kind in BoundKind:
        assert replaced(settled, bound_kind=int(kind)).to_dict()["bound_kind"] == kind.name.lower()


def test_an_estimate_without_a_trace(settled):
    estimate = dataclasses.replace(settled, trace=None)
    assert estimate.counts == {} and math.isnan(estimate.violation_rate) and estimate.status == "ok"
    assert estimate.evaluations == 0 and len(estimate.summary().splitlines()) == 4
    json.dumps(estimate.to_dict())


def test_datatree(settled):
    pytest.importorskip("xarray")
    root = settled.to_datatree()
    assert float(root["log_mass"]) == float(settled.log_mass)
    assert root.attrs["status"] == "ok" and root.attrs["region"] == "star"
    assert root["trace"].sizes == {"rays": 40}
    np.testing.assert_array_equal(root["trace"]["log_weight"], settled.trace.log_weight)
    assert set(root["trace"].data_vars) == {field.name for field in dataclasses.fields(settled.trace)}
    assert "trace" not in dataclasses.replace(settled, trace=None).to_datatree().children


def test_an_estimate_passes_through_jit_vmap_and_tree_maps(settled, bound):
    @jax.jit
    def shift(estimate, by):
        return eqx.tree_at(lambda e: e.log_mass, estimate, estimate.log_mass + by)

    moved = shift(settled, 1.0)
    assert isinstance(moved, VolumeEstimate) and (moved.num_rays, moved.region) == (40, "star")
    assert math.isclose(float(moved.log_mass), float(settled.log_mass) + 1.0, rel_tol=1e-6)
    assert moved.status == "ok" and moved.summary() != settled.summary()

    pair = jax.tree.map(lambda a, b: jnp.stack([a, b]), settled, bound)
    both = jax.vmap(shift)(pair, jnp.array([0.0, 2.0]))
    assert both.log_mass.shape == (2,) and both.trace.log_weight.shape == (2, 40)
    second = to_host(jax.tree.map(lambda leaf: leaf[1], both))
    assert math.isclose(float(second.log_mass), float(bound.log_mass) + 2.0, rel_tol=1e-6)
    assert second.status == bound.status


def test_host_leaves_keep_float64():
    with jax.enable_x64(True):
        value = jnp.float64(1.0) / 3.0
    host = to_host({"a": value, "b": jnp.ones(2)})
    assert isinstance(host["a"], np.ndarray) and host["a"] == 1.0 / 3.0 and host["a"].dtype == np.float64
    assert host["b"].dtype == np.float32


def test_the_last_of_a_stream(settled, bound):
    def stopped(*estimates):
        yield from estimates
        raise KeyboardInterrupt

    assert last_estimate(iter([bound, settled])) is settled
    assert last_estimate(stopped(settled, bound)) is bound
    with pytest.raises(KeyboardInterrupt):
        last_estimate(stopped())
    with pytest.raises(RuntimeError, match="without an estimate"):
        last_estimate(iter([]))


def test_passes_of_a_few_chains_go_without_r_hat(settled, make_trace):
    few = dataclasses.replace(
        settled, trace=make_trace(r_hat=np.full(4, np.nan)), kind=np.asarray(Kind.NOT_MIXED, np.int32)
    )
    many = dataclasses.replace(few, trace=make_trace())
    assert "R-hat" not in few.summary()
    assert many.summary().count("max R-hat 1.20") == 2


def test_a_pass_that_lost_every_chain_is_named(settled, make_trace):
    for lost, words in (
        ([np.nan, -3.0], "cooling lost every chain at the wall and heating says -3.00"),
        ([-3.0, np.inf], "cooling says -3.00 and heating lost every chain at the wall"),
    ):
        estimate = dataclasses.replace(
            settled, trace=make_trace(), kind=np.asarray(Kind.NOT_MIXED, np.int32), hysteresis=np.array(lost)
        )
        assert f"not mixed: {words}" in estimate.status
        assert "nan" not in estimate.summary() and "lost every chain" in estimate.summary()


def test_a_bound_says_whether_the_run_has_ended(settled, make_trace):
    def stopped(progress):
        kind, nothing = np.asarray(Kind.LOWER_BOUND, np.int32), np.full(2, np.nan)
        trace = make_trace(progress=np.array(progress), overlap=np.full(3, np.nan))
        return dataclasses.replace(settled, trace=trace, kind=kind, hysteresis=nothing)

    assert "has not ended" in stopped(0.5).status and "lost" not in stopped(0.5).summary()
    assert "lost" in stopped(1.0).status and "has not ended" not in stopped(1.0).summary()
    assert "overlap nan" not in stopped(0.5).summary() and "cooling has not ended" in stopped(0.5).summary()


def test_an_unmixed_run_gives_its_bound_and_calls_the_joint_estimate_by_its_name(settled, make_trace):
    kind, passes = np.asarray(Kind.NOT_MIXED, np.int32), np.array([-9.0, 3.0])
    values = {"log_mass": np.asarray(1.5), "lower": np.asarray(-10.0), "upper": np.asarray(0.0)}
    values["prior_term"] = np.asarray(-2.0)
    mixed = dataclasses.replace(settled, trace=make_trace(), kind=kind, hysteresis=passes, **values)
    first, terms = mixed.summary().splitlines()[:2]
    assert first.startswith("log mass ≥ -10.00 nats") and "not to be quoted, 1.50" in first
    assert terms.strip() == "prior term -2.00, volume term ≥ -8.00, at most 14.4 bits"
    assert "above what a probability can be" in mixed.status
    held = dataclasses.replace(mixed, trace=make_trace(standstill=np.array(0.1)))
    assert "stood still" in held.status and held.status.count("raise effort") == 1
    below = dataclasses.replace(mixed, log_mass=np.asarray(-1.0))
    assert "above what" not in below.status


def test_a_printed_estimate_is_its_summary_unless_it_is_traced(settled):
    assert str(settled) == settled.summary()
    seen = []
    jax.jit(lambda x: seen.append(str(dataclasses.replace(settled, log_mass=x))))(1.0)
    assert seen[0].startswith("VolumeEstimate(")


def test_terms_are_left_out_where_there_is_no_anchor(settled):
    nan = np.asarray(np.nan)
    whole = dataclasses.replace(settled, log_mass=np.asarray(0.0), prior_term=nan, volume_term=nan)
    assert "prior term" not in whole.summary() and "  0.0 bits" in whole.summary()
    nothing = dataclasses.replace(settled, log_mass=np.asarray(-np.inf))
    assert "inf bits" not in nothing.summary() and "no finite number of bits" in nothing.summary()
