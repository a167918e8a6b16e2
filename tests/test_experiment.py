import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import volumejax as vj
from volumejax import experiment
from volumejax.behaviours import kl_to_anchor
from volumejax.chains import ChainTrace, Curve
from volumejax.config import parse_config
from volumejax.proposals import Dense, Diagonal
from volumejax.regions import Connected, Star
from volumejax.tasks.digits import Task

CONFIG = """\
name: tiny
task: {kind: digits}
prior: {kind: gaussian, sigma: rms}
cutoff: 1e-2
num_rays: 40
chunk_size: 16
proposals:
  - {kind: isotropic, recorded: {best: -3.5}}
  - {kind: diagonal_ggn, damping: 1e-2, label: damped}
  - {kind: diagonal_ggn, beta: 100.0, label: tempered}
  - {kind: dense_ggn, beta: auto, label: rotated}
  - {kind: dense_ggn, beta: 100.0, shift: false, label: unshifted}
"""


def linear(params, inputs):
    return inputs @ params["w"]


@pytest.fixture
def tiny_task(monkeypatch):
    """A linear softmax model with six parameters in place of the digits network."""
    params = {"w": jnp.arange(6.0).reshape(2, 3) / 6}
    inputs = jax.random.normal(jax.random.key(0), (8, 2))
    labels = jnp.zeros(8, jnp.int32)
    task = Task(
        apply_fn=linear,
        params=params,
        inputs=inputs,
        labels=labels,
        test_inputs=inputs,
        test_labels=labels,
        opt_state=None,
        cost=kl_to_anchor(linear, params, inputs),
        train_accuracy=1.0,
        test_accuracy=0.5,
        rms=0.5,
    )
    monkeypatch.setattr(experiment, "digits_task", lambda seed, *, num_epochs: task)
    return task


@pytest.fixture
def fake_stream(monkeypatch, make_estimate):
    """Rays of log weight -1, -2, -3, ... in place of real ones; Ctrl-C before chunk ``stop`` of all."""
    calls = []
    chunks = itertools.count()

    def install(stop=None):
        def stream(key, cost, params, prior, *, num_rays, chunk_size, **settings):
            calls.append({"key": key, "cost": cost, "params": params, "prior": prior, **settings})
            for done in range(chunk_size, num_rays + chunk_size, chunk_size):
                if next(chunks) == stop:
                    raise KeyboardInterrupt
                yield make_estimate(-1.0 - np.arange(min(done, num_rays)))

        monkeypatch.setattr(experiment, "ray_stream", stream)
        return calls

    return install


def run(config):
    seen = []
    setting = experiment.prepare(config, seen.append)
    return setting, list(experiment.run_experiment(setting, seen.append)), seen


@pytest.fixture
def fake_chains(monkeypatch, make_estimate):
    """Chains that are a third, two thirds and then wholly done; Ctrl-C before yield ``stop`` of all."""
    calls = []
    yields = itertools.count()

    def install(stop=None):
        def stream(key, cost, params, prior, *, on_progress, **settings):
            calls.append({"key": key, "cost": cost, "params": params, "prior": prior, **settings})
            on_progress("pilot", 0.0)
            on_progress("pilot", 1.0)
            for stage, share, lower in (("cooling", 0.3, -np.inf), ("cooling", 0.6, -9.0), ("heating", 1.0, -8.0)):
                if next(yields) == stop:
                    raise KeyboardInterrupt
                on_progress(stage, share)
                yield chained(make_estimate([-7.0] * 8), share, lower)

        monkeypatch.setattr(experiment, "tether_stream", stream)
        return calls

    return install


def chained(estimate, share, lower):
    """The estimate as if eight chains on three levels had made it."""
    levels, temperatures = np.ones(3), np.ones(5)
    sizes = {"precision": levels, "r_hat": levels, "overlap": np.ones(2), "work_std": np.ones(2)}
    sizes |= dict.fromkeys(("mean_cost", "mean_square", "acceptance", "inside"), np.ones((2, 3)))
    sizes |= dict.fromkeys(("betas", "energies", "energy_errors", "heat_capacities"), temperatures)
    names = (
        "integrated",
        "integrated_virial",
        "separation",
        "standstill",
        "shortfall",
        "leading",
        "blocked",
        "non_finite",
    )
    scalars = dict.fromkeys(names, np.zeros(()))
    trace = ChainTrace(
        **sizes, **scalars, log_weights=np.arange(8.0), gradients=np.asarray(70), progress=np.asarray(share)
    )
    curve = Curve(np.ones(4), np.full(4, 2.0), np.full(4, 3.0)) if share == 1.0 else None
    return dataclasses.replace(estimate, trace=trace, lower=jnp.asarray(lower), curve=curve)


@pytest.mark.parametrize("stop", [None, 0, 1])
def test_particles_make_a_row_and_an_interrupt_keeps_their_islands(stop, tiny_task, monkeypatch):
    calls = []

    def stream(key, cost, prior, like, *, on_progress, **settings):
        calls.append({"cost": cost, "prior": prior, "like": like, **settings})
        estimate = vj.temper_volume(
            key, lambda w: jnp.sum(w["w"] ** 2), vj.Gaussian(1.0), like, cutoff=9.0, num_particles=8, num_islands=4
        )
        for number in range(3):
            on_progress("pilot" if number == 0 else "islands", number / 2)
            if number == stop:
                raise KeyboardInterrupt
            yield estimate

    monkeypatch.setattr(experiment, "temper_stream", stream)
    text = (
        CONFIG[: CONFIG.index("proposals:")]
        + "cost: loss\nparticles: [{effort: 0.5, num_particles: 8, num_islands: 4}]\n"
    )
    setting, rows, seen = run(parse_config(text.replace("1e-2", "9")))
    assert calls[0]["effort"] == 0.5 and calls[0]["num_particles"] == 8 and calls[0]["num_islands"] == 4
    assert calls[0]["cost"] is setting.task.cost and calls[0]["cost"] is not tiny_task.cost
    assert calls[0]["anchor"] is tiny_task.params and setting.facts()["cost"] == "loss"
    if stop == 0:
        assert rows == []
        return
    (row,) = rows
    assert row.complete == (stop is None) and row.from_particles and not row.from_rays
    assert {"curve_cutoffs", "prior_costs", "betas"} <= row.chains.keys()
    shares = [progress.done for progress in seen if progress.unit == "%"]
    assert shares == sorted(shares) and (shares[-1] == 100) == (stop is None)


def test_rows_follow_the_configuration(tiny_task, fake_stream):
    calls = fake_stream()
    config = parse_config(CONFIG)
    setting, rows, seen = run(config)
    assert [row.label for row in rows] == ["isotropic", "damped", "tempered", "rotated", "unshifted"]
    assert [row.kind for row in rows] == [entry.kind for entry in config.proposals]
    assert all(row.complete and row.estimate["num_rays"] == 40 for row in rows)
    assert rows[0].recorded == {"best": -3.5} and rows[1].recorded == {}
    np.testing.assert_array_equal(rows[0].rays["log_weight"], -1.0 - np.arange(40))
    assert [type(proposal) for proposal in setting.proposals] == [Diagonal, Diagonal, Diagonal, Dense, Dense]
    assert setting.facts()["sigma"] == 0.5 and setting.facts()["dimension"] == 6
    for call, proposal in zip(calls, setting.proposals, strict=True):
        assert call["cutoff"] == 0.01 and call["tolerance"] == 0.1 and call["audit_fraction"] == 0.05
        assert call["proposal"] is proposal and call["cost"] is tiny_task.cost and call["prior"] is setting.prior
        assert jnp.array_equal(jax.random.key_data(call["key"]), jax.random.key_data(jax.random.key(0)))
    stages = [progress.stage for progress in seen if progress.done == 0]
    assert stages == ["training", "curvature", *(row.label for row in rows)]
    assert [progress.done for progress in seen if progress.stage == "damped"] == [0, 16, 32, 40]


def test_damped_form_and_shift(tiny_task, fake_stream):
    fake_stream()
    setting, _, _ = run(parse_config(CONFIG))
    diagonal = experiment.curvature.diagonal_ggn(linear, tiny_task.params, tiny_task.inputs)
    np.testing.assert_array_equal(setting.proposals[0].scale["w"], 1.0)
    np.testing.assert_allclose(setting.proposals[1].scale["w"], 1 / (np.sqrt(diagonal["w"]) + 0.01), rtol=1e-5)
    assert setting.proposals[2].mean is not None and setting.proposals[3].mean is not None
    assert setting.proposals[1].mean is None
    assert not np.any(setting.proposals[4].mean["w"])


def test_rows_that_differ_by_the_shift_alone_share_a_factor(tiny_task, fake_stream, monkeypatch):
    fake_stream()
    factorised, real = [], experiment.curvature_proposal
    monkeypatch.setattr(
        experiment,
        "curvature_proposal",
        lambda *args, **given: factorised.append(given["beta"]) or real(*args, **given),
    )
    asked = ((100.0, "true"), (200.0, "true"), (200.0, "false"), (300.0, "false"), ("auto", "true"), ("auto", "false"))
    rows = "".join(f"  - {{kind: dense_ggn, beta: {beta}, shift: {shift}}}\n" for beta, shift in asked)
    setting, _, _ = run(parse_config(CONFIG[: CONFIG.index("  - {kind: isotropic")] + rows))
    assert factorised == [100.0, 200.0, 300.0, None, None]
    matrix = experiment.curvature.dense_ggn(linear, tiny_task.params, tiny_task.inputs)
    for proposal, beta in zip(setting.proposals[:4], (100.0, 200.0, 200.0, 300.0), strict=True):
        alone = real(matrix, tiny_task.params, setting.prior, beta=beta, shift=False)
        np.testing.assert_array_equal(proposal.cholesky, alone.cholesky)
    assert [bool(np.any(proposal.mean["w"])) for proposal in setting.proposals] == [
        True,
        True,
        False,
        False,
        True,
        False,
    ]


def test_curvature_is_computed_only_where_needed(tiny_task, fake_stream, monkeypatch):
    del tiny_task
    fake_stream()
    monkeypatch.setattr(experiment.curvature, "dense_ggn", lambda *_: pytest.fail("not needed"))
    text = CONFIG[: CONFIG.index("  - {kind: dense_ggn")]
    _, rows, _ = run(parse_config(text))
    assert len(rows) == 3


@pytest.mark.parametrize(
    ("stop", "labels", "rays"),
    [(0, [], []), (2, ["isotropic"], [32]), (3, ["isotropic"], [40]), (4, ["isotropic", "damped"], [40, 16])],
)
def test_an_interrupt_keeps_what_was_done(stop, labels, rays, tiny_task, fake_stream):
    del tiny_task
    fake_stream(stop)
    _, rows, _ = run(parse_config(CONFIG))
    assert [row.label for row in rows] == labels
    assert [row.estimate["num_rays"] for row in rows] == rays
    assert [row.complete for row in rows] == [count == 40 for count in rays]


BOTH = (
    CONFIG[: CONFIG.index("  - {kind: diagonal_ggn, damping")]
    + """\
tethers:
  - {region: star, effort: 0.5}
  - {region: connected, num_chains: 8, decades: 0, label: walkers}
"""
)


def test_tethers_follow_the_rays(tiny_task, fake_stream, fake_chains):
    fake_stream()
    calls = fake_chains()
    setting, rows, seen = run(parse_config(BOTH))
    assert [(row.label, row.kind) for row in rows] == [
        ("isotropic", "isotropic"),
        ("tether, star", "tether"),
        ("walkers", "tether"),
    ]
    assert all(row.complete for row in rows)
    assert [call["region"] for call in calls] == [Star(), Connected()]
    asked = [(call["effort"], call["num_chains"], call["decades"]) for call in calls]
    assert asked == [(0.5, None, 2.0), (1.0, 8, 0.0)]
    for call in calls:
        assert call["cutoff"] == 0.01 and call["cost"] is tiny_task.cost and call["prior"] is setting.prior
        assert jnp.array_equal(jax.random.key_data(call["key"]), jax.random.key_data(jax.random.key(0)))
    row = rows[1]
    assert row.rays == {} and row.estimate["gradients"] == 70
    np.testing.assert_array_equal(row.chains["log_weights"], np.arange(8.0))
    assert row.chains["mean_square"].shape == (2, 3)
    np.testing.assert_array_equal(row.chains["curve_log_mass"], np.full(4, 2.0))
    shown = [progress for progress in seen if progress.stage == "walkers"]
    assert [(progress.done, progress.total) for progress in shown] == [
        (0, 100), (1, 100), (13, 100), (30, 100), (60, 100), (99, 100), (100, 100)
    ]  # fmt: skip
    assert [progress.phase for progress in shown] == ["pilot"] * 3 + ["cooling"] * 2 + ["heating"] * 2
    assert {progress.unit for progress in shown} == {"%"}
    assert shown[2].estimate is None and shown[-1].estimate is not None


@pytest.mark.parametrize(
    ("stop", "labels", "complete"),
    [
        (0, ["isotropic"], [True]),
        # Chains that have not felt the region yet have nothing to say.
        (1, ["isotropic"], [True]),
        (2, ["isotropic", "tether, star"], [True, False]),
        (3, ["isotropic", "tether, star"], [True, True]),
        (5, ["isotropic", "tether, star", "walkers"], [True, True, False]),
    ],
)
def test_an_interrupt_keeps_what_the_chains_found(stop, labels, complete, tiny_task, fake_stream, fake_chains):
    del tiny_task
    fake_stream()
    calls = fake_chains(stop)
    _, rows, _ = run(parse_config(BOTH))
    assert [row.label for row in rows] == labels
    assert len(calls) == 1 + stop // 3
    assert [row.complete for row in rows] == complete


def test_partial_chains_have_no_curve(tiny_task, fake_stream, fake_chains):
    del tiny_task
    fake_stream()
    fake_chains(2)
    _, rows, _ = run(parse_config(BOTH))
    assert not rows[-1].complete and rows[-1].estimate["progress"] == 0.6
    assert "precision" in rows[-1].chains and "curve_cutoffs" not in rows[-1].chains
