import io
import math

import pytest
from rich.console import Console

from volumejax import table, terminal
from volumejax.check import CheckRow
from volumejax.experiment import Progress


@pytest.fixture
def make_tether(make_row):
    """A row that chains made."""

    def make(label, *, complete=True, **values):
        row = make_row(label, "tether", [-600.0] * 16, complete=complete, settled=True)
        chains = {
            "hysteresis_cooling": -601.0, "hysteresis_heating": -599.04, "gradients": 3200, "progress": 1.0,
            "noise": math.nan, "pareto_k": math.nan, "region": "connected", "status": "ok",
        }  # fmt: skip
        estimate = {**row.estimate, "std_error": 2.0, "lower": -614.23, **chains, **values}
        return row.model_copy(update={"estimate": estimate, "rays": {}})

    return make


def printed(made, width):
    out = io.StringIO()
    Console(file=out, width=width, markup=False).print(made)
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 50, 60, 80, 100, 120, 200])
def test_the_table_fits_and_loses_nothing(width, example_run):
    text = printed(terminal.run_table(example_run, width), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text and "..." not in text
    for row in example_run.rows:
        method, *numbers = table.cells(row)
        for cell in numbers:
            for line in cell.split("\n"):
                assert line in text, (line, text)
        for word in method.split():
            assert word in text


@pytest.mark.parametrize("width", [40, 50, 60, 80, 100, 120, 200])
def test_rows_of_chains_fit_beside_those_of_rays(width, example_run, make_tether):
    chains = (
        make_tether("tether, star"),
        make_tether("tether, connected", complete=False, kind="not_mixed", lower=-20614.23, progress=0.43),
    )
    run = example_run.model_copy(update={"rows": (*example_run.rows, *chains)})
    text = printed(terminal.run_table(run, width), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for row in run.rows:
        for cell in table.cells(row)[1:]:
            for line in cell.split("\n"):
                assert line in text, (line, text)
    assert "at least" in text and "passes" in text


def test_a_run_of_chains_alone_has_no_columns_for_rays(make_run, make_tether):
    text = printed(terminal.run_table(make_run(make_tether("tether, star")), 60), 60)
    assert "k-hat" not in text and "per ray" not in text
    assert "-599.0" in text and "3,200" in text


@pytest.mark.parametrize("width", [60, 80])
def test_long_labels_and_large_numbers_fit(width, make_row, make_run):
    rows = [
        make_row(
            "x" * 40, "adam", [-878.89e6, -878.90e6], recorded={"best": -878.89e6, "mean": -878.9e6, "sd": 12345.0}
        ),
        make_row("a label of several words, partial", "adam", [-1.0] * 500, settled=True, complete=False),
    ]
    text = printed(terminal.run_table(make_run(*rows), width), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "".join(text.split()).count("x") >= 40
    for row in rows:
        for line in table.cells(row).log_mass.split("\n"):
            assert line in text


def test_wide_terminals_have_one_line_per_row(example_run):
    text = printed(terminal.run_table(example_run, 160), 160)
    line = next(line for line in text.splitlines() if "Adam" in line)
    assert "best -7,021" in line and "k-hat" in text.splitlines()[1]


@pytest.mark.parametrize("width", [60, 80])
def test_the_check_table_fits(width):
    rows = [
        CheckRow("quadratic, rank 5 of 50", "matched rays", -12.721, -12.722, 0.004, -12.75, False, -0.2, "ok", 4.4),
        CheckRow(
            "ellipsoid, D = 100",
            "isotropic rays",
            -229.278,
            -340.0,
            float("inf"),
            -345.678,
            True,
            float("nan"),
            "ok",
            9.9,
        ),
        CheckRow("shell", "connected chains", -2.1, -1.0, 0.1, -1.5, False, 11.0, "off by +11.0 SE", 1.0),
    ]
    text = printed(terminal.check_table(rows), width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for part in ("-12.721", "-12.7220 ± 0.0040", "-0.2", "≥ -345.68", "isotropic", "rays", "chains", "+11.0", "off by"):
        assert part in text


class Clock:
    """Time that passes only when told to."""

    now = 0.0

    def __call__(self):
        return self.now


def test_a_log_file_gets_plain_lines(make_estimate, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(terminal.time, "perf_counter", clock)
    out = io.StringIO()
    with terminal.Reporter(Console(file=out, width=60)) as report:
        report(Progress("training", 0, 1, 0.0))
        report(Progress("training", 1, 1, 2.5))
        for done, seconds in ((0, 0.0), (10, 1.0), (20, 20.0), (30, 21.0)):
            clock.now = seconds
            estimate = make_estimate([-5.0] * done) if done else None
            report(Progress("isotropic", done, 30, seconds, estimate))
    assert out.getvalue().splitlines() == [
        "training ...",
        "training: 2.5 s",
        "isotropic: 20 of 30 rays, ≥ -8.0 nats so far",
        "isotropic: ≥ -8.0 nats, 21.0 s",
    ]


def test_chains_tell_percent_phase_and_nothing_before_there_is_something(make_estimate, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(terminal.time, "perf_counter", clock)
    out = io.StringIO()
    early, late = make_estimate([-5.0] * 8, lower=-math.inf), make_estimate([-5.0] * 8)
    with terminal.Reporter(Console(file=out, width=60)) as report:
        steps = [
            (0, None, "pilot"),
            (1, None, "pilot"),
            (9, None, "pilot"),
            (20, early, "cooling"),
            (60, late, "heating"),
        ]
        for done, estimate, phase in steps:
            clock.now += 20.0
            report(Progress("tether", done, 100, clock.now, estimate, "%", phase))
        report(Progress("tether", 100, 100, 90.0, late, "%", "heating"))
    assert out.getvalue().splitlines() == [
        "tether: 1 % (pilot)",
        "tether: 9 % (pilot)",
        "tether: 20 % (cooling)",
        "tether: 60 % (heating), ≥ -8.0 nats so far",
        "tether: ≥ -8.0 nats, 90.0 s",
    ]


def test_a_bar_for_chains_names_the_phase(make_estimate):
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True)
    with terminal.Reporter(console) as report:
        report(Progress("tether", 0, 100, 0.0, None, "%", "pilot"))
        report(Progress("tether", 1, 100, 0.0, None, "%", "pilot"))
        assert report.bar is not None
        report.bar.refresh()
        report(Progress("tether", 40, 100, 1.0, make_estimate([-5.0] * 8), "%", "cooling"))
        report.bar.refresh()
        report(Progress("tether", 100, 100, 2.0, make_estimate([-5.0] * 8), "%", "heating"))
        assert report.bar.tasks == []
    text = out.getvalue()
    assert "pilot" in text and "cooling" in text and "tether: ≥ -8.0 nats, 2.0 s" in text


def test_a_terminal_gets_a_bar_that_goes_away(make_estimate):
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True)
    with terminal.Reporter(console) as report:
        report(Progress("training", 0, 1, 0.0))
        report(Progress("training", 1, 1, 2.5))
        report(Progress("[b]odd[/b]", 0, 30, 0.0))
        report(Progress("[b]odd[/b]", 10, 30, 1.0, make_estimate([-5.0] * 10)))
        report(Progress("[b]odd[/b]", 30, 30, 2.0, make_estimate([-5.0] * 30)))
    text = out.getvalue()
    assert "[b]odd[/b]: ≥ -8.0 nats, 2.0 s" in text
    assert text.endswith("\x1b[2K") or "\x1b[?25h" in text


def test_streams_without_greek_get_ascii():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    terminal._make_encodable(stream)
    stream.write("≥ -5 ± 1, β=2e4 ☃")
    stream.flush()
    assert raw.getvalue() == b">= -5 +/- 1, beta=2e4 ?"
