"""The figure of learning coefficients: what the chains say against the exact value, with half the dimension."""

from typing import Any

try:
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
except ImportError as error:
    raise ImportError("figures need the run extra: pip install 'volumejax[run]'") from error

from volumejax.plots import INK, MUTED, PAPER, RULE, STYLE, WIDTH
from volumejax.records import Run

_COLOUR = "#0072b2"


def figures(run: Run) -> dict[str, Figure]:
    """The figure `coefficients` of a run with learning coefficients; none of another.

    Args:
        run: its rows.

    Returns:
        Matplotlib figures, bound to no display.
    """
    rows = [row for row in run.rows if row.is_coefficient]
    if not rows:
        return {}
    truth, found, error, half = (
        [float(row.estimate[name]) for row in rows]
        for name in ("learning_coefficient", "quoted_value", "quoted_std_error", "half_dimension")
    )
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(WIDTH, 5.6))
        upper, lower = figure.subplots(
            2, 1, sharex=True,
            gridspec_kw={
                "height_ratios": [2.2, 1], "left": 0.13, "right": 0.96, "top": 0.91, "bottom": 0.09, "hspace": 0.1
            },
        )  # fmt: skip
        ends = [0.8 * min(truth), 1.25 * max(truth)]
        upper.plot(ends, ends, color=MUTED, lw=1.0)
        upper.plot(truth, half, ls="", marker="x", ms=5, color=MUTED)
        upper.errorbar(truth, found, yerr=error, fmt="o", ms=4.5, color=_COLOUR, mec=PAPER, mew=0.6, capsize=2)
        upper.set_yscale("log")
        upper.set_ylabel("learning coefficient")
        lower.axhline(0.0, color=MUTED, lw=1.0)
        off = [100.0 * (f / t - 1.0) for f, t in zip(found, truth, strict=True)]
        bars = [100.0 * e / t for e, t in zip(error, truth, strict=True)]
        lower.errorbar(truth, off, yerr=bars, fmt="o", ms=4.5, color=_COLOUR, mec=PAPER, mew=0.6, capsize=2)
        lower.set_ylabel("off by (%)")
        lower.set_xscale("log")
        lower.set_xlim(*ends)
        lower.set_xlabel("exact value (Aoyagi)")
        plain = FuncFormatter(lambda x, _: f"{x:g}".replace("-", "\N{MINUS SIGN}"))
        for axis in (upper, lower):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(color=RULE, lw=0.6)
            axis.set_axisbelow(True)
            axis.tick_params(which="both", length=0, labelcolor=MUTED)
            axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.xaxis.set_major_formatter(plain)
        upper.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        upper.yaxis.set_minor_formatter(NullFormatter())
        upper.yaxis.set_major_formatter(plain)
        entries: list[Any] = [
            Line2D([], [], color=_COLOUR, marker="o", ms=4.5, lw=1.2, label="chains, ± SE"),
            Line2D([], [], color=MUTED, lw=1.0, label="exact"),
            Line2D([], [], color=MUTED, marker="x", ms=5, lw=0, label="half the parameters"),
        ]
        figure.legend(
            handles=entries, loc="upper left", bbox_to_anchor=(0.1, 1.0), ncols=3, frameon=False, fontsize=8.5,
            labelcolor=INK, columnspacing=1.4,
        )  # fmt: skip
    return {"coefficients": figure}
