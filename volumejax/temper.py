r"""The global log mass: particles annealed from the prior to the region, wherever it lies.

.. math:: \mathrm{mass}(\varepsilon) = \frac{Z(\beta)}{Z(0)}\,\mathbb{E}_\beta[e^{\beta C} 1\{C \le \varepsilon\}],
          \quad Z(\beta) = \int \pi(\theta)\, e^{-\beta C(\theta)} d\theta

A discarded pilot fixes temperatures and steps. After it every island of particles gives an independent, unbiased
estimate, so that their mean certifies a lower bound, and their scatter the error.

Sources: Del Moral, Doucet & Jasra 2006; Neal 2001; for the saddle point docs/mathematics.md.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PyTree
from numpy.typing import NDArray
from scipy.special import logsumexp

from volumejax import tree
from volumejax.annealing import pad, slopes
from volumejax.chains import Curve
from volumejax.descent import Course, Seen, Way, mean_cost, next_beta, reduced, share_done, share_inside, useful_levels
from volumejax.diagnostics import certified_lower, effective_sample_size, log_share_upper, skewed_mean_error
from volumejax.ensemble import Ensemble, ensemble_of
from volumejax.frames import frame_of
from volumejax.islands import IslandTrace
from volumejax.metric import Metric, fit_metric, plain_metric
from volumejax.parallel import num_devices, require_threefry
from volumejax.particles import MOST_LEVELS, Ladder, Swarm, Visit, descend, mean_squares, populate
from volumejax.priors import Gaussian, Lebesgue, UniformBall, UniformBox
from volumejax.results import BoundKind, Kind, VolumeEstimate, last_estimate
from volumejax.validation import check_deterministic, check_question, check_region, named

__all__ = ["temper_stream", "temper_volume"]

Cost = Callable[[PyTree], Float[Array, ""]]
Vector = NDArray[np.float64]
OnProgress = Callable[[str, float], None]

_ISLANDS, _LEAST_ISLANDS = 16, 4
"""Islands by default, and as many as an error takes."""
_PILOT_SHARE, _PILOT_LEAST = 4, 32
"""Of which part of the islands the pilot is made, and its particles at least."""
_PARTICLES = (512, 2048)
"""Of all islands together by default, at least and at most."""
_NUMBERS = 2**18
"""Numbers of the parameters of all particles that move at once."""
_STEPS, _PER_STEP = (5, 32), 250
"""Mean leapfrog steps of a trajectory at least and at most, and parameters for each of them: of many directions the
softest lie far from the stiffest, and a long trajectory explores them better than many short ones."""
_UNEVENNESS, _MOST_UNEVEN = 0.03, 0.5
"""Relative variance of the weights between neighbouring levels at effort 1, for trajectories of the least length, and
at most; it grows so that longer ones cost as many gradients."""
_ENOUGH = 0.6
"""Share of the particles inside, about that of the saddle point, at which the ladder ends at the latest."""
_REPEATS = 24
"""Visits to the last level, whose costs average the final factor."""
_REFIT, _TUNING = 2.0, 4
"""Factor of β after which the pilot fits the metric anew, and the visits that it then takes to tune the step."""
_TARGET, _GAIN, _FAST_GAIN, _FIRST_STEP = 0.9, 0.7, 2.0, 0.5
"""Acceptance that steps are tuned to, the change of the log step for one that is off by one, in general and after a new
metric, and the first step."""
_LONGEST = math.log(0.5 * math.pi)
"""Log of the step that turns a Gaussian prior by a right angle."""
_FALL, _STEEPEST = 0.5, math.log(4.0)
"""Power of β by which steps are shortened ahead of what the acceptance says, and the largest log ratio of β that
counts."""
_MOST, _COLDEST = 4096, 1e4
"""Levels, and βε per dimension, after which the cutoff counts as out of reach."""
_CURVE = 17
"""Cutoffs of the curve, from the one asked for to what is typical of the prior."""
_NUM_KEYS = 3
_PILOT_KEY, _DRAW, _MOVE = range(_NUM_KEYS)


def temper_volume(
    key: Key[Array, ""],
    cost: Cost,
    prior: Any,
    like: PyTree,
    *,
    cutoff: float,
    anchor: PyTree | None = None,
    effort: float = 1.0,
    num_steps: int | None = None,
    num_particles: int | None = None,
    num_islands: int = _ISLANDS,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    on_progress: OnProgress | None = None,
) -> VolumeEstimate:
    """Estimate the log prior mass of all of {C ≤ ε}: the chance to guess such parameters.

    For the host; jitted in pieces. Ctrl-C returns what the islands so far say, with a status that says so. Parts of the
    region that no particle finds are missing from the estimate and from its error, never from what `lower` claims.

    Args:
        key: typed threefry key.
        cost: params -> scalar, deterministic; differentiable where gradients are to help, though a cost without any,
            such as an error rate, is sampled too.
        prior: `Gaussian`, `UniformBox` or `UniformBall`.
        like: parameters, for shapes and dtypes alone.
        cutoff: ε, positive, in units of the cost.
        anchor: parameters inside the region, for the prior term; None leaves it undefined.
        effort: scales the number of levels, at each of which a particle makes one trajectory.
        num_steps: mean leapfrog steps of a trajectory; None chooses between 5 and 32 by D.
        num_particles: of all islands together, at least two for each; None chooses between 512 and 2,048 by D.
        num_islands: independent populations, at least 4; their scatter is the error.
        batch_size: islands at once; None takes a quarter of them. Does not change the result.
        mesh: device mesh with an axis `rays`, over which islands are spread; None for one device.
        on_progress: called with a stage's name and the share of it that is done.

    Returns:
        A `VolumeEstimate` of the region "global", with `curve` and an `IslandTrace`; NumPy float64 leaves.

    Raises:
        ValueError: arguments that do not fit each other, an improper prior, a cost that is not deterministic, a cutoff
            that no particle of the pilot comes near.

    Example:
        >>> import jax, jax.numpy as jnp, volumejax as vj
        >>> ball = lambda w: 0.5 * jnp.sum(w**2)
        >>> estimate = vj.temper_volume(
        ...     jax.random.key(0), ball, vj.Gaussian(1.0), like=jnp.zeros(10), cutoff=0.01, num_particles=256
        ... )
        >>> bool(abs(estimate.log_mass - -27.8217) < 4 * estimate.std_error), bool(estimate.std_error < 0.5)
        (True, True)

    Reference: docs/mathematics.md, "From the prior".
    """
    stream = temper_stream(
        key,
        cost,
        prior,
        like=like,
        cutoff=cutoff,
        anchor=anchor,
        effort=effort,
        num_steps=num_steps,
        num_particles=num_particles,
        num_islands=num_islands,
        batch_size=batch_size,
        mesh=mesh,
        on_progress=on_progress,
    )
    return last_estimate(stream)


def temper_stream(
    key: Key[Array, ""],
    cost: Cost,
    prior: Any,
    like: PyTree,
    *,
    cutoff: float,
    anchor: PyTree | None = None,
    effort: float = 1.0,
    num_steps: int | None = None,
    num_particles: int | None = None,
    num_islands: int = _ISLANDS,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[VolumeEstimate]:
    """Yield what the islands that are done say so far; the last one is what `temper_volume` returns.

    Args:
        key: as for `temper_volume`.
        cost: as for `temper_volume`.
        prior: as for `temper_volume`.
        like: as for `temper_volume`.
        cutoff: as for `temper_volume`.
        anchor: as for `temper_volume`.
        effort: as for `temper_volume`.
        num_steps: as for `temper_volume`.
        num_particles: as for `temper_volume`.
        num_islands: as for `temper_volume`.
        batch_size: as for `temper_volume`.
        mesh: as for `temper_volume`.
        on_progress: as for `temper_volume`.

    Yields:
        `VolumeEstimate` with NumPy float64 leaves.

    Raises:
        ValueError: as for `temper_volume`, before the first gradient where possible.

    Example:
        >>> import jax, jax.numpy as jnp, volumejax as vj
        >>> stream = vj.temper_stream(
        ...     jax.random.key(0), lambda w: jnp.sum(w**2), vj.Gaussian(1.0), like=jnp.zeros(2), cutoff=0.1
        ... )
        >>> [int(e.num_rays) for e in stream]
        [4, 8, 12, 16]
    """
    key = require_threefry(key)
    if not (math.isfinite(effort) and effort > 0.0):
        raise ValueError(f"effort must be a positive number, got {effort}")
    if num_islands < _LEAST_ISLANDS:
        raise ValueError(
            f"num_islands must be at least {_LEAST_ISLANDS}, got {num_islands}; their scatter is the error"
        )
    if num_particles is not None and num_particles < 2 * num_islands:
        raise ValueError(f"num_particles must be at least two for each of {num_islands} islands, got {num_particles}")
    for name, count in (("num_steps", num_steps), ("batch_size", batch_size)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if isinstance(prior, Lebesgue):
        raise ValueError("the global mass needs a proper prior, got Lebesgue(); use vj.UniformBox or vj.UniformBall")
    if not isinstance(prior, Gaussian | UniformBox | UniformBall):
        raise ValueError(f"prior must be one such as vj.Gaussian(sigma=1.0), got {named(prior)}")
    tree.check_floating(like, "like")
    like = jax.tree.map(lambda x: jnp.zeros_like(jnp.asarray(x)), like)
    middle, attainable = check_region(cost, prior.middle(like), prior, cutoff)
    check_deterministic(cost, middle)
    if anchor is not None:
        if jax.tree.map(jnp.shape, anchor) != jax.tree.map(jnp.shape, like):
            raise ValueError("anchor and like must have the same structure and shapes; pass like=anchor")
        anchor, _ = check_question(cost, anchor, prior, cutoff)
    dimension = tree.size(middle)
    if num_particles is None:
        num_particles = int(np.clip(2_048_000 // dimension, *_PARTICLES))
    if num_steps is None:
        num_steps = int(np.clip(dimension // _PER_STEP, *_STEPS))
    devices = num_devices(mesh)
    at_once = -(-num_islands // _PILOT_SHARE) if batch_size is None else min(batch_size, num_islands)
    chunk = -(-at_once // devices) * devices
    each = -(-num_particles // num_islands)
    run = _Run(
        ensemble=ensemble_of(cost, frame_of(prior, middle)),
        key=key,
        cutoff=float(attainable),
        prior_term=math.nan if anchor is None else float(prior.anchor_term(anchor)),
        islands=num_islands,
        chunk=chunk,
        particles=each,
        lanes=_divisor(each, max(_NUMBERS // (dimension * chunk), 1)),
        steps=num_steps,
        unevenness=min(_UNEVENNESS * ((num_steps + 1) / (_STEPS[0] + 1) / effort) ** 2, _MOST_UNEVEN),
        mesh=mesh,
        on_progress=on_progress or (lambda *_: None),
    )
    return run.stream()


class _Group(NamedTuple):
    """Islands that go down together, in chunks."""

    islands: range
    numbers: list[Array]
    """Of each chunk; some beyond the islands may fill up the last one."""
    swarms: list[Swarm]

    @property
    def costs(self) -> Vector:
        """Where the particles stand, [islands, particles]."""
        costs = [np.asarray(swarm.position.cost) for swarm in self.swarms]
        return np.concatenate(costs)[: len(self.islands)]

    @property
    def stiffness(self) -> Vector:
        """One over the mean square of each leaf's whitened coordinates."""
        squares = np.concatenate([np.asarray(mean_squares(swarm)) for swarm in self.swarms])[: len(self.islands)]
        return 1.0 / np.maximum(np.mean(squares, axis=0), 1e-30)


@dataclasses.dataclass(frozen=True)
class _Run:
    """One run: what is fixed."""

    ensemble: Ensemble
    key: Array
    cutoff: float
    prior_term: float
    islands: int
    chunk: int
    """Islands at once."""
    particles: int
    """Of each island."""
    lanes: int
    """Particles of an island at once."""
    steps: int
    """Mean leapfrog steps of a trajectory."""
    unevenness: float
    """Relative variance of the weights between neighbouring levels."""
    mesh: Mesh | None
    on_progress: OnProgress

    def stream(self) -> Iterator[VolumeEstimate]:
        course = self._pilot()
        levels, count = pad(course.ladder), len(course.ladder.beta)
        ends = [*course.metrics, count]
        done: list[Seen] = []
        for first in range(0, self.islands, self.chunk):
            here = range(first, min(first + self.chunk, self.islands))
            group = self._populate(self.key, here)
            prior_costs, visits = group.costs, []
            for (begin, metric), end in zip(course.metrics.items(), ends[1:], strict=True):
                for start in range(begin, end, MOST_LEVELS):
                    group, visit = self._descend(metric, self.key, group, levels, start, min(MOST_LEVELS, end - start))
                    visits.append(visit)
                    share = min(start + MOST_LEVELS, end) / count
                    self.on_progress("islands", (first + len(here) * share) / self.islands)
            done.append(reduced(course, prior_costs, Visit(*(np.concatenate(x) for x in zip(*visits, strict=True)))))
            yield self._summary(course, done)

    def _pilot(self) -> Course:
        """Go down as the particles allow, and fix the way, the metrics and the steps."""
        key = jax.random.fold_in(self.key, _PILOT_KEY)
        group = self._populate(key, range(max(self.islands // _PILOT_SHARE, -(-_PILOT_LEAST // self.particles))))
        prior_costs = group.costs.ravel()
        finite = prior_costs[np.isfinite(prior_costs)]
        if not finite.size:
            raise ValueError("every draw from the prior has a NaN or infinite cost; check the cost or narrow the prior")
        typical = float(np.median(finite))
        metric = plain_metric(self.ensemble.frame.anchor, turns=self.ensemble.frame.walls is None)
        way, metrics = Way(group.stiffness, (prior_costs, np.zeros(prior_costs.size))), {1: metric}
        log_step, fitted, visits = math.log(_FIRST_STEP), 0.0, 0
        while True:
            beta = next_beta(way.betas[-1], *way.seen[-1], self.unevenness, self.cutoff)
            if way.betas[-1] > 0.0:
                log_step -= _FALL * min(math.log(beta / way.betas[-1]), _STEEPEST)
            stiffness, gain, tuning = group.stiffness, _GAIN, 0
            if len(way.betas) > 1 and beta >= _REFIT * fitted:
                metric, fitted = self._fit(group, stiffness, way.betas[-1]), beta
                metrics[len(way.betas)] = metric
                gain, tuning = _FAST_GAIN, _TUNING
            # The step is tuned to a new metric at the temperature before.
            for there in [way.betas[-1]] * tuning + [beta]:
                visits, step = visits + 1, math.exp(log_step)
                levels = Ladder(np.array([way.betas[-1], there]), np.full(2, step), np.stack([stiffness, stiffness]))
                here = jax.random.fold_in(key, _NUM_KEYS + visits)
                group, visit = self._descend(metric, here, group, pad(levels), 1, 1)
                log_step = min(log_step + gain * (float(np.mean(visit.acceptance)) - _TARGET), _LONGEST)
            way.add(beta, step, stiffness, visit)
            mean = mean_cost(*way.seen[-1])
            self.on_progress("pilot", share_done(typical, mean, self.cutoff))
            if mean + 1.0 / beta <= self.cutoff or share_inside(*way.seen[-1], self.cutoff) >= _ENOUGH:
                break
            if len(way.betas) > _MOST or beta * self.cutoff > _COLDEST * (1 + self.ensemble.dimension):
                raise ValueError(
                    f"the cutoff {self.cutoff:g} is out of reach: after {len(way.betas)} levels the particles' mean "
                    f"cost is {mean:.4g}; raise the cutoff, num_particles or effort"
                )
        way.repeat(_REPEATS - 1)
        ladder = way.ladder
        cutoffs = np.geomspace(self.cutoff, typical, _CURVE) if typical > self.cutoff else np.array([self.cutoff])
        gradients = visits * len(group.islands) * self._gradients_per_visit
        useful = useful_levels(ladder.beta, way.seen, cutoffs, self.unevenness)
        return Course(ladder, metrics, cutoffs, useful, gradients)

    def _fit(self, group: "_Group", stiffness: Vector, beta: float) -> Metric:
        """Fit the metric to the gradients where the particles stand."""
        found = []
        for swarm in group.swarms:
            flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), swarm.position)
            found.append([np.asarray(x) for x in slopes(self.ensemble, flat, self.lanes)])
        joined = [np.concatenate(x)[: len(group.islands) * self.particles] for x in zip(*found, strict=True)]
        frame = self.ensemble.frame
        precision = max(frame.stiffness, float(np.min(stiffness)))
        return fit_metric(joined, np.full(len(joined[0]), beta), precision, turns=frame.walls is None)

    def _populate(self, key: Array, islands: range) -> "_Group":
        """Draw the particles of these islands, in chunks of one size; what fills up the last one is dropped."""
        draws = jax.random.fold_in(key, _DRAW)
        numbers = [jnp.arange(first, first + self.chunk, dtype=jnp.int32) for first in islands[:: self.chunk]]
        swarms = [populate(self.ensemble, draws, n, self.particles, self.lanes, self.mesh) for n in numbers]
        return _Group(islands, numbers, swarms)

    def _descend(
        self, metric: Metric, key: Array, group: "_Group", levels: Ladder, start: int, count: int
    ) -> tuple["_Group", Visit]:
        """Visit levels, and return what was seen there as NumPy arrays."""
        key, swarms, visits = jax.random.fold_in(key, _MOVE), [], []
        spans = (jnp.int32(start), jnp.int32(count), jnp.int32(self.steps))
        for numbers, swarm in zip(group.numbers, group.swarms, strict=True):
            swarm, visit = descend(self.ensemble, metric, key, swarm, levels, *spans, numbers, self.lanes, self.mesh)
            swarms.append(swarm)
            visits.append(jax.device_get(visit))
        joined = (np.concatenate(x, axis=1)[:count, : len(group.islands)] for x in zip(*visits, strict=True))
        return group._replace(swarms=swarms), Visit(*joined)

    @property
    def _gradients_per_visit(self) -> int:
        """Of an island's particles at one level."""
        return (self.steps + 1) * self.particles

    def _summary(self, course: Course, done: list[Seen]) -> VolumeEstimate:
        whole = Seen(*(np.concatenate(x) for x in zip(*done, strict=True)))
        weights = whole.log_masses[:, 0]
        prior_costs = np.sort(whole.prior_costs.ravel())
        levels = len(course.ladder.beta)
        trace = IslandTrace(
            log_weights=weights,
            betas=course.ladder.beta,
            mean_cost=np.mean(whole.mean_cost, axis=0),
            ess=np.mean(whole.ess, axis=0),
            acceptance=np.mean(whole.acceptance, axis=0),
            prior_costs=prior_costs,
            num_particles=np.asarray(self.islands * self.particles),
            gradients=np.asarray(course.gradients + len(weights) * (levels - 1) * self._gradients_per_visit),
            non_finite=np.asarray(np.mean(~np.isfinite(prior_costs))),
            progress=np.asarray(len(weights) / self.islands),
        )
        with np.errstate(divide="ignore"):
            log_masses = np.asarray(logsumexp(whole.log_masses, axis=0)) - math.log(len(weights))
        errors = np.array([skewed_mean_error(x) for x in whole.log_masses.T])
        log_mass = float(log_masses[0])
        passing = int(np.sum(prior_costs <= self.cutoff))
        return VolumeEstimate(
            log_mass=np.asarray(log_mass),
            std_error=np.asarray(errors[0]),
            lower=np.asarray(min(float(certified_lower(weights)), 0.0)),
            upper=np.asarray(log_share_upper(passing, len(prior_costs))),
            kind=np.asarray(_kind(trace), np.int32),
            bound_kind=np.asarray(BoundKind.CERTIFIED, np.int32),
            hysteresis=np.full(2, np.nan),
            prior_term=np.asarray(self.prior_term),
            volume_term=np.asarray(log_mass - self.prior_term),
            mean_log_weight=np.asarray(np.mean(weights)),
            std_log_weight=np.asarray(trace.scatter),
            max_log_weight=np.asarray(np.max(weights)),
            ess=np.asarray(effective_sample_size(weights)),
            pareto_k=np.asarray(np.nan),
            noise=np.asarray(np.nan),
            scout_evaluations=np.asarray(0),
            num_rays=len(weights),
            region="global",
            curve=Curve(course.cutoffs, log_masses, errors),
            trace=trace,
        )


def _kind(trace: IslandTrace) -> Kind:
    """Return what may be claimed: of two or three islands the scatter is not known well enough for an error."""
    if len(trace.log_weights) < _LEAST_ISLANDS:
        return Kind.LOWER_BOUND
    return Kind.NOT_MIXED if trace.disagrees else Kind.ESTIMATE


def _divisor(count: int, most: int) -> int:
    """Return the largest divisor of `count` that is at most `most`: the map over particles then has one program."""
    return max(d for d in range(1, count + 1) if count % d == 0 and d <= most)
