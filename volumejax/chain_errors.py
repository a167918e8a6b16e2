"""Standard errors of what chains say: from leaving out chains, and from stretches of their ladders and visits."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from volumejax.free_energy import ratio_influences
from volumejax.tally import COOLING, HEATING, PARTS, Sums, Tally

__all__ = ["LAG", "Errors", "colder_error", "ladder_error", "ladder_noise", "lag_of", "standard_errors"]

_GROUPS = 16
"""Groups of chains that the jackknife leaves out in turn."""
_FEW = 4
"""Chains of a pass at most where their scatter alone says little: stretches of time have to."""
LAG, _COLD_LAG = 6.0, 2.0
"""Standard deviations between two passes, since what is lost on one and gained on the other nearly cancels; and between
the way to the coldest temperature and the way back, which may both lag to the same side."""
_STRETCHES, _FEW_STRETCHES = 24, 8
"""Of the κ ladder, as many as its error is made of: each longer than the chains remember; and of the temperatures."""
Vector = NDArray[np.float64]


class Errors(NamedTuple):
    """What chance makes of a run, in nats."""

    mass: float
    curve: Vector
    energies: Vector
    """Of λ̂ at each temperature."""
    passes: float
    """Of the difference between the two passes."""


def standard_errors(tally: Tally, whole: Sums, cutoffs: Vector, cutoff: float, passes: tuple[int, ...]) -> Errors:
    """Return the standard errors of `whole`, what all chains say with the given passes.

    The larger of a jackknife over groups of chains, which covers all autocorrelation, and of the chains' scatter on
    many stretches of the ladder, which few chains tell too: these have their scatter from stretch to stretch of the
    visits to temperatures besides. Of what is colder than the ladder, where chains go there and come back, the part of
    the ways' difference that chance does not explain comes to it.
    """
    everyone = np.arange(tally.chains)
    ladder = ladder_error(tally, whole.kappa_differences, whole.beta_differences)

    def left(chains: NDArray, part: int | None = None) -> Vector:
        return _flat(tally.sums(cutoffs, cutoff, chains=chains, passes=passes, without=part, near=whole))

    errors, differences = np.zeros(len(_flat(whole))), []
    if tally.chains > 1:
        label = everyone % min(_GROUPS, tally.chains)
        groups = [everyone[label != group] for group in range(label.max() + 1)]
        errors = _jackknife(np.stack([left(kept) for kept in groups]))
        for kept in groups:
            one, other = (
                tally.log_mass(cutoff, chains=kept, passes=(which,), near=whole) for which in (COOLING, HEATING)
            )
            differences.append(one - other)
    curve = slice(1, 1 + len(cutoffs))
    if tally.chains <= _FEW:
        in_time = _jackknife(np.stack([left(everyone, part) for part in range(PARTS)]))
        # As much of the way to the coldest temperature as a cutoff lies deep.
        depths = -np.log((cutoffs - tally.anchor_cost) / (cutoff - tally.anchor_cost))
        way = np.sqrt(np.maximum(depths, 0.0) / max(float(np.max(depths)), 1e-300))
        deep = np.hypot(ladder, way * colder_error(tally, whole.beta_differences))
        in_time[0], in_time[curve] = np.hypot(in_time[0], ladder), np.hypot(in_time[curve], deep)
        errors = np.maximum(errors, in_time)
    if tally.joint > 0:
        there, back = (
            _flat(tally.sums(cutoffs, cutoff, chains=everyone, passes=passes, way=way, near=whole)) for way in (0, 1)
        )
        with np.errstate(invalid="ignore"):
            gap = there - back
        errors[1:] = np.hypot(errors[1:], lag_of(gap, 2.0 * errors)[1:] / _COLD_LAG)
    mass = max(float(errors[0]), ladder)
    if tally.chains > 1:
        # Each pass alone has half of the samples, and few chains leave the jackknife itself to chance.
        chance = min(float(_jackknife(np.array(differences))), 2.0 * mass)
    else:
        # What is remembered along a stretch may be lag, which explains no hysteresis.
        chance = 2.0 * ladder_noise(tally, whole.kappa_differences, whole.beta_differences)
    return Errors(mass, errors[curve], errors[curve.stop :], chance)


def lag_of(gap: Any, chance: Any) -> Any:
    """Return what of a gap between two ways two standard deviations of it by chance do not explain; 0 where unknown."""
    return np.sqrt(np.maximum(np.nan_to_num(gap, posinf=0.0, neginf=0.0) ** 2 - (2.0 * chance) ** 2, 0.0))


def ladder_error(tally: Tally, kappa_differences: Vector, beta_differences: Vector) -> float:
    """Return the standard error of ΔF from the scatter of chains on stretches of the ladders.

    Of the κ ladder. A jackknife has as many terms as chains, and with few of them may come out near zero by chance;
    this has many, but does not know what is remembered from one stretch to the next but one. Where a pass has one
    chain, its stretches are compared with each other: what it lags behind evenly, or more and more, is no scatter.
    Where there are few, or the ridge rises, the temperature ladder's error is found like that too.
    """
    found = _pulls(tally, kappa_differences, beta_differences)
    variances = [_scatter(tally, parts) for parts in found]
    if tally.chains == 1:
        variances[0] = min(variances[0], _without_lag(tally, found[0]))
    return float(np.sqrt(sum(variances)))


def colder_error(tally: Tally, beta_differences: Vector) -> float:
    """Return the standard error of ΔF from the joint to the coldest temperature; 0 where nothing is colder."""
    if tally.joint == 0:
        return 0.0
    return float(np.sqrt(_scatter(tally, _temperature_pulls(tally, beta_differences, slice(0, tally.joint)))))


def ladder_noise(tally: Tally, kappa_differences: Vector, beta_differences: Vector) -> float:
    """Return the part of `ladder_error` that neighbouring stretches do not share, and so is no lag."""
    noise = sum(
        0.5 * np.sum(np.diff(parts, axis=0) ** 2) * len(parts) / (len(parts) - 1)
        for parts in _pulls(tally, kappa_differences, beta_differences)
        if len(parts) > 1
    )
    return float(np.sqrt(_of_passes(tally) * noise))


def _scatter(tally: Tally, parts: Vector) -> float:
    over = 2 if tally.chains > 1 else 0
    about = parts - parts.mean(axis=over, keepdims=True)
    variance = np.sum(about**2) + 2.0 * max(float(np.sum(about[1:] * about[:-1])), 0.0)
    return _of_passes(tally) * float(variance) * about.shape[over] / max(about.shape[over] - 1, 1)


def _without_lag(tally: Tally, parts: Vector) -> float:
    """Return the variance of the κ ladder that single chains leave once a lag that grows along it is taken out.

    Near equilibrium works scatter by twice the nats that they lose on average. So much, and its own root for what the
    loss is off by chance, and besides what single stretches have apart from the mean of their neighbours. A chain that
    stood still is no lag.
    """
    if tally.standstill() > 0.5 / _STRETCHES or len(parts) < 3:
        return np.inf
    inner = parts[1:-1] - 0.5 * (parts[2:] + parts[:-2])
    outer = parts[[0, -1]] - parts[[1, -2]]
    apart = _of_passes(tally) * float(np.sum(inner**2) / 1.5 + np.sum(outer**2) / 2.0)
    variance = apart + 2.0 * float(np.sum(np.abs(parts[:, COOLING])))
    return variance + float(np.sqrt(variance))


def _of_passes(tally: Tally) -> float:
    """Return n/(n − 1) of the two passes, from whose mean a single chain's works are taken; more have their own."""
    return 2.0 if tally.chains == 1 else 1.0


def _pulls(tally: Tally, kappa_differences: Vector, beta_differences: Vector) -> list[Vector]:
    """Return by how much each stretch of each chain pulls the ladders' ΔF, κ first; shapes (stretches, 2, chains)."""
    down, up = (np.moveaxis(tally.kappa_seen[name][:, 1:], 0, 1) for name in ("work_down", "work_up"))
    found = [_pulls_of(down, up, kappa_differences[1:], 1, _STRETCHES)]
    if tally.rises or tally.chains <= _FEW:
        # Colder than the joint lies the curve alone.
        found.append(_temperature_pulls(tally, beta_differences, slice(tally.joint, None)))
    return found


def _temperature_pulls(tally: Tally, beta_differences: Vector, gaps: slice) -> Vector:
    cooling, heating = (tally.temperature_tables((which,)) for which in (COOLING, HEATING))
    down, up = (np.concatenate([cooling[way], heating[way]], axis=1) for way in ("work_down", "work_up"))
    rungs = slice(gaps.start, None if gaps.stop is None else gaps.stop + 1)
    return _pulls_of(down[rungs], up[rungs], beta_differences[gaps], cooling["work_down"].shape[1], _FEW_STRETCHES)


def _pulls_of(down: Vector, up: Vector, differences: Vector, cooling: int, stretches: int) -> Vector:
    """Return by how much each stretch of each chain pulls ΔF, shape (stretches, 2, chains).

    Args:
        down: works, shape (rungs, visits, chains).
        up: likewise.
        differences: ΔF between neighbours.
        cooling: how many of the visits are the cooling pass's.
        stretches: how many to make.
    """
    shape = (len(down) - 1, *down.shape[1:])
    # By gaps: there what every work down pulls is made up for by one that goes up.
    forward, backward = (x.reshape(len(x), -1) for x in (down[:-1], up[1:]))
    pulls = np.add(*(pull.reshape(shape) for pull in ratio_influences(forward, backward, differences)))
    passes = np.stack([part.sum(axis=1) for part in np.split(pulls, [cooling], axis=1)], axis=1)
    return np.stack([part.sum(axis=0) for part in np.array_split(passes, min(stretches, len(passes)))])


def _flat(sums: Sums) -> Vector:
    return np.concatenate([[sums.log_mass], sums.curve, sums.energies])


def _jackknife(values: Vector) -> Vector:
    """Return the standard error from values with one group left out each, along the first axis."""
    groups = len(values)
    finite = np.where(np.isfinite(values), values, np.nan)
    error = np.sqrt((groups - 1) * np.mean((finite - finite.mean(axis=0)) ** 2, axis=0))
    return np.asarray(np.where(np.isnan(error), np.inf, error))
