"""What a run looks like in a terminal: progress and tables that fit its width."""

import codecs
import io
import math
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

try:
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as ProgressBar
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise ImportError("the command line needs the run extra: pip install 'volumejax[run]'") from error

from volumejax import table
from volumejax.records import Run

if TYPE_CHECKING:  # these import JAX, which the first line on the screen must not wait for
    from volumejax.check import CheckRow
    from volumejax.experiment import Progress

HEARTBEAT = 10.0
"""Seconds between two lines of one stage where the output is a file and not a terminal."""

_STACKS = (
    ("method", "chosen"),
    ("log_mass", "lower", "log_mean"),
    ("quoted", "exact", "off"),
    ("hot", "cold", "r_hat"),
    ("per_ray", "passes", "recorded"),
    ("ess", "pareto_k", "half"),
    ("evaluations", "seconds"),
)
"""Cells that share a column of a narrow table, from top to bottom."""

_ASCII = {"≥": ">=", "±": "+/-", "β": "beta", "λ": "lambda", "̂": "^", "—": "-", "−": "-"}


def console(*, stderr: bool = False) -> Console:
    """A console that takes text literally and never fails on a character that the stream cannot hold.

    Args:
        stderr: whether to write there instead of to stdout.
    """
    made = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    _make_encodable(made.file)
    return made


def run_table(run: Run, width: int) -> Table:
    """The result of a run, laid out for a terminal of the given width; nothing is cut off.

    Args:
        run: the result.
        width: columns of the terminal.

    Returns:
        One line per row where they fit, else stacked cells, else a list.
    """
    rows = [table.cells(row) for row in run.rows]
    columns = table.filled(rows)
    for layout in (_wide, _stacked):
        made = layout(rows, columns)
        if _least_width(made) <= width:
            return made
    return _list(rows, columns)


def check_table(rows: Iterable["CheckRow"]) -> Table:
    """Truth, result and verdict of each problem with a known answer."""
    lines = []
    for row in rows:
        if row.is_bound:
            result, deviation = f"≥ {table.round_down(row.lower, 2)}", ""
        else:
            result, deviation = table.plus_minus(row.log_mass, row.std_error), f"{row.deviation:+.1f}"
        problem = f"{row.name}\n{row.method}"
        lines.append((problem, table.number(row.truth, 3), result, deviation, row.verdict))
    return _grid(("problem", "truth", "log mass", "SE off", "verdict"), lines, wrapped=(0, 4), show_lines=True)


class Reporter:
    """Shows a line per finished stage, and a bar for the current one, or a line now and then off a terminal.

    Args:
        out: where to show it.
    """

    def __init__(self, out: Console) -> None:
        """Prepare a bar if the console is a terminal."""
        self.out = out
        self.spoke = time.perf_counter()
        self.bar: ProgressBar | None = None
        if out.is_terminal:
            self.bar = ProgressBar(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=10),
                TextColumn("{task.fields[counted]}"),
                TimeElapsedColumn(),
                console=out,
                transient=True,
            )
        self.stage: Any = None

    def __enter__(self) -> "Reporter":
        """Start the bar."""
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar and give the cursor back."""
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, progress: "Progress") -> None:
        """Take note of where the run stands."""
        finished = progress.done >= progress.total
        if self.bar is not None:
            self._move_bar(self.bar, progress, finished)
        if finished:
            self._say(f"{progress.stage}: {_so_far(progress)}{progress.seconds:.1f} s")
        elif self.bar is None and progress.total == 1:
            self._say(f"{progress.stage} ...")
        elif self.bar is None and progress.done and time.perf_counter() - self.spoke > HEARTBEAT:
            so_far = _so_far(progress)
            numbers = f", {so_far.removesuffix(', ')} so far" if so_far else ""
            phase = f" ({progress.phase})" if progress.phase else ""
            self._say(f"{progress.stage}: {_counted(progress)}{phase}{numbers}")

    def _say(self, line: str) -> None:
        self.out.print(Text(line), soft_wrap=True)
        self.spoke = time.perf_counter()

    def _move_bar(self, bar: ProgressBar, progress: "Progress", finished: bool) -> None:
        if progress.done == 0:
            counts = progress.total > 1
            self.stage = bar.add_task(progress.stage, total=progress.total if counts else None, counted="")
        elif finished:
            bar.remove_task(self.stage)
        else:
            description = f"{progress.stage} {_so_far(progress).removesuffix(', ')}"
            counted = progress.phase or f"{progress.done}/{progress.total}"
            bar.update(self.stage, completed=progress.done, description=description, counted=counted)


def _counted(progress: "Progress") -> str:
    return f"{progress.done} %" if progress.unit == "%" else f"{progress.done} of {progress.total} {progress.unit}"


def _so_far(progress: "Progress") -> str:
    """What has been found; nothing while chains have not felt the region yet."""
    if progress.estimate is None:
        return ""
    value = progress.estimate.to_dict()
    if table.is_bound(value) and progress.unit == "%" and not math.isfinite(float(value["lower"])):
        return ""
    return f"{table.claim(value, unit=' nats')}, "


def _wide(rows: list[table.Cells], columns: Sequence[str]) -> Table:
    def pick(row: table.Cells) -> tuple[str, ...]:
        return tuple(getattr(row, name) for name in columns)

    made = _grid(pick(table.HEADERS), [pick(row) for row in rows])
    made.columns[0].min_width = min(24, max(len(row.method) for row in [*rows, table.HEADERS]))
    return made


def _stacked(rows: list[table.Cells], columns: Sequence[str]) -> Table:
    stacks = [[name for name in stack if name in columns] for stack in _STACKS]

    def pile(row: table.Cells) -> tuple[str, ...]:
        # An empty cell keeps its line, so that what stands below it stays level with its header.
        return tuple("\n".join(getattr(row, name) for name in stack).rstrip() for stack in stacks if stack)

    return _grid(pile(table.HEADERS), [pile(row) for row in rows], show_lines=True)


def _list(rows: list[table.Cells], columns: Sequence[str]) -> Table:
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    made.add_column(overflow="fold", no_wrap=False)
    made.add_column(overflow="fold", no_wrap=False)
    for row in rows:
        made.add_row(Text(table.HEADERS.method), Text(row.method, style="bold"))
        for name in columns[1:]:
            if getattr(row, name):
                made.add_row(getattr(table.HEADERS, name), getattr(row, name))
        made.add_row("", "")
    return made


def _grid(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    wrapped: Sequence[int] = (0,),
    show_lines: bool = False,
) -> Table:
    """A table in which words may wrap in the columns ``wrapped``, while numbers keep their full width."""
    style = box.HORIZONTALS if show_lines else box.SIMPLE_HEAD
    made = Table(box=style, show_lines=show_lines, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for i, header in enumerate(headers):
        cells = [row[i] for row in [headers, *rows]]
        if i in wrapped:
            longest = max(len(word) for cell in cells for word in cell.split())
            made.add_column(header, overflow="fold", min_width=min(12, longest))
        else:
            longest = max(len(line) for cell in cells for line in cell.split("\n"))
            made.add_column(header, justify="right", no_wrap=True, min_width=longest)
    for row in rows:
        made.add_row(*row)
    return made


def _least_width(made: Table) -> int:
    return Console(width=1000).measure(made).minimum


def _make_encodable(stream: TextIO | Any) -> None:
    codecs.register_error("volumejax", _in_ascii)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="volumejax")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_ASCII.get(character, "?") for character in text), error.end
