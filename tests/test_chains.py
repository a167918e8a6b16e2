"""The curve and the evidence of chains, by hand.

Mutations these catch: a slope against the cutoff instead of its log, NaN levels counted among the smallest, the
reference's own acceptance counted, a remark that always or never appears, axes of another length than their names.
"""

import dataclasses
import math

import equinox as eqx
import numpy as np
import pytest

from volumejax.chains import ChainTrace, Curve

LEVELS, CHAINS, TEMPERATURES = 4, 6, 3
EFFORT = "raise effort"
SEPARATE = "the chains stay in separate parts of the region (R-hat between them 7.2)"
MANY = {"log_weights": np.zeros(16)}
ACCEPTANCE = {"acceptance": np.array([[np.nan, 0.5, 0.03, 0.5]] * 2)}
COLDER = "β is 0.85 of the one at which the mean cost is the cutoff"


def test_the_slope_of_a_power_law_is_its_power():
    cutoffs = np.array([1e-3, 1e-2, 0.05, 2.0])
    curve = Curve(cutoffs, 4.5 * np.log(cutoffs) - 3.0, np.zeros(4))
    np.testing.assert_allclose(curve.slope, 4.5)
    bent = Curve(np.array([1.0, math.e, math.e**3]), np.array([0.0, 2.0, 3.0]), np.zeros(3))
    np.testing.assert_allclose(bent.slope, [2.0, 0.5])


def test_scalars_are_the_worst_levels(make_trace):
    assert make_trace().scalars() == {
        "num_chains": CHAINS,
        "gradients": 1200,
        "max_r_hat": 1.2,
        "separation": 1.1,
        "standstill": 0.01,
        "shortfall": 0.2,
        "leading": 0.1,
        "blocked": 0.0,
        "min_acceptance": pytest.approx(0.7),
        "min_overlap": 0.5,
        "integrated": -3.5,
        "non_finite": 0.0,
        "progress": 1.0,
    }


def test_the_reference_is_drawn_and_does_not_count_as_moves(make_trace):
    acceptance = np.full((2, LEVELS), 0.6)
    acceptance[:, 0], acceptance[1, 2] = 0.0, 0.3
    assert make_trace(acceptance=acceptance, **MANY).least_acceptance == 0.3


@pytest.mark.parametrize(("still", "least"), [(1, 0.525), (4, 0.3), (8, 0.0), (20, 0.0)])
def test_single_moves_of_few_chains_that_are_refused_do_not_count_as_standing_still(make_trace, still, least):
    """Of two chains, eight levels together are judged."""
    acceptance = np.full((2, 100), 0.6)
    acceptance[:, 0], acceptance[1, 50 : 50 + still] = np.nan, 0.0
    trace = eqx.tree_at(lambda t: t.acceptance, make_trace(log_weights=np.zeros(2)), acceptance)
    np.testing.assert_allclose(trace.least_acceptance, least, atol=1e-12)


def test_what_was_not_visited_is_nan(make_trace):
    empty = np.full((2, LEVELS), np.nan)
    trace = make_trace(acceptance=empty, overlap=empty[0, 1:], r_hat=empty[0])
    for value in (trace.least_acceptance, trace.least_overlap, trace.slowest):
        assert math.isnan(value)
    assert trace.remarks() == []


@pytest.mark.parametrize(
    ("fields", "words", "remedy"),
    [
        ({}, None, ""),
        ({"progress": np.array(0.37)}, "stopped at 37 % of the planned work", ""),
        ({"non_finite": np.array(0.004)}, "0.4 % of trajectories met a NaN or infinite cost", ""),
        (ACCEPTANCE | MANY, "acceptance falls to 0.03 on some level", EFFORT),
        ({"acceptance": np.array([[np.nan, 0.5, 0.06, 0.5]] * 2)} | MANY, None, ""),
        ({"separation": np.array(7.25)}, SEPARATE, ""),
        ({"separation": np.array(2.0)}, None, ""),
        ({"overlap": np.array([0.9, 2e-5, 0.6])}, "neighbouring levels hardly overlap (2e-05)", EFFORT),
        ({"overlap": np.array([0.9, 2e-3, 0.6])}, None, ""),
        ({"separation": np.array(np.nan)}, None, ""),
        ({"standstill": np.array(0.24)}, "chains stood still for 24 % of their way", EFFORT),
        ({"standstill": np.array(0.04)}, None, ""),
        ({"shortfall": np.array(5.25)}, "the chains end 5.2 standard deviations below the cutoff", EFFORT),
        ({"shortfall": np.array(1.0)}, None, ""),
        ({"leading": np.array(0.62)}, "one sample makes 62 % of what comes after the last temperature", EFFORT),
        ({"leading": np.array(0.4)}, None, ""),
        ({"leading": np.array(np.nan)}, None, ""),
        ({"blocked": np.array(0.4)}, "chains stood still on 40 % of their visits on the way to the wall", EFFORT),
        ({"blocked": np.array(0.1)}, None, ""),
        ({"blocked": np.array(np.nan)}, None, ""),
        ({"betas": np.array([300.0, 85.0, 100.0])}, COLDER, "raise beta_factor"),
        ({"betas": np.array([300.0, 200.0, 100.0])}, None, ""),
    ],
)
def test_each_remark_appears_where_it_should(make_trace, fields, words, remedy):
    remarks = make_trace(**fields).remarks()
    assert len(remarks) == (words is not None)
    assert words is None or (words in remarks[0][0] and remarks[0][1] == remedy)


def test_remarks_add_up(make_trace):
    trace = make_trace(progress=np.array(0.5), non_finite=np.array(0.1), acceptance=np.zeros((2, LEVELS)))
    assert len(trace.remarks()) == 3


def test_labelled_arrays_have_the_axes_that_they_name(make_trace):
    lengths = {
        "passes": 2, "levels": LEVELS, "gaps": LEVELS - 1, "chains": CHAINS, "temperatures": TEMPERATURES
    }  # fmt: skip
    labelled = make_trace().labelled()
    for axes, values in labelled.values():
        assert values.shape == tuple(lengths[axis] for axis in axes)
    whole = {field.name for field in dataclasses.fields(ChainTrace)}
    scalars = {
        "integrated",
        "integrated_virial",
        "separation",
        "standstill",
        "shortfall",
        "leading",
        "blocked",
        "gradients",
        "non_finite",
        "progress",
    }
    assert set(labelled) == whole - scalars
