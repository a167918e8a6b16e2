import dataclasses
import math

import numpy as np
import pytest

from volumejax.islands import IslandTrace
from volumejax.results import Kind


def trace(log_weights, **values):
    fields = {
        "log_weights": np.asarray(log_weights, np.float64),
        "betas": np.array([0.0, 1.0, 2.0]),
        "mean_cost": np.array([3.0, 2.0, 1.0]),
        "ess": np.array([1.0, 0.7, 0.9]),
        "acceptance": np.array([1.0, 0.8, 0.6]),
        "prior_costs": np.array([0.5, 1.0, 2.0, np.inf]),
        "num_particles": np.asarray(8),
        "gradients": np.asarray(100),
        "non_finite": np.asarray(0.25),
        "progress": np.asarray(1.0),
    }
    return IslandTrace(**{**fields, **values})


def test_scatter_decides_whether_islands_disagree():
    assert not trace([-1.0, -1.5, -0.5]).disagrees
    assert trace([-1.0, -5.0, 3.0]).disagrees
    assert trace([-1.0, -np.inf, -1.0]).disagrees and trace([-1.0, -np.inf]).scatter == math.inf
    assert trace([-1.0]).disagrees, "one island says nothing about the scatter"


def test_share_of_the_prior_counts_draws():
    assert [trace([0.0, 0.0]).share_of_prior(c) for c in (0.4, 1.0, 1e9)] == [0.0, 0.5, 0.75]


def test_scalars_and_axes():
    scalars = trace([-1.0, -2.0]).scalars()
    assert scalars["num_islands"] == 2 and scalars["num_levels"] == 3 and scalars["min_acceptance"] == 0.6
    assert scalars["scatter"] == pytest.approx(math.sqrt(0.5))
    for axes, values in trace([-1.0, -2.0]).labelled().values():
        assert np.ndim(values) == len(axes)


def test_remarks_name_what_is_wrong():
    assert trace([0.0, 0.0], non_finite=np.asarray(0.0)).remarks() == []
    told = " ".join(trace([0.0, 0.0], progress=np.asarray(0.5), acceptance=np.array([1.0, 0.01, 0.5])).remarks())
    assert "50 % of the islands" in told and "25 % of draws" in told and "hardly move" in told


def test_islands_that_never_came_inside_are_counted(make_estimate):
    estimate = dataclasses.replace(
        make_estimate([-1.0, -2.0]), trace=trace([-1.0, -np.inf, -np.inf]), kind=np.asarray(Kind.NOT_MIXED, np.int32)
    )
    assert "2 of 3 islands never came inside; a cost without steps" in estimate.status
    scattered = dataclasses.replace(estimate, trace=trace([-1.0, -9.0, -3.0]))
    assert "scatter by 4.16 nats" in scattered.status and "without steps" not in scattered.status
