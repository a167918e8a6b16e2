"""From the records of chains to free energies: what was seen on which rung, and what it adds up to."""

import dataclasses
import itertools
import operator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from volumejax.annealing import Record
from volumejax.ensemble import Rung
from volumejax.free_energy import acceptance_ratio, log_cover, log_mixture, log_total_mass, overlap
from volumejax.ladder import Temperatures
from volumejax.sample_rays import SampleRays

__all__ = ["COOLING", "HEATING", "PARTS", "Sums", "Tally"]

COOLING, HEATING = 0, 1
_WINDOW = 48
"""Rungs at the end of the ladder over which chains are compared with each other."""
_LATE = 0.1
"""Share of the ladder's gradients that single chains of the two passes may lag, in all, and still be in one part."""
_SHIFTS = 64
"""Lags that are tried, at least half as many where there are more rungs."""
_REFUSED = 0.02
"""Mean Metropolis probability of a visit's long trajectories below which the chain stood still."""
_QUARTILES = 1.349
"""Distance of a normal distribution's quartiles in standard deviations."""
_BRIDGED = 3.0
"""Nats below the cutoff from which weights make up for what chains do not see."""
_LOST = 0.01
"""Share of the gaps of the κ ladder at which a pass may have lost its chains and still be compared."""
PARTS = 6
"""Stretches of the visits to a temperature that are left out in turn, each longer than chains remember."""
_HEDGE = 0.05
"""Weight in the bound of what chains said on their way down, which is left where they stand still and lose theirs."""
Vector = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Sums:
    """One evaluation of all records, or of those of some chains and passes.

    Attributes:
        log_mass: at the cutoff, in the measure of δ.
        curve: at the cutoffs asked for.
        energies: λ̂(β) = β(E_β C − C0) at the temperatures; for the star C is the largest cost on the segment.
        heat_capacities: β² Var C there.
        leading: largest share of one sample or ray in the factor of a star's mass that they make; NaN elsewhere.
        kappa_differences: ΔF between the rungs of the κ ladder.
        beta_differences: ΔF between those of the temperature ladder.
    """

    log_mass: float
    curve: Vector
    energies: Vector
    heat_capacities: Vector
    leading: float
    kappa_differences: Vector
    beta_differences: Vector


class _Joined(NamedTuple):
    """Free energies of both ladders, and the samples of the temperature ladder."""

    kappa_differences: Vector
    beta_differences: Vector
    log_z: Vector
    """Of each temperature, shape (rungs,)."""
    costs: Vector
    """The guide of each sample, shape (samples,), or where the ridge has a share both, shape (samples, 2)."""
    reaches: Vector
    """Of all samples, shape (samples,)."""
    counts: Vector
    """Samples at each temperature, shape (rungs,)."""
    by_ray: Vector | None
    """log of what the ray of each sample from the joint on counts at the run's cutoff, shape (samples,); None where
    samples count."""

    def log_masses(self, betas: Vector, cutoffs: Vector, cutoff: float) -> Vector:
        """Return log masses at the cutoffs, at the run's own by rays where there are any."""
        masses = log_total_mass(self.costs, self.reaches, betas, self.counts, self.log_z, cutoffs)
        if self.by_ray is None:
            return masses
        return np.where(np.isclose(cutoffs, cutoff, rtol=1e-9), np.logaddexp.reduce(self.by_ray), masses)

    def leading(self, betas: Vector, cutoff: float) -> float:
        """Return the largest share that a sample, or its ray, has of the mass; NaN where samples near the wall do."""
        if self.by_ray is not None:
            weights = self.by_ray
        elif np.array_equal(self.costs, self.reaches):
            return np.nan
        else:
            weights = -log_mixture(self.costs, betas, self.counts, self.log_z)[self.reaches <= cutoff]
        if not np.isfinite(weights).any():
            return np.nan
        return float(1.0 / np.sum(np.exp(weights - np.max(weights))))


class Tally:
    """Collects records, and reduces them.

    Args:
        kappa: the κ ladder; rung 0 is the reference.
        temperatures: at the end of the tether; their joint rung is the last of the κ ladder.
        log_reference: log normaliser of the reference in the measure of δ.
        chains: number of chains of each pass.
        anchor_cost: C(θ0).
        rays: what samples' rays are measured by, where the ridge rises; the samples alone count if None.
    """

    def __init__(
        self, kappa: Rung, temperatures: Temperatures, log_reference: float, chains: int, anchor_cost: float,
        rays: SampleRays | None = None,
    ) -> None:  # fmt: skip
        """Begin with nothing seen."""
        self.kappa, (self.temperature, self.joint, self.natural) = kappa, temperatures
        self.betas, self._shares, self.rises = temperatures.betas, temperatures.shares, temperatures.rises
        self.rays = rays
        self.log_reference, self.chains, self.anchor_cost = log_reference, chains, anchor_cost
        shape = (2, len(kappa.precision), chains)
        skipped = ("leaf_squares", "stretchings", "rises", "permitted", "ray_costs", "ray_end")
        self.kappa_seen = {name: np.full(shape, np.nan) for name in Record._fields if name not in skipped}
        self.squares: list[dict[int, Vector]] = [{}, {}]
        """Of each pass and rung: the leaves' |δ|², shape (chains, leaves)."""
        self.temperature_seen: list[tuple[int, int, dict[str, Vector]]] = []
        self._tables: dict[tuple[int, ...], dict[str, Vector]] = {}
        self.log_weights = np.full(chains, log_reference)
        """Annealing weights of the cooling chains so far, without the final factor."""
        self._weighed_at = (float(kappa.beta[-1]), 0.0)
        """β of the ensemble whose integrals they give, and the ridge's share there."""
        self.final_factors: list[Vector] = []
        """log of what takes their weights to the region's mass, at each last visit, shape (chains,)."""
        self.on_the_way = np.full(chains, -np.inf)
        """log of the sum over the κ rungs so far of each chain's weight for the mass under that rung's tether."""

    @property
    def shown(self) -> NDArray[np.bool_]:
        """Which temperatures say something of their own: each β once, none behind the wall, which cuts energies off."""
        beta, rungs = np.asarray(self.temperature.beta), np.arange(len(self.temperature.beta))
        return (rungs <= self.natural) & ~((self._shares > 0.0) & (beta == beta[self.joint]))

    def add_kappa(self, which: int, rungs: list[int], record: Record) -> None:
        """Enter visits to the κ ladder."""
        for row, rung in enumerate(rungs):
            # A chain that was drawn outside has no weight, and is a sample of nothing but the reference.
            counts = record.permitted[row] | (rung == 0)
            for name, seen in self.kappa_seen.items():
                seen[which, rung] = np.where(counts, getattr(record, name)[row], np.nan)
            self.squares[which][rung] = np.where(counts[:, None], record.leaf_squares[row], np.nan)
            if which == COOLING and rung < len(self.kappa.precision) - 1:
                if rung > 0:
                    energy = self.kappa.beta[rung] * np.where(counts, record.cost[row], -np.inf)
                    self.on_the_way = np.logaddexp(self.on_the_way, self.log_weights + energy)
                self._weigh(record.work_down[row])

    def add_temperature(self, which: int, rungs: list[int], record: Record, *, weighs: bool) -> None:
        """Enter visits to the temperature ladder; those that `weighs` take the cooling chains further down."""
        for row, rung in enumerate(rungs):
            names = ("cost", "ridge", "reach", "work_down", "work_up", "acceptance")
            seen = {name: np.where(record.permitted[row], getattr(record, name)[row], np.nan) for name in names}
            if self.rays is not None and rung >= self.joint:
                names = ("ray_end", "ray_costs", "square", "pulled")
                seen["mass"], seen["densities"] = self.rays.integrals(*(getattr(record, name)[row] for name in names))
            self.temperature_seen.append((which, rung, seen))
            self._tables = {}
            if weighs and rung < len(self.temperature.beta) - 1:
                self._weigh(record.work_down[row])
                self._weighed_at = (float(self.temperature.beta[rung + 1]), float(self._shares[rung + 1]))
            elif weighs:
                if self.rays is None:
                    factors = np.asarray(self.temperature.beta[rung] * self.held(record.cost[row], record.ridge[row]))
                else:
                    factors = seen["mass"] - seen["densities"][:, rung - self.joint]
                self.final_factors.append(factors)

    def held(self, costs: Any, ridges: Any) -> Vector:
        """Return what β multiplies where the cooling chains stand, from the guide and the ridge there."""
        share = self._weighed_at[1]
        return np.asarray(costs if share == 0.0 else (1.0 - share) * np.asarray(costs) + share * np.asarray(ridges))

    def _weigh(self, work: Vector) -> None:
        """Take the cooling chains one rung further; what has no weight gets none, wherever its image may lie."""
        lost = np.isneginf(self.log_weights)
        self.log_weights = np.where(lost, -np.inf, self.log_weights - np.where(lost, 0.0, work))

    def bound_weights(self, costs: Vector) -> Vector:
        """Return log weights, each at most the mass in expectation: of finished chains, or of those now at `costs`.

        These are as `held` returns them.
        """
        if self.final_factors:
            factor = logsumexp(self.final_factors, axis=0) - np.log(len(self.final_factors))
        else:
            factor = self._weighed_at[0] * costs
        # A chain that was drawn outside has no weight, and perhaps no finite cost.
        return self.log_weights + np.where(np.isneginf(self.log_weights), 0.0, factor)

    def hedged(self, log_weights: Vector) -> Vector:
        """Return the weights mixed with those for the masses under the tethers that the chains came by.

        A tether only takes mass away, so the mean of the mixture is below the mass too; and what chains lose while they
        stand still cannot take it all away.
        """
        ways = max(len(self.kappa.precision) - 2, 1)
        return np.logaddexp(np.log1p(-_HEDGE) + log_weights, np.log(_HEDGE / ways) + self.on_the_way)

    def log_mass(self, cutoff: float, *, chains: NDArray, passes: tuple[int, ...], near: Sums | None = None) -> float:
        """Return what the records of the given chains and passes say of the mass; `near` as for `sums`.

        Where all of them were lost between two rungs of the κ ladder, which may be once or at one gap in a hundred, the
        step between these is that of `near`.
        """
        differences = self._kappa_differences(chains, passes, near)
        lost = ~np.isfinite(differences)
        if near is not None and np.sum(lost) <= max(_LOST * len(lost), 1.0):
            differences = np.where(lost, near.kappa_differences, differences)
        joined = self._join(chains, passes, near, differences)
        return float(joined.log_masses(self.betas, np.array([cutoff]), cutoff)[0])

    def sums(
        self,
        cutoffs: Vector,
        cutoff: float,
        *,
        chains: NDArray,
        passes: tuple[int, ...] = (0, 1),
        without: int | None = None,
        way: int | None = None,
        near: Sums | None = None,
    ) -> Sums:
        """Reduce the records of the given chains and passes; `near` is the result for nearly the same.

        Samples `without` one of `PARTS` stretches of the visits to each temperature leave ΔF as it is with all. Of one
        `way`, the first or the second half of the visits to what is colder than the joint counts alone.
        """
        joined = self._join(chains, passes, near, self._kappa_differences(chains, passes, near), without, way)
        masses = joined.log_masses(self.betas, np.append(cutoffs, cutoff), cutoff)
        energies, heat_capacities = self._energies(joined)
        return Sums(
            log_mass=float(masses[-1]),
            curve=masses[:-1],
            energies=energies,
            heat_capacities=heat_capacities,
            leading=joined.leading(self.betas, cutoff),
            kappa_differences=joined.kappa_differences,
            beta_differences=joined.beta_differences,
        )

    def _join(
        self, chains: NDArray, passes: tuple[int, ...], near: Sums | None, kappa_differences: Vector,
        without: int | None = None, way: int | None = None,
    ) -> _Joined:  # fmt: skip
        """Join neighbouring rungs of both ladders by the works of the given chains and passes."""
        tables = {
            name: table[:, :, chains].reshape(len(table), -1, *table.shape[3:])
            for name, table in self.temperature_tables(passes).items()
        }
        if way is not None:
            other = np.repeat(self._halves(passes) == 1 - way, len(chains), axis=1)
            for name, table in tables.items():
                tables[name] = np.where(other.reshape(*other.shape, *[1] * (table.ndim - 2)), np.nan, table)
        costs, down, up = (tables[name] for name in ("cost", "work_down", "work_up"))
        beta_differences = acceptance_ratio(down[:-1], up[1:], None if near is None else near.beta_differences)
        # Outwards from the joint rung, so that what a pass did not visit spoils nothing else. Where one pass has no
        # finite work at all, a difference is infinite, and what comes after it may be unknown.
        with np.errstate(invalid="ignore"):
            log_end = self.log_reference - float(np.sum(kappa_differences))
            colder = np.cumsum(beta_differences[: self.joint][::-1])[::-1]
            warmer = -np.cumsum(beta_differences[self.joint :])
            log_z = log_end + np.concatenate([colder, [0.0], warmer])
        if self.rises:
            costs = np.stack([costs, tables["ridge"]], axis=-1)
        present = np.asarray(~np.isnan(costs).reshape(*down.shape, -1).any(axis=-1))
        if without is not None:
            present &= np.repeat(self._stretches(passes) != without, len(chains), axis=1)
        counts = np.sum(present, axis=1).astype(float)
        by_ray = self._weights_of_rays(tables, present, counts, log_z) if self.rays is not None else None
        return _Joined(
            kappa_differences, beta_differences, log_z, costs[present], tables["reach"][present], counts, by_ray
        )

    def _stretches(self, passes: tuple[int, ...]) -> Vector:
        """Return which of `PARTS` stretches of time each visit belongs to, shape (rungs, visits)."""
        share = self._shares_of_visits(passes)
        # Shifted from rung to rung, so that what was visited once or twice is not all of one stretch.
        return (PARTS * share // 1 + np.arange(len(share))[:, None]) % PARTS

    def _halves(self, passes: tuple[int, ...]) -> Vector:
        """Return which half of the visits to what is colder than the joint each is in, and -1 elsewhere, likewise."""
        share = self._shares_of_visits(passes)
        return np.where(np.arange(len(share))[:, None] < self.joint, 2.0 * share // 1, -1.0)

    def _shares_of_visits(self, passes: tuple[int, ...]) -> Vector:
        """Return which share of the visits to its rung came before each and with half of it, shape (rungs, visits)."""
        visits = np.cumsum(~np.isnan(self.temperature_tables(passes)["cost"]).all(axis=2), axis=1)
        return (visits - 0.5) / np.maximum(visits[:, -1:], 1)

    def _weights_of_rays(
        self, tables: dict[str, Vector], present: NDArray[np.bool_], counts: Vector, log_z: Vector
    ) -> Vector:
        """Return the log of what each sample's ray counts; of what is colder than the joint not even Z does."""
        warm = slice(self.joint, None)
        mass, densities = (tables[name][warm][present[warm]] for name in ("mass", "densities"))
        mixture = log_cover(-densities, counts[warm], log_z[warm])
        return np.nan_to_num(mass - mixture, nan=-np.inf, posinf=-np.inf, neginf=-np.inf)

    def _kappa_differences(self, chains: NDArray, passes: tuple[int, ...], near: Sums | None) -> Vector:
        rungs = np.arange(len(self.kappa.precision))
        down, up = (self.kappa_seen[name][np.ix_(np.array(passes), rungs, chains)] for name in ("work_down", "work_up"))
        # The reference is drawn once, for both passes.
        down[:, 0] = self.kappa_seen["work_down"][COOLING, 0, chains]
        return acceptance_ratio(_rows(down)[:-1], _rows(up)[1:], None if near is None else near.kappa_differences)

    def temperature_tables(self, passes: tuple[int, ...]) -> dict[str, Vector]:
        """Return what was seen by rung, visit and chain; NaN where there is nothing."""
        if passes not in self._tables:
            rungs: list[list[dict[str, Vector]]] = [[] for _ in self.temperature.beta]
            # Passes may run side by side, and then it is chance which enters its records first.
            for which, rung, seen in sorted(self.temperature_seen, key=operator.itemgetter(0)):
                if which in passes:
                    rungs[rung].append(seen)
            shape = (len(rungs), max(map(len, rungs)))
            # Where they are colder than the joint nobody asks for rays.
            shapes = {name: x.shape for _, _, seen in self.temperature_seen for name, x in seen.items()}
            tables = {name: np.full((*shape, *each), np.nan) for name, each in shapes.items()}
            for name, table in tables.items():
                for rung, visits in enumerate(rungs):
                    for row, seen in enumerate(visits):
                        table[rung, row] = seen.get(name, np.nan)
            self._tables[passes] = tables
        return self._tables[passes]

    def _energies(self, joined: _Joined) -> tuple[Vector, Vector]:
        """Return λ̂ and the heat capacity at each β, from all samples: the cost of a point is its reach."""
        beta = np.asarray(self.temperature.beta)
        log_density = log_mixture(joined.costs, self.betas, joined.counts, joined.log_z)
        inside = np.isfinite(log_density) & np.isfinite(joined.reaches)
        means, variances = np.full((2, len(beta)), np.nan)
        rise, log_density = joined.reaches[inside] - self.anchor_cost, log_density[inside]
        for k, b in enumerate(beta):
            if joined.counts[k] == 0 or not inside.any():
                continue
            weight = -b * rise - log_density
            weight = np.exp(weight - weight.max())
            weight /= weight.sum()
            means[k] = np.sum(weight * rise)
            variances[k] = np.sum(weight * (rise - means[k]) ** 2)
        return beta * means, beta**2 * variances

    def separation(self) -> float:
        """Return R-hat over a pass's chains of the leaves' log squares along the last rungs, of the worse pass.

        Single chains of the two passes are compared with each other, less what both lag: the cooling one comes too
        late to each rung and the heating one, which comes from below, leaves it too late. So they are held against
        each other on rungs that lie some way apart, the same way at the end of the ladder and before it, and the
        smallest R-hat counts.
        """
        if self.chains > 1:
            found = [_r_hat([seen[rung] for rung in sorted(seen) if rung > 0][-_WINDOW:]) for seen in self.squares]
            return float(np.fmax.reduce(found))
        cooling, heating = (
            {rung: squares for rung, squares in seen.items() if rung > 0 and np.all(np.isfinite(squares))}
            for seen in self.squares
        )
        end, spent = max(cooling.keys() & heating.keys(), default=0), np.cumsum(self.kappa.gradients)
        most = int(np.sum(spent[: end + 1] >= spent[end] - _LATE * spent[-1])) - 1

        def apart(late: int, last: int) -> float:
            pairs = (
                (cooling[c], heating[c - late]) for c in range(last, 0, -1) if c in cooling and c - late in heating
            )
            return _r_hat([np.concatenate(pair) for pair in itertools.islice(pairs, _WINDOW)])

        shifts = range(0, most + 1, 1 + most // _SHIFTS)
        found = [float(np.fmax(apart(late, end), apart(late, end - most))) for late in shifts]
        return float(np.fmin.reduce(found))

    def shortfall(self, cutoff: float) -> float:
        """Return how far the upper tenth of the costs at the last temperature lies below the cutoff, in their scatter.

        0 where that is less than what weights bridge, or where rays do.
        """
        if self.rays is not None:
            return 0.0
        last = len(self.temperature.beta) - 1
        reaches = np.concatenate([seen["reach"] for _, rung, seen in self.temperature_seen if rung == last])
        # In whatever order passes side by side came in.
        reaches = np.sort(reaches[np.isfinite(reaches)])
        if not reaches.size:
            return np.nan
        distance = cutoff - float(np.quantile(reaches, 0.9))
        if self.temperature.beta[last] * distance <= _BRIDGED:
            return 0.0
        return distance / max(float(np.std(reaches)), 1e-300)

    def standstill(self) -> float:
        """Return the longest share of a pass's gradients over which a chain was refused all its long trajectories.

        The mean over chains, of the worse pass. Steps that are right for most chains can hold one in a place much
        narrower than the others', or at the wall.
        """
        refused = self.kappa_seen["acceptance"] < _REFUSED
        spent = self.kappa.gradients[1:]
        longest = here = np.zeros(refused.shape[::2])
        # A chain that goes down stands still from rung to rung, and one that goes up likewise the other way.
        for rung, cost in enumerate(spent, start=1):
            here = np.where(refused[:, rung], here + cost, 0.0)
            longest = np.maximum(longest, here)
        return float(np.max(longest.mean(axis=1)) / np.sum(spent))

    def blocked(self) -> float:
        """Return the share of visits, where the ridge rises and on to the natural β, that refused a chain all its way.

        NaN where it does not rise. Chains that stay where they were cool and heat alike, and agree.
        """
        rises = {rung for rung, share in enumerate(self._shares) if share > 0.0 and rung <= self.natural}
        visits = [seen["acceptance"] for _, rung, seen in self.temperature_seen if rung in rises]
        return float(np.mean(np.stack(visits) < _REFUSED)) if visits else np.nan

    def overlaps(self, differences: Vector) -> Vector:
        """Return the overlap of each pair of neighbouring κ rungs."""
        return overlap(_rows(self.kappa_seen["work_down"])[:-1], _rows(self.kappa_seen["work_up"])[1:], differences)


def _rows(works: Vector) -> Vector:
    """Return works of shape (passes, rungs, chains) as (rungs, passes · chains)."""
    return np.moveaxis(works, 0, 1).reshape(works.shape[1], -1)


def _r_hat(squares: list[Vector]) -> float:
    """Return R-hat over chains of the worst leaf's log |δ|², given on each of at least four rungs as (chains, leaves).

    Between chains it goes by the quartiles: a few that are lost where little mass is change the result by little.
    """
    if len(squares) < 4:
        return np.nan
    # A leaf of no size is the same everywhere.
    logs = np.log(np.maximum(np.stack(squares), 1e-300))
    alive = np.all(np.isfinite(logs), axis=(0, 2))
    if alive.sum() < 2:
        return np.nan
    about = logs[:, alive] - np.median(logs[:, alive], axis=1, keepdims=True)
    low, high = np.quantile(about.mean(axis=0), [0.25, 0.75], axis=0)
    within = np.median(about.var(axis=0, ddof=1), axis=0)
    return float(np.max(np.sqrt(1.0 + ((high - low) / _QUARTILES) ** 2 / np.maximum(within, 1e-12))))
