"""A series: the rows it should have, where they lie, and figures of them; tuned proposals in a file.

Mutations these catch: the last network at every step, Adam asked before it has moments, the prior of each step's own
RMS, cutoffs that all measure the first.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from volumejax import report, series_plots
from volumejax.cli import main
from volumejax.config import ConfigError, load_config, parse_config
from volumejax.records import read_run
from volumejax.series import prepare_series
from volumejax.tasks.digits import digits_checkpoints, digits_task, log_spaced_steps

HEAD = "{name: s, task: {kind: digits, num_epochs: 2}, prior: {kind: gaussian, sigma: rms}, cutoff: 0.1, num_rays: 8, "
TRAINING = "checkpoints: 3, proposals: [{kind: isotropic}, {kind: adam, damping: 1e-3}]}"
SWEEP = (
    "cutoffs: [0.01, 0.1], proposals: [{kind: isotropic}, {kind: adam, damping: 1e-2}, {kind: adam, damping: 1e-3}, "
    "{kind: tuned, curvature: diagonal_ggn, exponents: [0.5], num_pilot_rays: 2}]}"
)


def test_checkpoints_are_those_of_one_training():
    steps = log_spaced_steps(4, num_epochs=2)
    assert steps[0] == 0 and steps[-1] == 32 and steps == sorted(set(steps))
    tasks = digits_checkpoints(steps[:-1], 1, num_epochs=2)
    assert len(tasks) == 4 and [int(task.opt_state[0].count) for task in tasks] == steps
    jax.tree.map(np.testing.assert_array_equal, tasks[-1].params, digits_task(1, num_epochs=2).params)
    assert all(float(task.cost(task.params)) < 1e-9 for task in tasks)
    assert tasks[0].train_accuracy < 0.3 < 0.6 < tasks[-1].train_accuracy
    for wrong in ([-1], [33]):
        with pytest.raises(ValueError, match="steps must lie between 0 and 32"):
            digits_checkpoints(wrong, num_epochs=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The two series by the command line: their runs and their reports."""
    found = {}
    for name, rest in (("training", TRAINING), ("sweep", SWEEP)):
        folder = tmp_path_factory.mktemp(name)
        (folder / "c.yaml").write_text(HEAD + rest)
        assert main(["run", str(folder / "c.yaml"), "--output", str(folder)]) == 0
        found[name] = read_run(folder / "s-001"), folder / "s-001"
    return found


@pytest.mark.slow
def test_training_rows(runs):
    run, _ = runs["training"]
    steps = log_spaced_steps(3, num_epochs=2)
    places = [(row.kind, row.position["step"]) for row in run.rows]
    # No Adam at step 0, whose state has no moments.
    assert places == [("isotropic", 0), *[(kind, s) for s in steps[1:] for kind in ("isotropic", "adam")]]
    assert run.complete and run.rows[1].label == f"isotropic, step {steps[1]}"
    tasks, sigma = digits_checkpoints(steps[:-1], num_epochs=2), float(run.task["sigma"])
    for row, task in zip(run.rows[::2], tasks, strict=False):
        square = sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(task.params))
        if row.position["step"] in (0, steps[1]):
            index = steps.index(int(row.position["step"]))
            square = sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(tasks[index].params))
            np.testing.assert_allclose(row.estimate["prior_term"], -0.5 * square / sigma**2, rtol=1e-5)
    np.testing.assert_allclose(sigma, tasks[-1].rms, rtol=1e-6)


@pytest.mark.slow
def test_sweep_rows(runs):
    run, _ = runs["sweep"]
    assert [row.position["cutoff"] for row in run.rows] == [0.01] * 4 + [0.1] * 4
    assert [row.position.get("damping") for row in run.rows[:3]] == [None, 0.01, 0.001]
    tuned = [row for row in run.rows if row.kind == "tuned"]
    assert all({"beta", "exponent", "damping", "shift"} <= row.position.keys() for row in tuned)
    small, large = (np.array([float(row.estimate["mean_log_weight"]) for row in run.rows[i : i + 4]]) for i in (0, 4))
    assert np.all(small < large) and small.argmax() == large.argmax() == 3


@pytest.mark.slow
def test_figures_and_reports(runs):
    run, folder = runs["training"]
    assert list(report.draw(run)) == ["training", "summary"]
    axes = series_plots.figures(run)["training"].axes
    assert [axis.get_ylabel() for axis in axes] == ["log mass (nats)", "volume term (nats)", "prior term (nats)"]
    whole, volume, prior = (axis.lines[0].get_ydata() for axis in axes)
    np.testing.assert_allclose(whole, np.asarray(volume) + np.asarray(prior), rtol=1e-6)
    assert "its two terms" in (folder / "report.html").read_text()
    run, folder = runs["sweep"]
    assert list(report.draw(run)) == ["cutoffs", "dampings", "summary"]
    assert {path.stem for path in (folder / "figures").glob("*.png")} == {"cutoffs", "dampings", "summary"}
    stored = json.loads((folder / "result.json").read_text())
    assert stored["rows"][1]["position"] == {"cutoff": 0.01, "damping": 0.01, "exponent": 0.5}


def test_ordinary_runs_have_no_series(example_run):
    assert series_plots.figures(example_run) == {}


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("checkpoints: 1, proposals: [{kind: isotropic}]}", "checkpoints"),
        ("checkpoints: 3, tethers: [{region: star}]}", "go without tethers; give those a file of their own"),
        ("cutoffs: [0.1, 0.1], proposals: [{kind: isotropic}]}", "cutoffs holds a number twice"),
        ("proposals: [{kind: tuned}]}", "add `curvature: adam`"),
    ],
)
def test_mistakes(rest, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(HEAD + rest)


@pytest.mark.parametrize("name", ["digits_training", "digits_sweeps"])
def test_the_files_that_come_with_the_library(name, request):
    config = load_config(request.config.rootpath / "configs" / f"{name}.yaml")
    assert config.is_series and config.name == name
    assert parse_config(HEAD + "proposals: [{kind: isotropic}]}").is_series is False


def test_the_size_of_a_series():
    setting = prepare_series(parse_config(HEAD + TRAINING), lambda progress: None)
    assert setting.num_rows == 5 and setting.task is setting.tasks[-1]
