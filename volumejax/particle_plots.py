"""The figure of particles from the prior: the chance to guess a network this good, over what counts as good."""

import math

import numpy as np

try:
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
except ImportError as error:
    raise ImportError("figures need the run extra: pip install 'volumejax[run]'") from error

from volumejax.plots import COLOURS, FAINT, INK, MUTED, PAPER, RULE, STYLE, WIDTH
from volumejax.records import Row, Run
from volumejax.table import is_mixed

_HEIGHT = 3.4
_FEWEST = 10
"""Draws that must pass for a share of the prior to be drawn."""
_KNOWN = 3.0
"""Standard error in nats above which a point of the curve is drawn hollow: a bound, more or less."""


def figures(run: Run) -> dict[str, Figure]:
    """The figure `guessing`, by file name; none without particles.

    Args:
        run: with its arrays. Curves of chains are drawn beside those of the particles.

    Returns:
        Matplotlib figures, bound to no display.
    """
    rows = [row for row in run.rows if not row.from_rays and "curve_cutoffs" in row.chains]
    if not any(row.from_particles for row in rows):
        return {}
    with matplotlib.style.context(STYLE):
        return {"guessing": _guessing(rows, str(run.task.get("cost", "kl")))}


def _guessing(rows: list[Row], cost: str) -> Figure:
    """log10 of the mass over the cutoff: particles, the prior draws themselves, and chains."""
    figure = Figure(figsize=(WIDTH, _HEIGHT))
    axis = figure.add_axes((0.15, 0.15, 0.81, 0.62))
    entries = []
    for row in rows:
        shade = COLOURS[row.kind]
        cutoffs, log_mass, error = (
            np.asarray(row.chains[f"curve_{name}"], np.float64) for name in ("cutoffs", "log_mass", "std_error")
        )
        dash, label = ":" if "star" in row.label else "-", row.label.replace("$", r"\$")
        if not (row.from_particles or is_mixed(row)):
            axis.plot(cutoffs, log_mass / math.log(10.0), color=shade, ls=dash, zorder=2, **FAINT)
            entries.append(Line2D([], [], color=shade, ls=dash, **FAINT, label=f"{label}, not mixed"))
            continue
        known = np.isfinite(log_mass) & np.isfinite(error) & (error <= _KNOWN)
        value, width = log_mass / math.log(10.0), np.where(known, 1.96 * error, 0.0) / math.log(10.0)
        axis.fill_between(cutoffs, value - width, value + width, where=known, color=shade, alpha=0.3, lw=0, zorder=1)
        axis.plot(cutoffs, value, color=shade, lw=1.6, ls=dash, zorder=2)
        axis.plot(cutoffs[~known], value[~known], "o", color=shade, mfc=PAPER, ms=4, mew=1.0, zorder=3)
        entries.append(Line2D([], [], color=shade, lw=1.6, ls=dash, label=label))
        if row.from_particles:
            entries += _prior_draws(axis, row)
    entries.append(Line2D([], [], color=MUTED, marker="o", mfc=PAPER, ms=4, lw=0, label=f"error above {_KNOWN:g} nats"))
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 3.0)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
    axis.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: rf"$10^{{{y:.0f}}}$" if y else "1"))
    axis.set_xlabel("training loss at most (nats)" if cost == "loss" else "cutoff (nats)")
    axis.set_ylabel("chance under the prior")
    axis.grid(color=RULE, lw=0.6)
    axis.tick_params(length=0, labelcolor=MUTED)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.legend(
        handles=entries, loc="upper left", bbox_to_anchor=(0.04, 1.0), ncols=2, frameon=False, fontsize=8.5,
        labelcolor=MUTED, borderaxespad=0.2, handletextpad=0.5, columnspacing=1.4,
    )  # fmt: skip
    return figure


def _prior_draws(axis, row: Row) -> list[Line2D]:
    """Mark the share of the draws from the prior that pass, as far down as enough of them do."""
    costs = np.sort(np.asarray(row.chains["prior_costs"], np.float64))
    cutoffs = np.asarray(row.chains["curve_cutoffs"], np.float64)
    passing = np.searchsorted(costs, cutoffs, side="right")
    seen = passing >= _FEWEST
    if not seen.any():
        return []
    axis.plot(cutoffs[seen], np.log10(passing[seen] / len(costs)), "x", color=INK, ms=5, mew=1.2, zorder=4)
    return [Line2D([], [], color=INK, marker="x", ms=5, mew=1.2, lw=0, label="share of draws from the prior")]
