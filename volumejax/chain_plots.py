"""The figures of a run's chains: log mass over the cutoff with its slope, and what happened rung by rung."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

try:
    import matplotlib.style
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
except ImportError as error:
    raise ImportError("figures need the run extra: pip install 'volumejax[run]'") from error

from volumejax.plots import FAINT, INK, MUTED, PAPER, RULE, STYLE, WIDTH, colour
from volumejax.records import Row, Run
from volumejax.table import is_mixed

_DASHES: Sequence[Any] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5)))
_MARKERS = "os^D"
_LEFT, _RIGHT = 0.78, 0.14
"""Margins in inches."""
_HEATING = 1
_SHOWN = 24
"""Marks on one line, at most; a ladder may have hundreds of rungs."""


class _Look(NamedTuple):
    """How one row of chains is drawn; rows of one colour differ in dash and mark."""

    shade: str
    dash: Any
    mark: str


def figures(run: Run) -> dict[str, Figure]:
    """The figures of the rows that chains made, by file name: curve and ladder; none without such rows.

    Args:
        run: with its arrays. A row without a curve, from chains that were interrupted or asked for none, is left out of
            it.

    Returns:
        Matplotlib figures, bound to no display.
    """
    chains = [row for row in run.rows if row.from_chains]
    finished = [row for row in chains if len(row.chains.get("curve_cutoffs", ())) > 1]
    with matplotlib.style.context(STYLE):
        drawn = {"curve": _curve(finished)} if finished else {}
        return {**drawn, "ladder": _ladder(chains, _dimension(run))} if chains else drawn


def _curve(rows: list[Row]) -> Figure:
    """Log mass over the cutoff; below it λ̂ and heat capacity at the cutoff that their temperature stands for.

    The lower panel is left out where no row has mixed.
    """
    mixed = any(map(is_mixed, rows))
    heights = (2.1, 1.7) if mixed else (2.1,)
    figure, panels = _panels(heights=heights, top=0.22 + 0.17 * len(rows), gap=0.1)
    upper, lower = panels[0], panels[-1]
    if mixed:
        lower.sharex(upper)
    looks = [_look(row, i) for i, row in enumerate(rows)]
    for row, look in zip(rows, looks, strict=True):
        arrays = {name: np.asarray(values, np.float64) for name, values in row.chains.items()}
        cutoffs, log_mass, error = (arrays[f"curve_{name}"] for name in ("cutoffs", "log_mass", "std_error"))
        good = (cutoffs > 0) & np.isfinite(log_mass)
        if not is_mixed(row):
            order = np.argsort(cutoffs[good])
            upper.plot(cutoffs[good][order], log_mass[good][order], color=look.shade, ls=look.dash, **FAINT)
            continue
        band = np.where(np.isfinite(error), 1.96 * error, 0.0)
        upper.fill_between(
            cutoffs[good], (log_mass - band)[good], (log_mass + band)[good], color=look.shade, alpha=0.3, lw=0
        )
        _line(upper, cutoffs, log_mass, good, look)
        with np.errstate(divide="ignore", invalid="ignore"):
            reached = arrays["energies"] / arrays["betas"]
        # The hot end of the ladder stands for cutoffs far beyond the one asked for.
        inside = (reached >= 0.7 * cutoffs.min()) & (reached <= 1.4 * cutoffs.max())
        energies, error = arrays["energies"], arrays["energy_errors"]
        good = inside & np.isfinite(energies)
        band = np.where(np.isfinite(error), 1.96 * error, 0.0)
        order = np.argsort(reached[good])
        lower.fill_between(
            reached[good][order],
            (energies - band)[good][order],
            (energies + band)[good][order],
            color=look.shade,
            alpha=0.3,
            lw=0,
        )
        _line(lower, reached, energies, good, look)
        heat = arrays["heat_capacities"]
        good = _thinned(inside & np.isfinite(heat))
        lower.plot(reached[good], heat[good], look.mark, color=INK, mfc=PAPER, ms=4.0, mew=0.9, lw=0, zorder=3)
    upper.set_xscale("log")
    upper.set_ylabel("log mass (nats)")
    if mixed:
        upper.tick_params(axis="x", which="both", labelbottom=False, length=0)
        lower.set_ylabel("slope")
    lower.set_xlabel("cutoff (nats)")
    _number(*panels)
    lower.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 3.0)))
    lower.xaxis.set_minor_locator(NullLocator())
    lower.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
    entries = [
        Line2D([], [], color=look.shade, ls=look.dash, marker=look.mark, ms=4, lw=1.6, label=_literal(row.label))
        if is_mixed(row)
        else Line2D([], [], color=look.shade, ls=look.dash, label=_literal(f"{row.label}, not mixed"), **FAINT)
        for row, look in zip(rows, looks, strict=True)
    ]
    hollow: Any = {"color": INK, "mfc": PAPER, "ms": 4, "mew": 0.9, "lw": 0}
    _legend(figure, entries, columns=1)
    inset = [
        Line2D([], [], color=MUTED, marker="o", ms=4, lw=1.6, label="learning coefficient"),
        Line2D([], [], marker="o", label="heat capacity", **hollow),
    ]
    if mixed:
        lower.legend(handles=inset, frameon=False, fontsize=8.5, labelcolor=MUTED, loc="best", handletextpad=0.5)
    return figure


def _ladder(rows: list[Row], dimension: float) -> Figure:
    """For each row the tether profile, and below it how well the chains moved on each rung."""
    heights = (1.5, 1.0) * len(rows)
    figure, axes = _panels(heights=heights, top=0.42, gap=0.56)
    for i, row in enumerate(rows):
        upper, lower = axes[2 * i : 2 * i + 2]
        lower.sharex(upper)
        look = _look(row, 0)
        arrays = {name: np.asarray(values, np.float64) for name, values in row.chains.items()}
        precision = arrays["precision"]
        felt = precision > 0
        profile = precision * arrays["mean_square"] / dimension
        for which, style in enumerate(_passes(look)):
            for axis, values in ((upper, profile[which]), (lower, arrays["acceptance"][which])):
                good = felt & np.isfinite(values)
                good = _thinned(good) if which == _HEATING else good
                axis.plot(precision[good], values[good], **style)
        between = np.sqrt(precision[:-1] * precision[1:])
        good = (between > 0) & np.isfinite(arrays["overlap"])
        lower.plot(between[good], arrays["overlap"][good], color=INK, lw=1.2, ls=(0, (4, 2)))
        if felt.any():
            upper.set_xscale("log")
            # The tether is let go from left to right.
            upper.set_xlim(2.0 * precision[felt].max(), 0.5 * precision[felt].min())
        least, most = upper.get_ylim()
        least = min(0.0, least)
        upper.set_ylim(least, most + 0.04 * (most - least))
        lower.set_ylim(-0.06, 1.06)
        upper.set_title(_literal(row.label), loc="left", fontsize=9.5, fontweight="bold", color=INK, pad=4)
        upper.set_ylabel("a⟨δ²⟩ / D")
        lower.set_ylabel("share")
        upper.tick_params(axis="x", which="both", labelbottom=False, length=0)
        lower.xaxis.set_major_locator(LogLocator(10, numticks=7))
        lower.xaxis.set_minor_locator(NullLocator())
        lower.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:.3g}"))
        _number(upper, lower)
        lower.set_yticks([0.0, 0.5, 1.0])
    axes[-1].set_xlabel("precision a: tether and prior (whitened coordinates)")
    shade = colour(rows[0])
    entries = [
        Line2D([], [], color=shade, lw=1.6, label="cooling"),
        Line2D([], [], color=INK, mfc=PAPER, lw=0, marker="o", ms=4, mew=0.9, label="heating"),
        Line2D([], [], color=INK, lw=1.2, ls=(0, (4, 2)), label="overlap of neighbouring levels"),
    ]
    _legend(figure, entries, columns=3)
    return figure


def _panels(heights: Sequence[float], top: float, gap: float) -> tuple[Figure, list[Axes]]:
    """Axes of the given heights in inches, one below the other; every second gap is small."""
    bottom, small = 0.5, 0.1
    gaps = [small if i % 2 == 0 else gap for i in range(len(heights) - 1)]
    height = top + bottom + sum(heights) + sum(gaps)
    figure = Figure(figsize=(WIDTH, height))
    axes, edge = [], height - top
    for panel, below in zip(heights, [*gaps, 0.0], strict=True):
        box = (_LEFT / WIDTH, (edge - panel) / height, 1 - (_LEFT + _RIGHT) / WIDTH, panel / height)
        axis = figure.add_axes(box)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.tick_params(axis="both", length=0, labelsize=9, colors=MUTED)
        axis.grid(color=RULE, lw=0.6)
        axis.set_axisbelow(True)
        axes.append(axis)
        edge -= panel + below
    return figure, axes


def _line(axis: Axes, x: np.ndarray, y: np.ndarray, good: Bool[np.ndarray, " points"], look: _Look) -> None:
    """A line through all good points in order of x, with a mark on some of them."""
    order = np.argsort(x[good])
    axis.plot(x[good][order], y[good][order], color=look.shade, ls=look.dash, lw=1.6)
    marked = _thinned(good)
    axis.plot(x[marked], y[marked], look.mark, color=look.shade, ms=3.5, lw=0)


def _thinned(good: Bool[np.ndarray, " points"]) -> Bool[np.ndarray, " points"]:
    """At most so many of the good points, evenly."""
    index = np.flatnonzero(good)
    kept = np.zeros_like(good)
    kept[index[:: max(1, -(-len(index) // _SHOWN))]] = True
    return kept


def _look(row: Row, index: int) -> _Look:
    return _Look(colour(row), _DASHES[index % len(_DASHES)], _MARKERS[index % len(_MARKERS)])


def _passes(look: _Look) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"color": look.shade, "lw": 1.2}, {
        "color": INK,
        "mfc": PAPER,
        "lw": 0,
        "marker": "o",
        "ms": 4,
        "mew": 0.9,
        "zorder": 3,
    }


def _number(*axes: Axes) -> None:
    for axis in axes:
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.6g}".replace("-", "\N{MINUS SIGN}")))


def _legend(figure: Figure, entries: list[Line2D], columns: int) -> None:
    figure.legend(
        handles=entries,
        loc="upper left",
        bbox_to_anchor=(0.04, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        labelcolor=MUTED,
        borderaxespad=0.2,
        handletextpad=0.5,
        columnspacing=1.4,
    )


def _literal(label: str) -> str:
    return label.replace("$", r"\$")


def _dimension(run: Run) -> float:
    return max(1.0, float(run.task.get("dimension", 1.0)))
