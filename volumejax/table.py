"""The text of a run's table: what the terminal and the report both show."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from volumejax.records import TUNED, Row, Run, Scalar

REMEDIES = {
    "noise_limited": "the cost's rounding limits the radius: raise the cutoff",
    "non_finite": "the cost turns NaN or infinite, counted as outside: look at it far from the anchor",
    "non_monotone": "cut back to an earlier crossing that the audit found",
    "never_inside": "no volume next to the anchor: raise the cutoff",
    "unresolved": "evaluations used up: raise the tolerance",
}
"""Ray statuses worth a line under the table, with what to do about them."""


_TRUTH = "learning_coefficient"


class Cells(NamedTuple):
    """One row of the table, as text; a cell that has no meaning for the row is empty."""

    method: str
    log_mass: str = ""
    lower: str = ""
    log_mean: str = ""
    per_ray: str = ""
    chosen: str = ""
    passes: str = ""
    quoted: str = ""
    exact: str = ""
    off: str = ""
    hot: str = ""
    cold: str = ""
    r_hat: str = ""
    half: str = ""
    ess: str = ""
    pareto_k: str = ""
    evaluations: str = ""
    seconds: str = ""
    recorded: str = ""


HEADERS = Cells(
    "method", "log mass", "at least", "log mean w", "per ray", "chosen", "passes", "λ̂", "λ (m)", "SE off", "hot",
    "cold", "R-hat", "D/2", "ESS", "k-hat", "evals", "s", "paper",
)  # fmt: skip


def cells(row: Row) -> Cells:
    """The row as text: nats, evaluations per ray or gradients per chain, seconds."""
    value = row.estimate
    if row.is_coefficient:
        return _coefficient_cells(row)
    lower = "" if is_bound(value) else round_down(float(value["lower"]), 1)
    if row.from_chains:
        passes = [float(value.get(f"hysteresis_{which}", math.nan)) for which in ("cooling", "heating")]
        # A pass that lost all of its chains is not to be taken for the other.
        gone = "lost" if row.complete and any(map(math.isfinite, passes)) else ""
        shown = [number(x, 1) if math.isfinite(x) else gone for x in passes]
        done = 100 * float(value["progress"])
        return Cells(
            method=row.label if row.complete else f"{row.label} (partial, {done:.0f} %)",
            log_mass=claim(value).replace(", ", "\n"),
            lower=lower,
            passes="\n".join(filter(None, shown)),
            evaluations=number(value["gradients"], 0),
            seconds=number(row.seconds, 1),
        )
    if row.from_particles:
        return Cells(
            method=row.label if row.complete else f"{row.label} (partial, {100 * float(value['progress']):.0f} %)",
            log_mass=claim(value).replace(", ", "\n"),
            lower=lower,
            log_mean=number(value["log_mass"], 1) if is_bound(value) else "",
            evaluations=number(float(value["gradients"]) / float(value["num_particles"]), 0),
            seconds=number(row.seconds, 1),
        )
    rays = max(1, int(value["num_rays"]))
    return Cells(
        method=row.label if row.complete else f"{row.label} (partial, {rays} rays)",
        chosen=chosen(row),
        log_mass=claim(value),
        lower=lower,
        log_mean=number(value["log_mass"], 1),
        per_ray=plus_minus(value["mean_log_weight"], value["std_log_weight"]),
        ess=number(value["ess"], 1 if float(value["ess"]) < 10 else 0),
        pareto_k=number(value["pareto_k"], 2 if float(value["pareto_k"]) < 10 else 0),
        evaluations=number(float(value["evaluations"]) / rays, 1),
        seconds=number(row.seconds, 1),
        recorded=recorded(row),
    )


def _coefficient_cells(row: Row) -> Cells:
    value = row.estimate
    quoted, error, truth = (float(value[name]) for name in ("quoted_value", "quoted_std_error", _TRUTH))
    hot = float(value["hot_value"])
    return Cells(
        method=row.label,
        evaluations=number(value["gradients"], 0),
        seconds=number(row.seconds, 1),
        exact=f"{truth:g} ({value['multiplicity']})",
        quoted=plus_minus(quoted, error),
        off=f"{(quoted - truth) / error:+.1f}" if error > 0.0 else "",
        hot=plus_minus(hot, value["hot_std_error"]) if math.isfinite(hot) else "",
        cold=plus_minus(value["value"], value["std_error"]),
        r_hat=number(value["max_r_hat"], 3),
        half=f"{float(value['half_dimension']):g}",
    )


def filled(rows: Sequence[Cells]) -> tuple[str, ...]:
    """The names of the columns in which some row says something, in the table's order."""
    return tuple(name for i, name in enumerate(Cells._fields) if any(row[i] for row in rows))


def claim(estimate: Mapping[str, Scalar], unit: str = "") -> str:
    """What may be claimed: ``value ± standard error``, or ``≥ lower`` for a bound.

    A * marks a bound that nothing certifies; "not mixed" one whose chains contradict each other.

    Args:
        estimate: `VolumeEstimate.to_dict()`, in nats.
        unit: what follows the number.

    Example:
        >>> claim({"kind": "lower_bound", "bound_kind": "certified", "lower": -9.91})
        '≥ -10.0'
    """
    if is_bound(estimate):
        star = "" if estimate["bound_kind"] == "certified" else " *"
        mixed = ", not mixed" if estimate["kind"] == "not_mixed" else ""
        return f"≥ {round_down(float(estimate['lower']), 1)}{unit}{star}{mixed}"
    return plus_minus(estimate["log_mass"], estimate["std_error"]) + unit


def is_bound(estimate: Mapping[str, Scalar]) -> bool:
    """Whether the result may only be quoted as a lower bound."""
    return estimate["kind"] != "estimate"


def is_mixed(row: Row) -> bool:
    """Whether the passes of chains, or the islands of particles, agree with each other."""
    return row.estimate["kind"] != "not_mixed"


def recorded(row: Row) -> str:
    """The published values, one per line."""
    lines = []
    if "mean" in row.recorded:
        lines.append(plus_minus(row.recorded["mean"], row.recorded.get("sd", math.nan)))
    if "best" in row.recorded:
        lines.append(f"best {number(row.recorded['best'], 0)}")
    return "\n".join(lines)


def notes(run: Run) -> list[str]:
    """What a reader must know before quoting a number, with remedies; one short paragraph each."""
    if any(row.is_coefficient for row in run.rows):
        return _coefficient_notes(run)
    rays = [row for row in run.rows if row.from_rays]
    bounds = sum(is_bound(row.estimate) for row in rays)
    lines = []
    if bounds:
        kind = "" if len(rays) == len(run.rows) else " of rays"
        which = f"every row{kind}" if bounds == len(rays) else f"{bounds} of {len(rays)} rows{kind}"
        lines.append(
            f"≥ ({which}): a certified 95 % lower bound. A few rays carry the weight, so no error bar can be "
            "given; a proposal closer to the region's shape helps, more rays hardly do."
        )
    for status, remedy in REMEDIES.items():
        counts = [(row.label, int(row.estimate.get(f"rays_{status}", 0))) for row in rays]
        found = [(label, count) for label, count in counts if count]
        if found:
            lines.append(f"{status.replace('_', ' ')} rays ({_counted(found)}): {remedy}.")
    # Where every ray was audited none is left unseen, and the bound holds.
    open_rows = [row for row in rays if row.estimate.get("bound_kind") != "certified"]
    rates = [(row.label, float(row.estimate.get("violation_rate", math.nan))) for row in open_rows]
    violated = [(label, 100 * rate) for label, rate in rates if rate > 0]
    if violated:
        told = _counted(violated, ".1f", " %")
        lines.append(
            f"* audited rays had left the region before the crossing found ({told}): others may have too, so nothing "
            "is certified; audit all of them with audit_fraction: 1."
        )
    noises = [float(row.estimate.get("noise", math.nan)) for row in run.rows]
    loud = [noise for noise in noises if noise > 0.5]
    if loud:
        shift = number(max(loud), 1)
        lines.append(f"The cost's rounding may shift log masses by {shift} nats; no error bar includes it.")
    return lines + _chain_notes(run)


def chosen(row: Row) -> str:
    """What pilot rays chose for a tuned row: β, and where it matters exponent, damping and shift, on two lines.

    Example:
        >>> position = {"beta": 2.31e4, "exponent": 0.5, "damping": 0.0, "shift": 0.0}
        >>> print(chosen(Row(label="a", kind="tuned", seconds=1.0, estimate={}, position=position)))
        β=2.3e4, power 0.5
        damping 0, no shift
    """
    if row.kind != TUNED:
        return ""
    beta, power, damping, shift = (
        row.position.get(name, math.nan) for name in ("beta", "exponent", "damping", "shift")
    )
    if beta == 0.0:
        return "β=0, the prior's own\n" + ("shift" if shift else "no shift")
    return f"β={_short(beta)}, power {power:g}\ndamping {_short(damping)}, {'shift' if shift else 'no shift'}"


def _short(value: float) -> str:
    """Two digits, and a short exponent."""
    return re.sub(r"e([+-])0*", lambda m: f"e{m[1].strip('+')}", f"{value:.2g}")


def headline(run: Run) -> tuple[Row, ...]:
    """The rows that measure one and the same: of a series those at its last step and the cutoff nearest to its own."""
    steps = [row.position["step"] for row in run.rows if "step" in row.position]
    rows = [row for row in run.rows if not steps or row.position.get("step") == max(steps)]
    cutoffs = {row.position["cutoff"] for row in rows if "cutoff" in row.position}
    if cutoffs:
        nearest = min(cutoffs, key=lambda cutoff: abs(math.log(cutoff / run.cutoff)))
        rows = [row for row in rows if row.position.get("cutoff") == nearest]
    return tuple(rows)


def method(row: Row) -> str:
    """The label without the row's place in a series."""
    return row.label.split(", step ")[0].split(", ε=")[0]


def _counted(found: Sequence[tuple[str, int | float]], digits: str = ".0f", unit: str = "") -> str:
    """Which rows, and how much of it; of many the three that have most."""
    most = sorted(found, key=lambda entry: -entry[1])[:3] if len(found) > 4 else found
    told = "; ".join(f"{label}: {value:{digits}}{unit}" for label, value in most)
    return told if len(most) == len(found) else f"in {len(found)} rows, most in {told}"


def _coefficient_notes(run: Run) -> list[str]:
    lines = []
    for row in run.rows:
        for name in ("status", "hot_status"):
            if row.estimate[name] != "ok":
                lines.append(f"{row.label}, {'hot' if name == 'hot_status' else 'cold'}: {row.estimate[name]}.")
    singular = any(int(row.estimate["multiplicity"]) > 1 for row in run.rows)
    joined = singular and any(math.isfinite(float(row.estimate["hot_value"])) for row in run.rows)
    if joined:
        lines.append(
            "λ̂ joins both temperatures where the multiplicity m is above 1, since a single one is too low by about "
            "(m−1)/log β; elsewhere it is the colder one's."
        )
    return lines


def missed(run: Run) -> list[tuple[Row, Row, float]]:
    """How far rays fall short: a row of chains, the best row of rays, and the nats between what they show.

    Only rows of chains that show more than the best rays. An estimate shows its value, anything else its bound.
    """
    rays = [row for row in run.rows if row.from_rays and math.isfinite(shown(row))]
    if not rays:
        return []
    best = max(rays, key=shown)
    chains = [row for row in run.rows if row.from_chains]
    return [(row, best, shown(row) - shown(best)) for row in chains if shown(row) > shown(best)]


def shown(row: Row) -> float:
    """The number in `claim`: the estimate, or the bound where there is none."""
    return float(row.estimate["lower" if is_bound(row.estimate) else "log_mass"])


def _chain_notes(run: Run) -> list[str]:
    chains = [row for row in run.rows if not row.from_rays]
    lines = [f"{row.label}: {row.estimate['status']}." for row in chains if row.estimate["status"] != "ok"]
    certified = [
        f"{row.label} ≥ {round_down(float(row.estimate['lower']), 1)}" for row in chains if not is_bound(row.estimate)
    ]
    if certified:
        lines.append(
            f"Certified at 95 %, whatever the chains may have missed: {', '.join(certified)}. The ± of a tether counts "
            "on chains that have been everywhere."
        )
    gaps = missed(run)
    if gaps:
        told = [f"{row.label} {'at least ' if is_bound(row.estimate) else ''}{number(gap, 1)}" for row, _, gap in gaps]
        best = gaps[0][1]
        lines.append(f"Nats that the best rays ({best.label}, {claim(best.estimate)}) leave out: {', '.join(told)}.")
    return lines


def number(value: float | int | str, decimals: int) -> str:
    """A number with thousands separators; inf and nan as words.

    Example:
        >>> number(-11903.4, 0)
        '-11,903'
    """
    value = float(value)
    return f"{value:,.{decimals}f}" if math.isfinite(value) else str(value)


def round_down(value: float, decimals: int) -> str:
    """A lower bound with so many decimals: rounded down, never to nearest.

    Example:
        >>> round_down(-9.91, 1)
        '-10.0'
    """
    if math.isfinite(value):
        value = math.floor(value * 10**decimals) / 10**decimals
    return number(value, decimals)


def plus_minus(value: float | int | str, error: float | int | str) -> str:
    """``value ± error``, both to the error's second significant digit; the value alone if the error is not finite.

    Example:
        >>> plus_minus(-7021.347, 0.4249)
        '-7,021.35 ± 0.42'
    """
    value, error = float(value), float(error)
    if not math.isfinite(error):
        return number(value, 1)
    decimals = 2 if error == 0 else min(4, max(0, 1 - math.floor(math.log10(error))))
    return f"{number(value, decimals)} ± {number(error, decimals)}"
