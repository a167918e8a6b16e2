import io

import pytest
from rich.console import Console

from volumejax import table, terminal
from volumejax.check import CheckRow
from volumejax.experiment import Progress


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
        proposal, *numbers = table.cells(row)
        for cell in numbers:
            for line in cell.split("\n"):
                assert line in text, (line, text)
        for word in proposal.split():
            assert word in text


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
        CheckRow("quadratic, rank 5 of 50", "matched", -12.721, -12.722, 0.004, -12.75, False, -0.2, "ok", 4.4),
        CheckRow(
            "ellipsoid, D = 100", "isotropic", -229.278, -340.0, float("inf"), -345.678, True, float("nan"), "ok", 9.9
        ),
        CheckRow("shell", "isotropic", -2.1, -1.0, 0.1, -1.5, False, 11.0, "off by +11.0 SE", 1.0),
    ]
    text = printed(terminal.check_table(rows), width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for part in ("-12.721", "-12.7220 ± 0.0040", "-0.2", "≥ -345.68", "isotropic", "rays", "+11.0", "off by"):
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
