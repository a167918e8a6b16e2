"""Runs to draw and to store, without sending a ray."""

import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from volumejax.chains import ChainTrace
from volumejax.ensemble import FIELDS, Rung
from volumejax.records import Row, Run
from volumejax.results import BoundKind, Kind, RayBatch, VolumeEstimate


def pytest_collection_modifyitems(items):
    """Long tests first, module by module: in the end workers then have short ones to share."""
    is_slow = lambda item: item.get_closest_marker("slow") is not None
    slow = collections.Counter(item.path for item in items if is_slow(item))
    items.sort(key=lambda item: (-slow[item.path], str(item.path), not is_slow(item)))


@pytest.fixture(autouse=True, scope="module")
def _let_go_of_compiled_programs():
    """Each program holds maps of memory, of which Linux grants a process 65,530: the whole suite needs more."""
    yield
    jax.clear_caches()


@pytest.fixture
def of_seeds():
    """`of_seeds(call, number)`: what `call` returns for each seed; shapes are checked at run time in the first only."""

    def repeat(call, number):
        first = call(0)
        jaxtyping.config.update("jaxtyping_disable", True)
        try:
            return [first, *(call(seed) for seed in range(1, number))]
        finally:
            jaxtyping.config.update("jaxtyping_disable", False)

    return repeat


def _fill(cls, default, **values):
    """The module with the given fields, and the default for every other one that has none."""
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in values]
    return cls(**dict.fromkeys(required, default), **values)


@pytest.fixture
def make_rungs():
    """`make_rungs(precision, beta)`: rungs of one leaf whose maps do nothing, with arrays of NumPy."""

    def made(precision, beta):
        ones = np.ones(len(beta))
        return Rung(
            precision=precision * ones, beta=beta * ones, masses=ones[:, None], step_size=ones, spread=ones,
            num_steps=ones, num_moves=ones, stretch=np.stack(FIELDS * [ones], axis=1),
        )  # fmt: skip

    return made


@pytest.fixture
def few_slide(monkeypatch):
    """Chains of few coordinates slide as those of many do."""
    monkeypatch.setattr("volumejax.ensemble.CHEAP", 1)


@pytest.fixture
def make_estimate():
    """An estimate with the given per-ray log weights; a bound unless ``settled``."""

    def make(log_weight, *, radius=None, status=None, settled=False, **fields):
        log_weight = np.asarray(log_weight, float)
        n, finite = len(log_weight), log_weight[np.isfinite(log_weight)]
        peak = finite.max() if finite.size else -np.inf
        weights = np.exp(log_weight - (peak if finite.size else 0.0))
        with np.errstate(divide="ignore"):
            log_mass = peak + np.log(weights.mean())
        zeros = jnp.zeros(n, jnp.int32)
        trace = _fill(
            RayBatch,
            jnp.zeros(n),
            log_weight=jnp.asarray(log_weight, jnp.float32),
            radius=jnp.asarray(np.linspace(4, 6, n) if radius is None else radius, jnp.float32),
            status=zeros if status is None else jnp.asarray(status, jnp.int32),
            evaluations=zeros + 6,
            executed=zeros + 7,
            audited=zeros == 1,
            violated=zeros == 1,
            audit_evaluations=zeros,
        )
        values = {
            "log_mass": log_mass,
            "std_error": 0.25 if settled else np.inf,
            "lower": log_mass - 3.0,
            "prior_term": -65.2,
            "mean_log_weight": finite.mean() if finite.size else -np.inf,
            "std_log_weight": finite.std() if finite.size else np.nan,
            "max_log_weight": peak,
            "ess": n / 2 if settled else 1.0,
            "pareto_k": 0.31 if settled else np.inf,
            **fields,
        }
        return _fill(
            VolumeEstimate,
            jnp.zeros(()),
            **{name: jnp.asarray(value, jnp.float32) for name, value in values.items()},
            kind=jnp.asarray(Kind.ESTIMATE if settled else Kind.LOWER_BOUND, jnp.int32),
            bound_kind=jnp.asarray(BoundKind.CERTIFIED, jnp.int32),
            hysteresis=jnp.full(2, jnp.nan),
            scout_evaluations=jnp.zeros((), jnp.int32),
            num_rays=n,
            region="star",
            trace=trace,
        )

    return make


@pytest.fixture
def make_row(make_estimate):
    """A finished row of a run."""

    def make(label, kind, log_weight, *, recorded=None, complete=True, seconds=7.25, **estimate):
        made = make_estimate(log_weight, **estimate)
        return Row(
            label=label,
            kind=kind,
            seconds=seconds,
            complete=complete,
            recorded=recorded or {},
            estimate=made.to_dict(),
            rays={name: np.asarray(value) for name, value in vars(made.trace).items()},
        )

    return make


@pytest.fixture
def make_tether(make_row):
    """A row that chains made, with their arrays."""

    def make(label, *, complete=True, **values):
        row = make_row(label, "tether", [-600.0] * 16, complete=complete, settled=True)
        chains = {
            "std_error": 2.0, "lower": -614.23, "hysteresis_cooling": -601.0, "hysteresis_heating": -599.04,
            "gradients": 3200, "progress": 1.0, "noise": math.nan, "region": "connected", "status": "ok",
        }  # fmt: skip
        arrays = {name: np.full((2, 9), 0.8) for name in ("mean_cost", "mean_square", "acceptance", "inside")}
        arrays |= {"precision": np.geomspace(1e4, 1.0, 9), "r_hat": np.ones(9), "log_weights": np.full(16, -600.0)}
        arrays |= {"overlap": np.full(8, 0.9), "work_std": np.ones(8)}
        arrays |= {"betas": np.geomspace(1e3, 1e5, 6), "energies": np.full(6, 100.0)}
        arrays |= {"energy_errors": np.ones(6), "heat_capacities": np.full(6, 110.0)}
        if complete:
            arrays |= {"curve_cutoffs": np.geomspace(1e-4, 1e-2, 9), "curve_log_mass": np.linspace(-1000, -600, 9)}
            arrays |= {"curve_std_error": np.full(9, 20.0)}
        return row.model_copy(update={"estimate": {**row.estimate, **chains, **values}, "rays": {}, "chains": arrays})

    return make


@pytest.fixture
def make_particles(make_row):
    """A row that particles from the prior made, with their arrays."""

    def make(label="from the prior", **values):
        row = make_row(label, "particles", [-600.0] * 16, settled=True)
        scalars = {
            "std_error": 0.7, "lower": -601.23, "gradients": 64_000, "num_particles": 64, "num_islands": 16,
            "progress": 1.0, "noise": math.nan, "region": "global", "status": "ok",
        }  # fmt: skip
        arrays = {name: np.full(9, 0.8) for name in ("mean_cost", "ess", "acceptance")}
        arrays |= {"betas": np.linspace(0.0, 80.0, 9), "log_weights": np.linspace(-601.0, -599.0, 16)}
        arrays |= {"prior_costs": np.geomspace(0.2, 5.0, 64), "curve_cutoffs": np.geomspace(1e-2, 2.0, 9)}
        arrays |= {"curve_log_mass": np.linspace(-600, -1, 9), "curve_std_error": np.linspace(5.0, 0.1, 9)}
        return row.model_copy(update={"estimate": {**row.estimate, **scalars, **values}, "rays": {}, "chains": arrays})

    return make


@pytest.fixture
def make_run():
    """A run made of rows."""

    def make(*rows, **fields):
        values = {
            "name": "example",
            "created": "2025-01-31T12:00:00+00:00",
            "cutoff": 0.01,
            "complete": True,
            "task": {"dimension": 4810, "train_accuracy": 1.0, "test_accuracy": 0.978, "rms": 0.23, "sigma": 1.3975},
            "seconds": {"training": 4.2, "total": 61.0},
            "versions": {"python": "3.11.0", "jax": "0.8.0"},
            "hardware": {"system": "Linux x86_64", "cores": 2},
            "config": "name: example\n",
        }
        return Run(rows=rows, **{**values, **fields})

    return make


@pytest.fixture
def example_run(make_row, make_run):
    """Bounds, an estimate, and rays that never cross or have no volume."""
    draw = np.random.default_rng(0).normal
    radius = np.exp(draw(1.5, 0.1, 200))
    radius[:3] = np.inf
    empty = draw(-9000, 600, 200)
    empty[:5] = -np.inf
    return make_run(
        make_row("isotropic", "isotropic", draw(-12000, 800, 200), recorded={"best": -9800, "mean": -11903, "sd": 828}),
        make_row("Adam 0.001", "adam", empty, recorded={"best": -7021}, status=[5] * 5 + [0] * 195),
        make_row("diagonal GGN 0.01", "diagonal_ggn", draw(-8900, 600, 200), radius=radius),
        make_row("dense GGN β=2e4, no shift", "dense_ggn", draw(-7300, 0.2, 200), settled=True),
    )


@pytest.fixture
def make_trace():
    """Evidence of six chains a pass on four levels, with nothing amiss."""

    def make(**fields):
        table = np.full((2, 4), 0.7)
        table[1, 0] = np.nan
        values = {
            "precision": np.array([9.0, 9.0, 3.0, 1.0]),
            "mean_cost": table,
            "mean_square": table,
            "acceptance": table,
            "inside": table,
            "overlap": np.array([0.9, 0.5, 0.6]),
            "r_hat": np.array([np.nan, 1.01, 1.2, 1.05]),
            "work_std": np.ones(3),
            "separation": np.array(1.1),
            "standstill": np.array(0.01),
            "shortfall": np.array(0.2),
            "leading": np.array(0.1),
            "blocked": np.array(0.0),
            "log_weights": np.zeros(6),
            **dict.fromkeys(("betas", "energies", "energy_errors", "heat_capacities"), np.ones(3)),
            "integrated": np.array(-3.5),
            "integrated_virial": np.array(-3.4),
            "gradients": np.array(1200),
            "non_finite": np.array(0.0),
            "progress": np.array(1.0),
        }
        return ChainTrace(**{**values, **fields})

    return make


@pytest.fixture
def own_number():
    """A cost that makes a number by itself, and the list of the types that this had when it was called."""
    seen = []

    def cost(params):
        start = jnp.zeros(())
        seen.append(start.dtype)
        return 0.5 * jnp.sum(params**2) + start

    return cost, seen
