"""Learning coefficients from a file: the rows, their figure and table, and every mistake in one line.

Mutations these catch: one temperature where two are joined, the hot one quoted, D for D/2, a figure of the hot values.
"""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from volumejax import coefficients, report, table, terminal
from volumejax.cli import main
from volumejax.config import Config, ConfigError, LearningConfig, dump_config, load_config, parse_config, quick
from volumejax.records import read_run

TEXT = (
    "{name: d, task: {kind: deep_linear, networks: [{widths: [2, 2, 2], rank: 2}, {widths: [1, 1, 1]}]}, "
    "prior: {kind: gaussian, sigma: 1}, betas: [1e5, 1e3], num_chains: 16, num_draws: 240}"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run by the command line, and its directory."""
    folder = tmp_path_factory.mktemp("deep")
    (folder / "c.yaml").write_text(TEXT)
    assert main(["run", str(folder / "c.yaml"), "--output", str(folder)]) == 0
    return read_run(folder / "d-001"), folder / "d-001"


@pytest.mark.slow
def test_rows(finished):
    run, folder = finished
    regular, singular = run.rows
    assert run.complete and [row.label for row in run.rows] == ["2-2-2 rank 2", "1-1-1 rank 0"]
    # Four equations in eight unknowns; a normal crossing of two.
    assert (regular.estimate["learning_coefficient"], regular.estimate["multiplicity"]) == (2.0, 1)
    assert (singular.estimate["learning_coefficient"], singular.estimate["multiplicity"]) == (0.5, 2)
    assert [row.estimate["half_dimension"] for row in run.rows] == [4.0, 1.0]
    for row in run.rows:
        value, logs = row.estimate, np.log([1e3, 1e5])
        assert value["beta"] == 1e5 and row.chains["costs_0"].shape == row.chains["costs_1"].shape == (16, 240)
        # Two columns of draws, hot first: each gives its λ̂.
        for beta, name, costs in ((1e3, "hot_value", "costs_0"), (1e5, "value", "costs_1")):
            np.testing.assert_allclose(beta * row.chains[costs].mean(), value[name], rtol=1e-5)
        joined = (logs[1] * value["value"] - logs[0] * value["hot_value"]) / (logs[1] - logs[0])
        np.testing.assert_allclose(value["quoted_value"], value["value"] if row is regular else joined, rtol=1e-6)
        assert abs(value["quoted_value"] - value["learning_coefficient"]) <= 4.0 * value["quoted_std_error"]
        assert value["quoted_std_error"] <= 0.15 * value["learning_coefficient"]
    assert json.loads((folder / "result.json").read_text())["rows"][0]["kind"] == "learning"


@pytest.mark.slow
def test_figure_and_report(finished):
    run, folder = finished
    drawn = report.draw(run)
    assert list(drawn) == ["coefficients"]
    upper, lower = drawn["coefficients"].axes
    x, y = (np.asarray(values, float) for values in upper.containers[0].lines[0].get_data())
    np.testing.assert_allclose(x, [2.0, 0.5])
    np.testing.assert_allclose(y, [float(row.estimate["quoted_value"]) for row in run.rows])
    np.testing.assert_allclose(upper.lines[0].get_xdata(), upper.lines[0].get_ydata())
    np.testing.assert_allclose(upper.lines[1].get_ydata(), [4.0, 1.0])
    off = np.asarray(lower.containers[0].lines[0].get_ydata(), float)
    np.testing.assert_allclose(off, 100.0 * (y / [2.0, 0.5] - 1.0))
    assert {path.name for path in (folder / "figures").iterdir()} == {"coefficients.png", "coefficients.svg"}
    page = (folder / "report.html").read_text()
    assert "2-2-2 rank 2" in page and "exact learning coefficient" in page and "log mass" not in page
    assert main(["plot", str(folder)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_table_fits_and_loses_nothing(width, finished):
    out = io.StringIO()
    Console(file=out, width=width, markup=False).print(terminal.run_table(finished[0], width))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width + 1  # the hat of λ̂ takes no column
    for row in finished[0].rows:
        made = table.cells(row)
        for name in table.filled([made])[1:]:
            assert getattr(made, name) in text
    assert ("±" in text) and ("log mass" not in text)


@pytest.mark.slow
def test_chains_that_have_not_mixed_are_named(finished):
    run, _ = finished
    stuck = {**run.rows[0].estimate, "hot_status": "not mixed: R-hat 1.2; take more draws or longer trajectories"}
    changed = run.model_copy(update={"rows": (run.rows[0].model_copy(update={"estimate": stuck}), run.rows[1])})
    assert any(note.startswith("2-2-2 rank 2, hot: not mixed") for note in table.notes(changed))
    assert not any("not mixed" in note for note in table.notes(run))
    assert any("joins both temperatures" in note for note in table.notes(run))


def test_the_file_that_comes_with_the_library(request):
    config = load_config(request.config.rootpath / "configs" / "deep_linear.yaml")
    assert isinstance(config, LearningConfig) and config.name == "deep_linear" and config.betas == (1e5, 1e8)
    networks = config.task.networks
    assert len(networks) == 15 and {len(network.widths) for network in networks} == {3, 4, 5}
    values = [coefficients.deep_linear(network.widths, network.rank) for network in networks]
    assert min(values) == (3.0, 1) and max(values) == (80.0, 1)
    short = quick(config)
    assert isinstance(short, LearningConfig) and (short.num_chains, short.num_draws) == (8, 64)
    assert parse_config(dump_config(config)) == config


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rank: 2", "rank: 3", "rank is above the smallest width, 2; lower it"),
        ("rank: 2", "rnk: 2", r"task.networks\[0\].rnk: unknown key; did you mean `rank`"),
        ("betas: [1e5, 1e3]", "betas: [1e5, 1e5]", "betas holds a number twice"),
        ("betas: [1e5, 1e3], ", "", "betas: missing; add `betas: "),
        ("betas: [1e5, 1e3]", "betas: [0.5]", "expected a number greater than 1, got 0.5"),
        ("{widths: [1, 1, 1]}", "{widths: [2, 2, 2], rank: 2}", "holds a network twice"),
        ("sigma: 1", "sigma: rms", "prior.sigma"),
        ("num_chains: 16", "num_rays: 16", "num_rays: unknown key"),
    ],
)
def test_mistakes(old, new, message):
    assert old in TEXT
    with pytest.raises(ConfigError, match=message):
        parse_config(TEXT.replace(old, new))


def test_a_volume_is_still_a_volume():
    text = "{name: s, task: {kind: digits}, prior: {kind: gaussian, sigma: rms}, cutoff: 0.1, "
    assert isinstance(parse_config(text + "proposals: [{kind: isotropic}]}"), Config)
