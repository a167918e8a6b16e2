"""A series: the rows it should have, where they lie, and figures of them; tuned proposals in a file.

Mutations these catch: the last network at every step, Adam asked before it has moments, the prior of each step's own
RMS, cutoffs that all measure the first.
"""

import html
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from volumejax import report, series_plots, table
from volumejax.cli import main
from volumejax.config import ConfigError, load_config, parse_config
from volumejax.records import read_run
from volumejax.series import prepare_series
from volumejax.tasks.digits import digits_checkpoints, digits_task, log_spaced_steps

HEAD = "{name: s, task: {kind: digits, num_epochs: 2}, prior: {kind: gaussian, sigma: rms}, cutoff: 0.1, num_rays: 8, "
TRAINING = "checkpoints: 3, proposals: [{kind: isotropic}, {kind: adam, damping: 1e-3}]}"
SWEEP = (
    "cutoffs: [0.01, 0.1], proposals: [{kind: isotropic}, {kind: adam, damping: 1e-2}, {kind: adam, damping: 1e-3}, "
    "{kind: tuned, curvature: diagonal_ggn, exponents: [0.3, 0.5], num_pilot_rays: 2}]}"
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
    for row in tuned:
        best = np.argmax(row.sweep["mean_log_weight"])
        assert {"beta", "exponent", "damping", "shift", "mean_log_weight", "std_error"} == row.sweep.keys()
        assert row.position == {"cutoff": row.position["cutoff"]} | {
            name: float(row.sweep[name][best]) for name in ("beta", "exponent", "damping", "shift")
        }
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
    assert list(report.draw(run)) == ["cutoffs", "dampings", "exponents", "summary"]
    assert {path.stem for path in (folder / "figures").glob("*.png")} == {"cutoffs", "dampings", "exponents", "summary"}
    stored = json.loads((folder / "result.json").read_text())
    assert stored["rows"][1]["position"] == {"cutoff": 0.01, "damping": 0.01, "exponent": 0.5}


def sentences(_, folder):
    """The report's own words."""
    text = re.sub(
        r"<style>.*?</style>|<svg.*?</svg>|<pre>.*?</pre>", "", (folder / "report.html").read_text(), flags=re.S
    )
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


@pytest.mark.slow
def test_the_report_of_a_training_says_nothing_of_one_network(runs):
    text = sentences(*runs["training"])
    steps = log_spaced_steps(3, num_epochs=2)
    assert "mean KL divergence from the network of the same step" in text and "the same at every step" in text
    assert re.search(r"a part that changes with the step \(−[\d.,]+ to −[\d.,]+ nats\) is due to", text)
    assert "At the end it classifies" in text
    assert f"What may be claimed of the network at step {steps[-1]}:" in text
    assert "trained network" not in text and "All rows measure" not in text and "chosen" not in text


@pytest.mark.slow
def test_the_report_of_a_sweep_says_which_cutoff_and_what_was_chosen(runs):
    run, _ = runs["sweep"]
    text = sentences(*runs["sweep"])
    assert "differ by at most the row's cutoff, 0.01 to 0.1 nats" in text and "All rows measure" not in text
    assert "What may be claimed at a cutoff of 0.1 nats:" in text and "These rows measure the same number" in text
    tuned = next(row for row in run.rows if row.kind == "tuned")
    assert f"power {tuned.position['exponent']:g}" in text and "What pilot rays with a key of their own chose" in text


@pytest.mark.slow
def test_series_figures_show_bounds_and_explain_themselves(runs):
    for name in runs:
        run, folder = runs[name]
        for title, figure in report.draw(run).items():
            assert figure.get_figheight() <= 7.0, title
            if title == "summary":
                continue
            labels = [text.get_text() for text in figure.legends[0].get_texts()]
            assert "single rays, mean ± sd" in labels or title == "exponents"
            shown = [line for line in figure.axes[0].lines if line.get_marker() is series_plots.UPWARD]
            bounds = sum(np.sum(np.isfinite(line.get_ydata())) for line in shown)
            assert ("at least (95 %)" in labels) == (bounds > 0)
            box = figure.get_tightbbox()
            assert box.x0 >= -0.01 and box.x1 <= figure.get_figwidth() + 0.01
        assert (folder / "figures" / "summary.png").exists()
    run, _ = runs["training"]
    bounds = [float(row.estimate["lower"]) for row in run.rows if table.is_bound(row.estimate)]
    lines = series_plots.figures(run)["training"].axes[0].lines
    drawn = [y for line in lines if line.get_marker() is series_plots.UPWARD for y in line.get_ydata()]
    assert bounds and sorted(bounds) == sorted(y for y in drawn if np.isfinite(y))
    axis = series_plots.figures(run)["training"].axes[-1]
    assert axis.get_xlabel() == "training step" and list(axis.get_xticks()) == log_spaced_steps(3, num_epochs=2)


def test_two_powers_of_one_family_have_two_colours(make_row, make_run):
    rows = [
        make_row(f"a {damping} {power}", "adam", [-2.0, -3.0]).model_copy(
            update={"position": {"damping": damping, "exponent": power}}
        )
        for damping in (1e-3, 1e-2)
        for power in (0.35, 0.5)
    ]
    lines = series_plots.figures(make_run(*rows))["dampings"].axes[0].lines
    assert len({line.get_color() for line in lines if line.get_marker() in ("o", "s")}) == 2


def test_the_best_of_each_exponent_is_drawn(make_row, make_run):
    sweep = {
        "beta": np.array([0.0, 1.0, 2.0, 1.0, 2.0]), "exponent": np.array([0.5, 0.3, 0.3, 0.5, 0.5]),
        "mean_log_weight": np.array([-1.0, -9.0, -5.0, -7.0, np.nan]), "std_error": np.full(5, 0.5),
        "damping": np.zeros(5), "shift": np.zeros(5),
    }  # fmt: skip
    row = make_row("tuned Adam", "tuned", [-5.0, -6.0]).model_copy(update={"sweep": sweep})
    (axis,) = series_plots.figures(make_run(row))["exponents"].axes
    x, y = axis.lines[0].get_data()
    assert list(x) == [0.3, 0.5] and list(y) == [-5.0, -7.0]


def test_ordinary_runs_have_no_series(example_run):
    assert series_plots.figures(example_run) == {}


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("checkpoints: 1, proposals: [{kind: isotropic}]}", "checkpoints"),
        ("checkpoints: 3, tethers: [{region: star}]}", "go without tethers; give those a file of their own"),
        ("cutoffs: [0.1, 0.1], proposals: [{kind: isotropic}]}", "cutoffs holds a number twice"),
        ("proposals: [{kind: tuned}]}", "add `curvature: adam`"),
        (
            "proposals: [{kind: tuned, curvature: adam, exponents: []}]}",
            "exponents: is an empty list; write",
        ),
        (
            "proposals: [{kind: tuned, curvature: adam, exponents: 0.3}]}",
            r"a list of numbers such as .*, got 0.3",
        ),
        ("cutoffs: 0.1, proposals: [{kind: isotropic}]}", r"cutoffs: expected a list of numbers such as"),
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
