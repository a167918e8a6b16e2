"""The figures of a series: prior and volume terms over the training, log mass over the cutoff and over the damping."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

try:
    import matplotlib.style
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ImportError as error:
    raise ImportError("figures need the run extra: pip install 'volumejax[run]'") from error

from volumejax.plots import COLOURS, INK, MUTED, OTHER_COLOUR, PAPER, RULE, STYLE, WIDTH
from volumejax.records import Row, Run

_DASHES: Sequence[Any] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5)))
_MARKERS = "os^D"


def figures(run: Run) -> dict[str, Figure]:
    """The figures that the rows' positions ask for, by file name: training, cutoffs, dampings; none without positions.

    Args:
        run: the rows of a series.

    Returns:
        Matplotlib figures, bound to no display.
    """
    drawn = {}
    with matplotlib.style.context(STYLE):
        if _spans(run.rows, "step"):
            drawn["training"] = _training(run)
        if _spans(run.rows, "cutoff"):
            drawn["cutoffs"] = _cutoffs(run)
        damped = [row for row in run.rows if "damping" in row.position and "beta" not in row.position]
        if _spans(damped, "damping"):
            drawn["dampings"] = _dampings(run, damped)
    return drawn


def _spans(rows: Sequence[Row], name: str) -> bool:
    return len({row.position[name] for row in rows if name in row.position}) > 1


def _training(run: Run) -> Figure:
    """Log mass, and below it its two parts, each on a scale of its own."""
    figure, axes = _panels(3, top=0.25 + 0.17 * math.ceil(len(_methods(run.rows)) / 2))
    entries = []
    for i, (name, rows) in enumerate(_methods(run.rows).items()):
        rows = sorted(rows, key=lambda row: row.position["step"])
        x = [1.0 + row.position["step"] for row in rows]
        style = _look(rows[0], i)
        _band(axes[0], x, rows, style, 0.0)
        # The spread of single rays moves with the volume term; the prior term is exact.
        prior = np.array([float(row.estimate["prior_term"]) for row in rows])
        _band(axes[1], x, rows, style, -prior)
        axes[2].plot(x, prior, color=INK, marker="o", ms=3.5, lw=1.2)
        entries.append(Line2D([], [], label=name, **style))
    for axis, label in zip(axes, ("log mass", "volume term", "prior term"), strict=True):
        axis.set_ylabel(f"{label} (nats)")
    axes[-1].set_xscale("log")
    axes[-1].set_xlabel("1 + training step")
    _legend(figure, entries)
    return figure


def _cutoffs(run: Run) -> Figure:
    """Log mass over the cutoff, one line per proposal; only the round and the tuned ones of a longer list."""
    methods = _methods(row for row in run.rows if row.position.get("cutoff") is not None)
    if len(methods) > 6:
        methods = {name: rows for name, rows in methods.items() if rows[0].kind in ("isotropic", "tuned")} or methods
    figure, (axis,) = _panels(1, top=0.25 + 0.17 * math.ceil(len(methods) / 2))
    entries = []
    for i, (name, rows) in enumerate(methods.items()):
        rows = sorted(rows, key=lambda row: row.position["cutoff"])
        style = _look(rows[0], i)
        _band(axis, [row.position["cutoff"] for row in rows], rows, style, 0.0)
        entries.append(Line2D([], [], label=name, **style))
    axis.set_xscale("log")
    axis.set_xlabel("cutoff (nats)")
    axis.set_ylabel("log mass (nats)")
    _legend(figure, entries)
    return figure


def _dampings(run: Run, damped: Sequence[Row]) -> Figure:
    """Log mass over the damping at the run's own cutoff, one line per exponent; what the others reach as levels."""
    cutoffs = {row.position.get("cutoff", run.cutoff) for row in damped}
    cutoff = min(cutoffs, key=lambda c: abs(math.log(c / run.cutoff)))

    def here(row: Row) -> bool:
        return row.position.get("cutoff", run.cutoff) == cutoff

    groups: dict[tuple[str, float], list[Row]] = {}
    for row in filter(here, damped):
        groups.setdefault((row.kind, row.position.get("exponent", 0.5)), []).append(row)
    levels = [row for row in run.rows if here(row) and row.kind in ("isotropic", "tuned")]
    figure, (axis,) = _panels(1, top=0.25 + 0.17 * math.ceil((len(groups) + len(levels)) / 2))
    entries = []
    for i, ((kind, exponent), rows) in enumerate(groups.items()):
        rows = sorted(rows, key=lambda row: row.position["damping"])
        style = _look(rows[0], i)
        _band(axis, [row.position["damping"] for row in rows], rows, style, 0.0)
        name = {"adam": "Adam", "diagonal_ggn": "diagonal GGN"}.get(kind, kind)
        entries.append(Line2D([], [], label=f"{name}, power {exponent:g}", **style))
    for i, row in enumerate(levels):
        style = {"color": _shade(row), "ls": _DASHES[(i + 1) % len(_DASHES)], "lw": 1.2}
        axis.axhline(float(row.estimate["mean_log_weight"]), **style)
        entries.append(Line2D([], [], label=row.label, **style))
    axis.set_xscale("log")
    axis.set_xlabel(f"damping (units of the curvature's power), cutoff {cutoff:g} nats")
    axis.set_ylabel("log mass (nats)")
    _legend(figure, entries)
    return figure


def _band(axis: Axes, x: Sequence[float], rows: Sequence[Row], style: dict[str, Any], shift: Any) -> None:
    """Mean over rays with a band of one standard deviation, and the log mean weight as dots."""
    mean, spread, log_mass = (
        np.array([float(row.estimate[name]) for row in rows])
        for name in ("mean_log_weight", "std_log_weight", "log_mass")
    )
    # Where a ray has no volume the mean is −inf and the spread +inf: no band there.
    spread = np.where(np.isfinite(mean), spread, 0.0)
    axis.fill_between(x, mean - spread + shift, mean + spread + shift, color=style["color"], alpha=0.18, lw=0)
    axis.plot(x, mean + shift, **style)
    axis.plot(x, log_mass + shift, ls="", marker="D", ms=3.5, color=style["color"], mec=PAPER, mew=0.6)


def _methods(rows: Any) -> dict[str, list[Row]]:
    """Rows by what made them: the label without its place in the series."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        name = row.label.split(", step ")[0].split(", ε=")[0]
        groups.setdefault(name, []).append(row)
    return groups


def _shade(row: Row) -> str:
    """The colour of the family, for a tuned row that of the curvature in its label."""
    if row.kind != "tuned":
        return COLOURS.get(row.kind, OTHER_COLOUR)
    return COLOURS["adam" if "Adam" in row.label else "diagonal_ggn" if "GGN" in row.label else "dense_ggn"]


def _look(row: Row, index: int) -> dict[str, Any]:
    return {
        "color": _shade(row), "ls": _DASHES[index % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)], "ms": 4, "lw": 1.4,
    }  # fmt: skip


def _panels(number: int, *, top: float) -> tuple[Figure, list[Axes]]:
    bottom, height = 0.5, 1.7 if number > 1 else 2.8
    total = top + bottom + number * height
    figure = Figure(figsize=(WIDTH, total))
    grid = figure.add_gridspec(
        number, 1, hspace=0.12, left=0.17, right=0.97, top=1 - top / total, bottom=bottom / total
    )
    axes: list[Axes] = []
    thousands: Callable[[float, Any], str] = lambda y, _: f"{y:,.6g}".replace("-", "\N{MINUS SIGN}")  # noqa: E731
    for i in range(number):
        axis = figure.add_subplot(grid[i], sharex=axes[0] if axes else None)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        axis.grid(color=RULE, lw=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelbottom=i == number - 1, length=0, labelcolor=MUTED)
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.yaxis.set_major_formatter(FuncFormatter(thousands))
        axes.append(axis)
    return figure, axes


def _legend(figure: Figure, entries: list[Line2D]) -> None:
    entries.append(Line2D([], [], ls="", marker="D", ms=3.5, color=MUTED, label="log mean weight"))
    figure.legend(
        handles=entries, loc="upper left", bbox_to_anchor=(0.04, 1.0), ncols=2, frameon=False, fontsize=8.5,
        labelcolor=MUTED, borderaxespad=0.2, handletextpad=0.5, columnspacing=1.4,
    )  # fmt: skip
