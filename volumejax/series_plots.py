"""The figures of a series: prior and volume terms over the training, log mass over cutoff, damping and exponent."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

try:
    import matplotlib.style
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.path import Path
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
except ImportError as error:
    raise ImportError("figures need the run extra: pip install 'volumejax[run]'") from error

from volumejax.plots import COLOURS, INK, MUTED, OTHER_COLOUR, RULE, STYLE, WIDTH, colour
from volumejax.records import TETHER, TUNED, Row, Run
from volumejax.table import headline, is_bound, method

_DASHES: Sequence[Any] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5)))
_MARKERS = "os^D"
_FAMILY = {"adam": "Adam", "diagonal_ggn": "diagonal GGN"}
_SPARE = (OTHER_COLOUR, COLOURS[TETHER], COLOURS["dense_ggn"], COLOURS["diagonal_ggn"])
"""Colours of the second and further lines of one family, which are all about the same moments."""
UPWARD = Path(
    [(-0.5, 0.0), (0.5, 0.0), (0.0, 0.0), (0.0, 1.5), (-0.4, 0.95), (0.0, 1.5), (0.4, 0.95)],
    [Path.MOVETO, Path.LINETO, Path.MOVETO, Path.LINETO, Path.MOVETO, Path.LINETO, Path.LINETO],
)
"""An arrow that stands on a bound."""
_ARROW: dict[str, Any] = {"ls": "", "marker": UPWARD, "ms": 15, "mew": 1.3, "mfc": "none"}


def figures(run: Run) -> dict[str, Figure]:
    """The figures that the rows ask for, by file name: training, cutoffs, dampings, exponents; none without a series.

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
        here = headline(run)
        damped = [row for row in here if "damping" in row.position and row.kind != TUNED]
        if _spans(damped, "damping"):
            drawn["dampings"] = _dampings(run, damped)
        if any(_num_exponents(row) > 1 for row in here):
            drawn["exponents"] = _exponents(run)
    return drawn


def _spans(rows: Sequence[Row], name: str) -> bool:
    return len({row.position[name] for row in rows if name in row.position}) > 1


def _num_exponents(row: Row) -> int:
    """How many powers the candidates of a tuned row have; 0 for any other. β = 0 has no power."""
    return len(np.unique(row.sweep["exponent"][row.sweep["beta"] > 0.0])) if row.sweep else 0


def _training(run: Run) -> Figure:
    """Log mass, and below it its two parts, each on a scale of its own."""
    methods = _methods(run.rows)
    keys = _keys(run.rows)
    figure, axes = _panels(3, entries=len(methods) + len(keys))
    entries: list[Line2D | Patch] = []
    for i, (name, rows) in enumerate(methods.items()):
        rows = sorted(rows, key=lambda row: row.position["step"])
        x = [row.position["step"] for row in rows]
        style = _look(rows[0], i)
        _line(axes[0], x, rows, style, 0.0)
        # The spread of single rays moves with the volume term; the prior term is exact.
        prior = np.array([float(row.estimate["prior_term"]) for row in rows])
        _line(axes[1], x, rows, style, -prior)
        axes[2].plot(x, prior, color=INK, marker="o", ms=3.5, lw=1.2)
        entries.append(Line2D([], [], label=name, **style))
    for axis, label in zip(axes, ("log mass", "volume term", "prior term"), strict=True):
        axis.set_ylabel(f"{label} (nats)")
    # A logarithm that has room for step 0.
    axes[-1].set_xscale("function", functions=(lambda t: np.log1p(np.maximum(t, -0.9)), np.expm1))
    steps = sorted({row.position["step"] for row in run.rows if "step" in row.position})
    axes[-1].xaxis.set_major_locator(FixedLocator(steps[:: -(-len(steps) // 10)]))
    axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{t:,.0f}"))
    axes[-1].set_xlabel("training step")
    _legend(figure, entries + keys)
    return figure


def _cutoffs(run: Run) -> Figure:
    """Log mass over the cutoff, one line per proposal; only the round and the tuned ones of a longer list."""
    last = max((row.position.get("step", math.inf) for row in run.rows), default=math.inf)
    methods = _methods(
        row for row in run.rows if "cutoff" in row.position and row.position.get("step", math.inf) == last
    )
    if len(methods) > 6:
        methods = {name: rows for name, rows in methods.items() if rows[0].kind in ("isotropic", TUNED)} or methods
    keys = _keys([row for rows in methods.values() for row in rows])
    figure, (axis,) = _panels(1, entries=len(methods) + len(keys))
    entries: list[Line2D | Patch] = []
    for i, (name, rows) in enumerate(methods.items()):
        rows = sorted(rows, key=lambda row: row.position["cutoff"])
        style = _look(rows[0], i)
        _line(axis, [row.position["cutoff"] for row in rows], rows, style, 0.0)
        entries.append(Line2D([], [], label=name, **style))
    axis.set_xscale("log")
    axis.set_xlabel("cutoff (nats)")
    axis.set_ylabel("log mass (nats)")
    _legend(figure, entries + keys)
    return figure


def _dampings(run: Run, damped: Sequence[Row]) -> Figure:
    """Log mass over the damping, one line per exponent; what the others reach as levels."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in damped:
        groups.setdefault((row.kind, row.position.get("exponent", 0.5)), []).append(row)
    groups = {name: rows for name, rows in groups.items() if _spans(rows, "damping")} or groups
    keys = _keys([row for rows in groups.values() for row in rows])
    levels = [row for row in headline(run) if row.kind in ("isotropic", TUNED)]
    figure, (axis,) = _panels(1, entries=len(groups) + len(levels) + len(keys))
    entries: list[Line2D | Patch] = []
    kinds: list[str] = []
    for i, ((kind, exponent), rows) in enumerate(groups.items()):
        rows = sorted(rows, key=lambda row: row.position["damping"])
        style = _look(rows[0], i)
        if kind in kinds:
            style["color"] = _SPARE[(kinds.count(kind) - 1) % len(_SPARE)]
        kinds.append(kind)
        _line(axis, [row.position["damping"] for row in rows], rows, style, 0.0)
        entries.append(Line2D([], [], label=f"{_FAMILY.get(kind, kind)}, power {exponent:g}", **style))
    for i, row in enumerate(levels):
        style = {"color": colour(row), "ls": _DASHES[(i + 1) % len(_DASHES)], "lw": 1.2}
        axis.axhline(float(row.estimate["mean_log_weight"]), **style)
        entries.append(Line2D([], [], label=f"{method(row)}, mean", **style))
    axis.set_xscale("log")
    axis.set_xlabel(f"damping (units of the curvature's power), {_place(damped[0], run)}")
    axis.set_ylabel("log mass (nats)")
    _legend(figure, entries + keys)
    return figure


def _exponents(run: Run) -> Figure:
    """The best that pilot rays found for each exponent, over all β, dampings and shifts; all powers beside it."""
    here = headline(run)
    tuned = [row for row in here if _num_exponents(row) > 1]
    fixed: dict[str, list[Row]] = {}
    for row in here:
        if row.kind != TUNED and "exponent" in row.position:
            fixed.setdefault(f"{_FAMILY.get(row.kind, row.kind)} {row.position['damping']:g}", []).append(row)
    fixed = {name: rows for name, rows in fixed.items() if len(rows) > 2}
    keys = _keys([row for rows in fixed.values() for row in rows])
    figure, (axis,) = _panels(1, entries=len(tuned) + len(fixed) + len(keys))
    entries: list[Line2D | Patch] = []
    for i, row in enumerate(tuned):
        style = {**_look(row, i), "mfc": "none"}
        powers = np.unique(row.sweep["exponent"][row.sweep["beta"] > 0.0])
        found = [_best_candidate(row, power) for power in powers]
        mean, error = (row.sweep[name][found] for name in ("mean_log_weight", "std_error"))
        axis.errorbar(powers, mean, np.where(np.isfinite(error), error, 0.0), capsize=2.5, **style)
        entries.append(Line2D([], [], label=f"{method(row)}, best of the pilot", **style))
    for i, (name, rows) in enumerate(fixed.items()):
        rows = sorted(rows, key=lambda row: row.position["exponent"])
        style = {**_look(rows[0], len(tuned) + i), "color": _SPARE[i % len(_SPARE)]}
        _line(axis, [row.position["exponent"] for row in rows], rows, style, 0.0)
        entries.append(Line2D([], [], label=name, **style))
    axis.set_xlabel(f"exponent of the curvature, {_place(tuned[0], run)}")
    axis.set_ylabel("log mass (nats)")
    _legend(figure, entries + keys)
    return figure


def _best_candidate(row: Row, power: float) -> int:
    of_power = (row.sweep["exponent"] == power) & (row.sweep["beta"] > 0.0)
    mean = np.where(of_power, row.sweep["mean_log_weight"], -np.inf)
    return int(np.argmax(np.where(np.isnan(mean), -np.inf, mean)))


def _place(row: Row, run: Run) -> str:
    step = f"step {row.position['step']:g}, " if "step" in row.position else ""
    return f"{step}cutoff {row.position.get('cutoff', run.cutoff):g} nats"


def _line(axis: Axes, x: Sequence[float], rows: Sequence[Row], style: dict[str, Any], shift: Any) -> None:
    """Mean over rays with a band of one standard deviation, and what may be claimed: a bound, or an interval."""
    mean, spread, lower, log_mass, error = (
        np.array([float(row.estimate[name]) for row in rows])
        for name in ("mean_log_weight", "std_log_weight", "lower", "log_mass", "std_error")
    )
    # Where a ray has no volume the mean is −inf and the spread +inf: no band there.
    spread = np.where(np.isfinite(mean), spread, 0.0)
    axis.fill_between(x, mean - spread + shift, mean + spread + shift, color=style["color"], alpha=0.18, lw=0)
    axis.plot(x, mean + shift, **style)
    bound = np.array([is_bound(row.estimate) for row in rows])
    axis.plot(x, np.where(bound & np.isfinite(lower), lower, np.nan) + shift, color=style["color"], **_ARROW)
    sure = np.where(bound, np.nan, log_mass)
    if np.any(np.isfinite(sure)):
        bars = np.where(bound, 0.0, 1.96 * error)
        axis.errorbar(x, sure + shift, bars, ls="", marker="o", ms=5, capsize=3, color=style["color"], mec=INK)


def _methods(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by what made them: the label without its place in the series."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(method(row), []).append(row)
    return groups


def _look(row: Row, index: int) -> dict[str, Any]:
    return {
        "color": colour(row), "ls": _DASHES[index % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)], "ms": 4, "lw": 1.4,
    }  # fmt: skip


def _panels(number: int, *, entries: int) -> tuple[Figure, list[Axes]]:
    """Panels that share x, below a legend of so many entries in two columns."""
    bottom, height, top = 0.5, 1.7 if number > 1 else 2.8, 0.2 + 0.17 * -(-entries // 2)
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
        axis.margins(y=0.1)  # for the arrows
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.yaxis.set_major_formatter(FuncFormatter(thousands))
        axes.append(axis)
    return figure, axes


def _keys(rows: Sequence[Row]) -> list[Line2D | Patch]:
    """What `_line` draws for such rows beside the line itself."""
    made: list[Line2D | Patch] = []
    if rows:
        made.append(Patch(color=MUTED, alpha=0.25, lw=0, label="single rays, mean ± sd"))
    if any(is_bound(row.estimate) for row in rows):
        made.append(Line2D([], [], color=MUTED, label="at least (95 %)", **{**_ARROW, "ms": 9}))
    if not all(is_bound(row.estimate) for row in rows):
        made.append(Line2D([], [], ls="", marker="o", ms=5, color=MUTED, mec=INK, label="estimate, 95 %"))
    return made


def _legend(figure: Figure, entries: Sequence[Line2D | Patch]) -> None:
    figure.legend(
        handles=entries, loc="upper left", bbox_to_anchor=(0.04, 1.0), ncols=2, frameon=False, fontsize=8.5,
        labelcolor=MUTED, borderaxespad=0.2, handletextpad=0.5, columnspacing=1.4,
    )  # fmt: skip
