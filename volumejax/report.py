"""A run's figures and its report: one HTML file that needs nothing else."""

import math
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

try:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("reports need the run extra: pip install 'volumejax[run]'") from error

from volumejax import chain_plots, learning_plots, particle_plots, plots, series_plots
from volumejax.records import RecordError, Row, Run, write_file
from volumejax.table import HEADERS, cells, filled, headline, notes, number

REPORT_FILE, FIGURE_FOLDER = "report.html", "figures"

CAPTIONS = {
    "guessing": (
        "The chance that a random draw from the prior is this good, over what counts as good. Crosses, as far down as "
        "enough draws from the prior pass, count those; where none passes any more, particles say how it goes on. "
        "Bands are 95 %; an open circle has an error above 3 nats and no band. Chains around the trained network, if "
        "any, see a part of the same region; of those that have not mixed, drawn thin, only the bound may be quoted."
    ),
    "coefficients": (
        "Above, learning coefficients as the chains find them over the exact values: on the line they agree. Crosses "
        "are half the numbers of parameters, what a regular minimum would have. Below, by how much the chains are off, "
        "with one standard error."
    ),
    "summary": (
        "What may be claimed for each proposal: an arrow starts at a certified lower bound, a dot is "
        "an estimate with its 95 % interval, and the pale bar is the spread of single rays. All rows measure "
        "the same number, so the further right a proposal reaches, the tighter it is."
    ),
    "summary_with_chains": (
        "What may be claimed for each row: an arrow starts at a certified lower bound, a dot is an estimate with its "
        "95 % interval, a tether's upright tick is the bound that its chains certify, and the pale bar is the spread "
        "of single rays or the gap between the two passes of the chains. The dotted line is what the best rays miss of "
        "the region."
    ),
    "summary_of_series": (
        "What may be claimed {place}: an arrow starts at a certified lower bound, a dot is an estimate with its 95 % "
        "interval, and the pale bar is the spread of single rays. These rows measure the same number, so the further "
        "right a proposal reaches, the tighter it is."
    ),
    "training": (
        "Log mass through the training, and its two terms: the volume around the network of each step, "
        "and the prior's own term, minus the squared distance from its mean over 2σ². A line is the mean over rays "
        "with a band of one standard deviation, and what is certified starts at the foot of each arrow."
    ),
    "cutoffs": (
        "Log mass over the cutoff: a line is the mean over rays with a band of one standard deviation, and what is "
        "certified starts at the foot of each arrow. Where behaviour is quadratic, a line rises by half the effective "
        "number of parameters for each factor e."
    ),
    "dampings": (
        "Log mass over the damping, one line per exponent of the moments, with the levels that other proposals reach. "
        "The mean over rays (lines) decides, as the arrows, which start at what is certified, follow a few lucky rays."
    ),
    "exponents": (
        "Mean log mass over the exponent: open symbols are the best that pilot rays found for it among all β, dampings "
        "and shifts, with one standard error; filled ones, if any, are fresh rays at one damping. Pilot rays are few "
        "and the best of many candidates is a maximum, so open symbols lie a little high."
    ),
    "curve": (
        "Above, log mass at each smaller cutoff as well, with a 95 % band, from the same chains; a thin line is of "
        "chains that have not mixed, of which only the table's bound may be quoted. Below, where chains have mixed, "
        "what that curve gains per factor e in the cutoff, averaged (learning coefficient, with a 95 % band) and from "
        "the spread of the cost (heat capacity): they agree where mass is a pure power of the cutoff."
    ),
    "ladder": (
        "Above, the mean squared distance from the trained network in units of what the tether alone would allow, as "
        "the tether is let go from left to right: cooling and heating lie on each other where the chains have mixed. "
        "Below, the share of moves that were accepted and the overlap of neighbouring levels (dashed): near 0, chains "
        "stand still or levels lie too far apart."
    ),
    "log_mass": (
        "Log mass seen along each single ray, one histogram per proposal, each scaled to its own peak. The "
        "mass is the mean of the weights and not of their logarithms, so the right edge sets it (diamond): "
        "a wide histogram means that a few lucky rays decide."
    ),
    "radius": (
        "Distance from the trained network to the point where its behaviour has changed by the cutoff, along "
        "each ray. Rays that reach far carry the volume, but reaching far is not enough: a proposal must also cover "
        "as many directions as the region does."
    ),
}

_WIDE_CELLS = ("chosen", "lower", "log_mean", "per_ray", "passes")
"""Columns that take a whole line on a phone."""
_ROLES = {
    plots.INK: "ink",
    plots.MUTED: "muted",
    plots.RULE: "rule",
    plots.PAPER: "paper",
    plots.OTHER_COLOUR: "other",
    **{code: kind for kind, code in plots.COLOURS.items()},
}
"""Names under which the page sets the figures' colours anew for light and dark."""


def publish(directory: Path, run: Run) -> Path:
    """Draw the figures as PNG and SVG and write the report.

    Args:
        directory: the run directory.
        run: at least one row, with its per-ray arrays.

    Returns:
        The path of the report.

    Raises:
        RecordError: a file cannot be written.
    """
    folder = directory / FIGURE_FOLDER
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise RecordError(f"{folder}: cannot be made ({error.strerror or error}); check its permissions") from None
    drawings = {}
    for name, figure in draw(run).items():
        svg = plots.render(figure, "svg")
        write_file(folder / f"{name}.png", plots.render(figure, "png"))
        write_file(folder / f"{name}.svg", svg)
        drawings[name] = svg.decode()
    path = directory / REPORT_FILE
    write_file(path, render_report(run, drawings).encode())
    return path


def draw(run: Run) -> dict[str, Figure]:
    """All figures of a run by file name, in the order of the report."""
    coefficients = learning_plots.figures(run)
    if coefficients:
        return coefficients
    series = series_plots.figures(run)
    if series:
        # A histogram for each of so many rows would say less than their trend.
        one = run.model_copy(update={"rows": headline(run)})
        return {**series, "summary": plots.figures(one)["summary"]}
    summary = plots.figures(run)
    return {"summary": summary.pop("summary"), **particle_plots.figures(run), **chain_plots.figures(run), **summary}


def render_report(run: Run, drawings: dict[str, str]) -> str:
    """The report as HTML, light or dark as the reader's device prefers.

    Args:
        run: what to report.
        drawings: SVG text by figure name.

    Returns:
        HTML without scripts and without a single external reference.
    """
    template = resources.files("volumejax").joinpath("report_template.html").read_text(encoding="utf-8")
    columns = filled([cells(row) for row in run.rows])
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(template).render(
        run=run,
        question=_question(run),
        headers=[getattr(HEADERS, name) for name in columns],
        rows=[_row(row, columns) for row in run.rows],
        rays=any(row.from_rays for row in run.rows),
        coefficients=any(row.is_coefficient for row in run.rows),
        chains=any(row.from_chains for row in run.rows),
        particles=any(row.from_particles for row in run.rows),
        notes=[_minus(note) for note in notes(run)],
        figures=[{"svg": inline_svg(svg, name), "caption": _caption(run, name)} for name, svg in drawings.items()],
        facts=_facts(run),
    )


def inline_svg(svg: str, name: str) -> Markup:
    """Prepare an SVG file for a page: no prolog, no fixed size, ids of its own, colours that follow the page.

    Args:
        svg: a file written by `plots.render`.
        name: prefix for its ids, which must be unique on the page.

    Returns:
        The ``<svg>`` element.
    """
    svg = svg[svg.index("<svg") :]
    # Matplotlib's style sheet would reach every element of the page.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", head)
    svg = f'{head} stroke-linejoin="round" role="img" aria-label="{name.replace("_", " ")}">{body}'
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    for code, role in _ROLES.items():
        svg = svg.replace(code, f"var(--{role})")
    return Markup(svg)


def _row(row: Row, columns: Sequence[str]) -> dict[str, Any]:
    made = cells(row)
    classes = {"log_mass": "main", "recorded": "paper", **{name: name for name in _WIDE_CELLS}}
    return {
        "label": made.method,
        "colour": f"var(--{_ROLES[plots.colour(row)]})",
        "cells": [(classes.get(name, "brief"), _minus(getattr(made, name))) for name in columns[1:]],
    }


def _caption(run: Run, name: str) -> str:
    if name == "summary" and len(headline(run)) < len(run.rows):
        return CAPTIONS["summary_of_series"].format(place=_where(headline(run)[0]))
    chained = name == "summary" and any(not row.from_rays for row in run.rows)
    return CAPTIONS["summary_with_chains" if chained else name]


def _where(row: Row) -> str:
    """The row's place in a series."""
    step, cutoff = (row.position.get(name) for name in ("step", "cutoff"))
    parts = [] if step is None else [f"of the network at step {step:,.0f}"]
    return " ".join(parts if cutoff is None else [*parts, f"at a cutoff of {cutoff:g} nats"])


def _range(values: Sequence[float], decimals: int) -> str:
    """The values' range as text, or the one value."""
    low, high = (number(value, decimals) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _question(run: Run) -> str:
    task = run.task
    if any(row.is_coefficient for row in run.rows):
        return _minus(
            "Linear networks of several layers, around a true parameter, under the prior N(0, σ²) with σ = "
            f"{float(task.get('sigma', math.nan)):g}. The share of all parameters that fit to within ε falls like ε to "
            "the power λ, and λ is known exactly: half the number of parameters at a regular minimum, less here."
        )
    steps, cutoffs = ({row.position[name] for row in run.rows if name in row.position} for name in ("step", "cutoff"))
    network = "the network of the same step" if steps else "the trained network"
    limit = f"the row's cutoff, {min(cutoffs):g} to {max(cutoffs):g}" if len(cutoffs) > 1 else f"{run.cutoff:g}"
    if task.get("cost") == "loss":
        parts = [
            f"What counts is a mean training loss of at most {limit} nats; the trained network has "
            f"{float(task.get('anchor_cost', math.nan)):.3g}."
        ]
    else:
        parts = [f"To behave alike is to differ by at most {limit} nats of mean KL divergence from {network}."]
    if "dimension" in task and "sigma" in task:
        parts.append(
            f"It has {number(task['dimension'], 0)} parameters, and the prior draws each of them from "
            f"N(0, σ²) with σ = {float(task['sigma']):.5g}{', the same at every step' if steps else ''}."
        )
    if "train_accuracy" in task and "test_accuracy" in task:
        parts.append(
            f"{'At the end it' if steps else 'It'} classifies {float(task['train_accuracy']):.1%} of the training set "
            f"and {float(task['test_accuracy']):.1%} of the test set rightly."
        )
    if run.rows:
        priors = _range([float(row.estimate["prior_term"]) for row in run.rows], 1)
        share = f"a part that changes with the step ({priors} nats) is" if steps else f"{priors} nats are"
        parts.append(
            f"Of each log mass below, {share} due to the network's distance from the prior's mean; the rest is volume."
        )
    regions = {str(row.estimate["region"]) for row in run.rows if row.from_chains}
    if any(row.from_rays for row in run.rows):
        parts.append(
            "Rays see the star region, all that lies in a straight line of sight from the network; "
            "the full region can only be larger."
        )
    if regions:
        parts.append(
            "Tethers let chains walk through the region, held to the trained network by a leash that is let go step "
            "by step."
        )
    if "star" in regions:
        parts.append("Those that keep to the star region measure what rays do, without missing its wide far ends.")
    if "connected" in regions:
        parts.append(
            "The connected region is all that can be reached without leaving it, round corners too, "
            "so it can only be larger than the star."
        )
    if any(row.from_particles for row in run.rows):
        parts.append(
            "Particles come from the prior and find the region wherever it lies; all of it can only be larger than "
            "what is connected to the trained network."
        )
    return _minus(" ".join(parts))


def _facts(run: Run) -> list[tuple[str, Any]]:
    facts: list[tuple[str, Any]] = [("created", run.created)]
    facts += [(f"{name} (s)", f"{value:.1f}") for name, value in run.seconds.items()]
    facts += [(name.replace("_", " "), value) for name, value in run.hardware.items()]
    return facts + list(run.versions.items())


def _minus(text: str) -> str:
    return re.sub(r"(?<!\w)-(?=\d|inf)", "\N{MINUS SIGN}", text)
