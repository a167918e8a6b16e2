"""A run's figures, through matplotlib's object interface: no global state, no display needed."""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

try:
    import matplotlib.style
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
except ImportError as error:
    raise ImportError("figures need the run extra: pip install 'volumejax[run]'") from error

from volumejax.records import PARTICLES, TETHER, TUNED, Row, Run
from volumejax.table import claim, is_bound, missed, number, plus_minus, shown

INK, MUTED, RULE, PAPER = "#1f2328", "#59636e", "#d1d9e0", "#ffffff"

FAINT: dict[str, Any] = {"lw": 0.8, "alpha": 0.5}
"""The line of chains that have not mixed."""

# Okabe and Ito's palette: told apart with any colour vision, and on light and dark ground.
COLOURS = {
    "isotropic": "#7f8790",
    "adam": "#0072b2",
    "diagonal_ggn": "#d55e00",
    "dense_ggn": "#009e73",
    TETHER: "#cc79a7",
    PARTICLES: "#56b4e9",
}
OTHER_COLOUR = "#e69f00"

WIDTH = 5.2
_ARROW, _HEAD = 34.0, 9.0
"""Points that an arrow is long, and at least."""
STYLE: Sequence[Any] = (
    "default",
    {
        "font.size": 9.5,
        "text.color": INK,
        "axes.edgecolor": RULE,
        "axes.labelcolor": INK,
        "axes.labelsize": 9.5,
        "xtick.color": MUTED,
        "xtick.labelsize": 9,
        "figure.facecolor": PAPER,
        "axes.facecolor": "none",
        "svg.fonttype": "none",
        "svg.hashsalt": "volumejax",
    },
)


def figures(run: Run) -> dict[str, Figure]:
    """The figures of a run by file name: summary, and if it has rays log_mass and radius.

    Args:
        run: at least one row, with its arrays.

    Returns:
        Matplotlib figures, bound to no display.

    Raises:
        ValueError: the run has no rows.
    """
    if not run.rows:
        raise ValueError("the run has no rows, so there is nothing to draw; let at least one chunk of rays finish")
    rays = run.model_copy(update={"rows": tuple(row for row in run.rows if row.from_rays)})
    with matplotlib.style.context(STYLE):
        drawn = {"summary": _summary(run)}
        return {**drawn, "log_mass": _log_mass(rays), "radius": _radius(rays)} if rays.rows else drawn


def render(figure: Figure, kind: str) -> bytes:
    """The figure as a file.

    Args:
        figure: from `figures`.
        kind: ``png`` (180 dots per inch) or ``svg`` (text kept as text, no date, no links).

    Returns:
        The file's content.
    """
    buffer = io.BytesIO()
    silent = dict.fromkeys(("Date", "Creator", "Format", "Type")) if kind == "svg" else {"Software": None}
    with matplotlib.style.context(STYLE):
        figure.savefig(buffer, format=kind, dpi=180, metadata=silent)
    return buffer.getvalue()


def colour(row: Row) -> str:
    """The colour of the proposal's family; of a tuned row that of the curvature that its label names."""
    if row.kind != TUNED:
        return COLOURS.get(row.kind, OTHER_COLOUR)
    if "Adam" in row.label:
        return COLOURS["adam"]
    return COLOURS["diagonal_ggn" if "GGN" in row.label and "rank" not in row.label else "dense_ggn"]


def _summary(run: Run) -> Figure:
    chained = any(not row.from_rays for row in run.rows)
    figure, axes = _stack(run, row_height=0.5, top=0.66 if chained else 0.5)
    for axis, row in zip(axes, run.rows, strict=True):
        value, shade = row.estimate, colour(row)
        _heading(axis, row, claim(value))
        low, high = _spread(row)
        if math.isfinite(low) and math.isfinite(high):
            axis.plot([low, high], [0.4, 0.4], color=shade, alpha=0.3, lw=5, solid_capstyle="butt")
        lower, centre, error = (float(value[name]) for name in ("lower", "log_mass", "std_error"))
        if is_bound(value):
            if math.isfinite(lower):
                axis.plot([lower, lower], [0.12, 0.68], color=shade, lw=1.8)
        elif math.isfinite(centre):
            axis.errorbar([centre], [0.4], xerr=[[1.96 * error]] * 2, color=shade, marker="o", ms=5.5, capsize=3)
            if not row.from_rays and math.isfinite(lower):
                axis.plot([lower, centre], [0.4, 0.4], color=shade, lw=1.0)
                axis.plot([lower, lower], [0.12, 0.68], color=shade, lw=1.8)
        _published(axis, row, -0.15)
    entries = [
        Line2D([], [], color=MUTED, lw=5, alpha=0.3, label="per ray, mean ± sd"),
        Line2D([], [], color=MUTED, marker="o", ms=5, lw=1.2, label="estimate, 95 %"),
        Line2D([], [], color=MUTED, marker=">", ms=5, lw=1.2, label="at least (95 %)"),
    ]
    if chained:
        entries[0].set_label("spread")
        entries.append(Line2D([], [], color=MUTED, marker="|", ms=8, mew=1.8, lw=0, label="certified"))
    # Room for an arrow that starts at the rightmost bound.
    low, high = axes[0].get_xlim()
    high += 0.07 * (high - low)
    axes[0].set_xlim(low, high)
    points = 72.0 * figure.get_figwidth() * axes[0].get_position().width / (high - low)
    for axis, row in zip(axes, run.rows, strict=True):
        lower, upper = (float(row.estimate[name]) for name in ("lower", "upper"))
        if is_bound(row.estimate) and math.isfinite(lower):
            _arrow(axis, lower, points * (upper - lower), colour(row))
    if chained:
        entries += _gaps(run, axes)
    _finish(figure, axes, "log mass (nats)", entries + _published_entries(run))
    return figure


def _spread(row: Row) -> tuple[float, float]:
    """What the pale bar spans: single rays, mean ± sd, or the two passes of the chains."""
    value = row.estimate
    if row.from_chains:
        first, second = (float(value.get(f"hysteresis_{name}", math.nan)) for name in ("cooling", "heating"))
        # A heating pass that has not mixed may end above what a probability can be.
        return min(first, second), min(max(first, second), float(value["upper"]))
    mean, sd = float(value["mean_log_weight"]), float(value["std_log_weight"])
    return mean - sd, mean + sd


def _gaps(run: Run, axes: list[Axes]) -> list[Line2D]:
    """A dotted line from the best rays to each row of chains, with the nats between where there is room."""
    gaps = missed(run)
    low, high = axes[0].get_xlim()
    for axis, row in zip(axes, run.rows, strict=True):
        for other, best, gap in gaps:
            if other is not row:
                continue
            start = shown(best)
            axis.plot([start, start + gap], [0.4, 0.4], color=MUTED, lw=1.2, ls=":", zorder=1)
            if gap > 0.2 * (high - low):
                least = "≥ " if is_bound(row.estimate) else ""
                text = f"rays miss {least}{number(gap, 0)}"
                axis.text(start + 0.5 * gap, 0.48, text, ha="center", va="bottom", fontsize=8.5, color=MUTED)
    return [Line2D([], [], color=MUTED, lw=1.2, ls=":", label="missed by rays")] if gaps else []


def _log_mass(run: Run) -> Figure:
    figure, axes = _stack(run, row_height=0.72, top=0.5)
    for axis, row in zip(axes, run.rows, strict=True):
        value = row.estimate
        _heading(axis, row, plus_minus(value["mean_log_weight"], value["std_log_weight"]))
        _ridge(axis, row.rays["log_weight"], colour(row), {-math.inf: "no volume"})
        centre = float(value["log_mass"])
        if math.isfinite(centre):
            axis.plot([centre], [0.0], "D", color=INK, ms=4.5, mec=PAPER, mew=0.8, clip_on=False, zorder=4)
        _published(axis, row, -0.22)
    entries = [
        Line2D([], [], color=INK, mfc=MUTED, marker="o", mew=0.8, ms=4.5, lw=1.4, label="mean"),
        Line2D([], [], color=INK, marker="D", ms=4.5, lw=0, label="log mean weight"),
    ]
    _finish(figure, axes, "log mass per ray (nats)", entries + _published_entries(run))
    return figure


def _radius(run: Run) -> Figure:
    figure, axes = _stack(run, row_height=0.66, top=0.3)
    for axis, row in zip(axes, run.rows, strict=True):
        radius = np.asarray(row.rays["radius"], np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            log_radius = np.log10(radius)
        found = log_radius[np.isfinite(log_radius)]
        median = f"median {10 ** np.median(found):.3g}" if found.size else "no radius"
        _heading(axis, row, median)
        _ridge(axis, log_radius, colour(row), {math.inf: "never cross", -math.inf: "no volume"}, centre=np.median)
    entries = [Line2D([], [], color=INK, mfc=MUTED, marker="o", mew=0.8, ms=4.5, lw=1.4, label="median")]
    _finish(figure, axes, "distance from the anchor to the boundary (parameter units)", entries)
    axes[-1].xaxis.set_major_locator(FixedLocator(_round_logs(*axes[-1].get_xlim())))
    axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{10**x:.3g}"))
    return figure


def _round_logs(low: float, high: float) -> list[float]:
    """Logarithms of round numbers, at least four of them if the range holds so many."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    ticks: list[float] = []
    for mantissas in (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 5, 7),
        np.arange(1, 10, 0.5),
        np.arange(1, 10, 0.1),
    ):
        ticks = [k + math.log10(m) for k in decades for m in mantissas if low <= k + math.log10(m) <= high]
        if len(ticks) >= 4:
            break
    return ticks[:: math.ceil(len(ticks) / 8)] if ticks else []


def _stack(run: Run, *, row_height: float, top: float) -> tuple[Figure, list[Axes]]:
    """One thin axis per row, sharing x; ``top`` inches are left for the legend."""
    n, bottom = len(run.rows), 0.52
    height = top + bottom + n * row_height
    figure = Figure(figsize=(WIDTH, height))
    grid = figure.add_gridspec(n, 1, hspace=0.0, left=0.045, right=0.955, top=1 - top / height, bottom=bottom / height)
    axes: list[Axes] = []
    for i in range(n):
        axis = figure.add_subplot(grid[i], sharex=axes[0] if axes else None)
        axis.set_ylim(-0.45, 1.75)
        axis.set_yticks([])
        for side in ("top", "left", "right"):
            axis.spines[side].set_visible(False)
        axis.tick_params(axis="x", length=0, labelbottom=i == n - 1)
        axis.grid(axis="x", color=RULE, lw=0.6)
        axis.set_axisbelow(True)
        axes.append(axis)
    return figure, axes


def _heading(axis: Axes, row: Row, text: str) -> None:
    style = {"transform": axis.transAxes, "va": "top", "fontsize": 9.5}
    axis.text(0.0, 0.97, row.label.replace("$", r"\$"), ha="left", color=INK, weight="bold", **style)
    axis.text(1.0, 0.97, _minus(text), ha="right", color=MUTED, **style)


def _ridge(
    axis: Axes,
    values: Float[np.ndarray, "rays"],
    shade: str,
    outside: dict[float, str],
    centre: Callable[[Any], Any] = np.mean,
) -> None:
    """A histogram scaled to its own peak; infinite values are counted in words, not dropped in silence."""
    values = np.asarray(values, np.float64)
    finite = values[np.isfinite(values)]
    if finite.size:
        bins = int(np.clip(round(3 * finite.size ** (1 / 3)), 8, 48))
        low, high = finite.min(), finite.max()
        pad = 0.0 if high > low else max(1e-3 * abs(high), 1e-3)
        heights, edges = np.histogram(finite, bins=bins, range=(low - pad, high + pad))
        axis.stairs(heights / heights.max(), edges, fill=True, color=shade, alpha=0.55, lw=0)
        axis.stairs(heights / heights.max(), edges, color=shade, lw=1.0)
        axis.plot([centre(finite)] * 2, [0.0, 1.0], color=INK, lw=1.4, zorder=3)
        # The dot keeps the row's colour in sight where the histogram is narrower than a pixel.
        axis.plot([centre(finite)], [1.0], "o", color=shade, mec=INK, mew=0.8, ms=4.5, zorder=4)
    counts = [(word, int(np.sum(values == edge))) for edge, word in outside.items()]
    counts.append(("not a number", int(np.sum(np.isnan(values)))))
    text = ", ".join(f"{count} {word}" for word, count in counts if count)
    if text:
        axis.text(1.0, 0.66, text, transform=axis.transAxes, ha="right", va="top", fontsize=8.5, color=MUTED)


def _arrow(axis: Axes, lower: float, room: float, shade: str) -> None:
    """An arrow to the right of a bound, within so many points of it: no probability is larger than 1."""
    axis.annotate(
        "",
        xy=(lower, 0.4),
        xytext=(max(min(_ARROW, room), _HEAD), 0),
        textcoords="offset points",
        arrowprops={"arrowstyle": "<|-", "color": shade, "lw": 1.6, "shrinkA": 0, "shrinkB": 0},
    )


def _published(axis: Axes, row: Row, height: float) -> None:
    """The recorded values: mean ± sd as an open circle on a line, the best ray as a triangle."""
    mean, sd, best = (row.recorded.get(name) for name in ("mean", "sd", "best"))
    if mean is not None:
        axis.plot([mean - (sd or 0.0), mean + (sd or 0.0)], [height] * 2, color=INK, lw=0.9, zorder=3)
        axis.plot([mean], [height], "o", color=INK, mfc=PAPER, ms=4.5, mew=1.0, zorder=4)
    if best is not None:
        axis.plot([best], [height], "^", color=INK, mfc=PAPER, ms=5, mew=1.0, zorder=4)


def _published_entries(run: Run) -> list[Line2D]:
    style: Any = {"color": INK, "mfc": PAPER}
    entries = []
    if any("mean" in row.recorded for row in run.rows):
        entries.append(Line2D([], [], marker="o", ms=4.5, lw=0.9, label="recorded, mean ± sd", **style))
    if any("best" in row.recorded for row in run.rows):
        entries.append(Line2D([], [], marker="^", ms=5, lw=0, label="recorded, best ray", **style))
    return entries


def _finish(figure: Figure, axes: list[Axes], label: str, entries: list[Line2D]) -> None:
    """The shared x axis and the legend."""
    axes[-1].set_xlabel(label)
    axes[-1].xaxis.set_major_locator(MaxNLocator(6))
    axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: _minus(f"{x:,.6g}")))
    figure.legend(
        handles=entries,
        loc="upper left",
        bbox_to_anchor=(0.04, 1.0),
        ncols=3 if len(entries) > 4 else 2,
        frameon=False,
        fontsize=8.5,
        labelcolor=MUTED,
        borderaxespad=0.2,
        handletextpad=0.5,
        columnspacing=1.4,
    )


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
