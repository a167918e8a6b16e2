r"""The tether estimator: the log mass of the star or the connected region, by annealed, escorted chains in two passes.

.. math:: \mathrm{mass}(\varepsilon) = Z(\beta, 0)\,\mathbb{E}_\beta[e^{\beta C} 1\{\theta \in \mathrm{region}\}]

A tether κ|δ|²/2 holds chains at the anchor, where the normaliser is known exactly, and is let go along a ladder. The
cooling pass starts from exact draws: its weights certify a lower bound. A heating pass starts from independent chains
beyond the end. Bennett's acceptance ratio over both gives the estimate, and their difference says whether it mixed.

Sources: Frenkel & Ladd 1984; Xu, Frenkel & Liu 2011 (PRL 106, 245502) for the tether; Neal 2001 and Vaikuntanathan &
Jarzynski 2008 for the weights; Bennett 1976 and Jarzynski 2002 for the estimate.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PyTree

from volumejax import tree
from volumejax.annealing import Record, begin, laid_out_like, pad
from volumejax.ensemble import CHEAP, Ensemble, Position, Rung, ensemble_of, with_ridge
from volumejax.frames import Frame, frame_of
from volumejax.friction import try_ladder
from volumejax.ladder import Survey, kappa_ladder, temperature_ladder
from volumejax.metric import Metric
from volumejax.parallel import Launcher, launchers, num_devices, require_threefry
from volumejax.passes import Leg, Pass, rounds, stages, walk
from volumejax.pilot import Pilot, fly
from volumejax.regions import Connected, Star
from volumejax.results import VolumeEstimate, last_estimate
from volumejax.sample_rays import SampleRays
from volumejax.shear import Shear, find_shear
from volumejax.summary import Plan, summarise
from volumejax.tally import COOLING, HEATING, Tally
from volumejax.validation import check_deterministic, check_question, evaluate, named

__all__ = ["tether_stream", "tether_volume"]

Cost = Callable[[PyTree], Float[Array, ""]]
OnProgress = Callable[[str, float], None]

_GRADIENTS = 120_000
"""Gradients per chain at effort 1 for D ≥ 4,810; up to four times as many for smaller problems, where they cost
little."""
_PILOT, _KAPPA, _TEMPERATURE = 0.13, 0.38, 0.03
"""Shares of them for the pilot, each pass down or up the κ ladder, and the temperatures."""
_TRIAL, _MOST_TRIAL = 0.1, 0.25
"""Of a pass of the κ ladder, the share that goes to looking for its friction beforehand, and at most, where the fewest
rungs that hold together take more."""
_LEAST_CHAINS, _USUAL_CHAINS = 1, 2
"""Of each pass; where there is one, the pilot takes half of its share, as if there were two."""
_MOST_STEPS = 500
_PLACES = (1.0, 1.0, 100.0)
"""Precisions, relative to the prior's, of the draws at which a leaf is seen to be added to the outputs."""
_MEANT = 0.01
"""Share of the cutoff by which a cost in sheared coordinates may be off."""
_FORWARDS = 3
"""Evaluations of the cost that a gradient is worth."""
_LAST_VISITS, _COLDEST_VISITS = 24, 6
"""Visits of each chain to the last rung, over which the final factor is averaged, and to the coldest for the curve."""
_FIRST_VISITS = 4
"""Visits of the heating chains beyond the end of the ladder, at its end and at the natural β, before they count."""
_SETTLED = 0.1
"""Of the gradients of a pass of the κ ladder, those for which the heating chains stay at its end before they climb."""
_SECONDS = 2.0
"""Between two yields, at least."""
_OVERSHOOT, _BEYOND = 0.9, 10.0
"""Precision, relative to the prior's, to which the heating chains are let go before they start, and standard deviations
by which that takes the mean of ½|δ|² further at most: they have to come back."""
_PILOT_KEY, _START, _COOL, _RELEASE, _CURVE, _OVER, _SETTLE, _HEAT, _WARM, _DWELL, _TRIAL_KEY = range(11)


def tether_volume(
    key: Key[Array, ""],
    cost: Cost,
    params: PyTree,
    prior: Any,
    *,
    cutoff: float,
    region: Star | Connected = Connected(),  # noqa: B008 - frozen and stateless
    effort: float = 1.0,
    num_chains: int | None = None,
    beta_factor: float = 1.0,
    escort: float = 1.0,
    decades: float = 2.0,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    on_progress: OnProgress | None = None,
) -> VolumeEstimate:
    """Estimate the log prior mass of the region around `params`: a value, its error, a certified bound, a mixing test.

    For the host; jitted in pieces. Ctrl-C returns what is there, with a status that says so.

    Args:
        key: typed threefry key.
        cost: params -> scalar nats, differentiable and deterministic, at most `cutoff` at the anchor. One of
            this package's behaviours, without micro-batches, of a network that adds a bias to its logits can take far
            fewer gradients (connected region): the chains then move so that the mean of the logits stays.
        params: the anchor, a pytree of floating arrays, D numbers in all.
        prior: `Gaussian`, `UniformBox`, `UniformBall` or `Lebesgue`.
        cutoff: ε in nats, positive.
        region: `Connected()` or `Star()`.
        effort: scales the number of gradients, fixed beforehand: 1 means about 120,000 per chain, for fewer than 4,810
            parameters 4,810/D times as many but at most four times, and never fewer than the ladder needs to hold
            together. The error falls like its root, the bias of slow modes like its inverse.
        num_chains: chains of each pass, or the next multiple of its devices; None chooses between 2 and 64 by D. At a
            given cost a few long chains lag behind less than many short ones, least of all a single one: its error
            comes from stretches of the ladder and from what sets the passes apart, and other parts of the region are
            found only by that.
        beta_factor: multiplies the automatic inverse temperature; the answer does not depend on it, but well below 1
            the chains of a network press on the wall and are slow.
        escort: largest share of a free direction's stretch that the maps between levels may take, 0 for plain weights.
        decades: how far below `cutoff` the curve reaches, in powers of ten.
        batch_size: chains at once; None takes all. Does not change the result.
        mesh: device mesh with an axis `rays`, over which chains are spread; None for one device. With twice as many
            devices as chains both passes go at once, each on half of them.
        on_progress: called with a stage's name and the share of it that is done.

    Returns:
        A `VolumeEstimate` with `curve`, `learning_coefficient`, `hysteresis` and a `ChainTrace`; NumPy float64 leaves.

    Raises:
        ValueError: arguments that do not fit each other, a cost that is not deterministic, an anchor outside its own
            region, an improper prior over an unbounded region.

    Example:
        >>> import jax, jax.numpy as jnp, volumejax as vj
        >>> ball = lambda w: 0.5 * jnp.sum(w**2)
        >>> question = (ball, jnp.zeros(10), vj.Gaussian(1.0))
        >>> estimate = vj.tether_volume(jax.random.key(0), *question, cutoff=0.01, effort=0.02)
        >>> bool(abs(estimate.log_mass - -27.8217) < 4 * estimate.std_error)
        True

    Reference: docs/mathematics.md, "The tether".
    """
    stream = tether_stream(
        key,
        cost,
        params,
        prior,
        cutoff=cutoff,
        region=region,
        effort=effort,
        num_chains=num_chains,
        beta_factor=beta_factor,
        escort=escort,
        decades=decades,
        batch_size=batch_size,
        mesh=mesh,
        on_progress=on_progress,
    )
    return last_estimate(stream)


def tether_stream(
    key: Key[Array, ""],
    cost: Cost,
    params: PyTree,
    prior: Any,
    *,
    cutoff: float,
    region: Star | Connected = Connected(),  # noqa: B008 - frozen and stateless
    effort: float = 1.0,
    num_chains: int | None = None,
    beta_factor: float = 1.0,
    escort: float = 1.0,
    decades: float = 2.0,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[VolumeEstimate]:
    """Yield what can be said so far, every few seconds; the last one is what `tether_volume` returns.

    While the chains cool, each estimate is a lower bound from where they stand (the tether only takes mass away); then
    come the estimates from the cooling pass, and at last from both.

    Args:
        key: as for `tether_volume`.
        cost: as for `tether_volume`.
        params: as for `tether_volume`.
        prior: as for `tether_volume`.
        cutoff: as for `tether_volume`.
        region: as for `tether_volume`.
        effort: as for `tether_volume`.
        num_chains: as for `tether_volume`.
        beta_factor: as for `tether_volume`.
        escort: as for `tether_volume`.
        decades: as for `tether_volume`.
        batch_size: as for `tether_volume`.
        mesh: as for `tether_volume`.
        on_progress: as for `tether_volume`.

    Yields:
        `VolumeEstimate` with NumPy float64 leaves.

    Raises:
        ValueError: as for `tether_volume`, before the first gradient where possible.

    Example:
        >>> import jax, jax.numpy as jnp, volumejax as vj
        >>> question = (lambda w: 0.5 * jnp.sum(w**2), jnp.zeros(4), vj.Gaussian(1.0))
        >>> stream = vj.tether_stream(jax.random.key(0), *question, cutoff=0.1, effort=0.01)
        >>> [e.kind.item() for e in stream][-1] == vj.Kind.ESTIMATE
        True
    """
    key = require_threefry(key)
    if not isinstance(region, Star | Connected):
        raise ValueError(f"region must be vj.Star() or vj.Connected(), got {named(region)}")
    for name, value in (("effort", effort), ("beta_factor", beta_factor)):
        if not (math.isfinite(value) and value > 0.0):
            raise ValueError(f"{name} must be a positive number, got {value}")
    if not 0.0 <= escort <= 1.0:
        raise ValueError(f"escort must lie between 0 and 1, got {escort}")
    if not (math.isfinite(decades) and decades >= 0.0):
        raise ValueError(f"decades must be zero or a positive number, got {decades}")
    for name, count, least in (("num_chains", num_chains, _LEAST_CHAINS), ("batch_size", batch_size, 1)):
        if count is not None and count < least:
            raise ValueError(f"{name} must be at least {least}, got {count}")
    params, attainable = check_question(cost, params, prior, cutoff)
    check_deterministic(cost, params)
    anchor_cost = float(evaluate(cost, params))
    if not float(attainable) > anchor_cost:
        raise ValueError(
            f"the cost at the anchor, {anchor_cost:.9g} nats, is the cutoff itself, which leaves no room for chains; "
            "raise the cutoff"
        )
    dimension = tree.size(params)
    frame = frame_of(prior, params)
    shear = _shear(cost, params, frame, region, float(attainable) - anchor_cost)
    ensemble = ensemble_of(cost, frame, cutoff=float(attainable), region=region, shear=shear)
    chains = default_num_chains(dimension) if num_chains is None else num_chains
    where = launchers(mesh, chains)
    devices = num_devices(where[0].mesh)
    chains = -(-chains // devices) * devices
    run = _Run(
        ensemble=ensemble,
        key=key,
        chains=chains,
        budget=_GRADIENTS * effort * float(np.clip(4810 / dimension, 1.0, 4.0)) / len(ensemble.guides),
        anchor_cost=anchor_cost,
        prior_term=float(prior.anchor_term(params)),
        proper=bool(prior.proper),
        beta_factor=beta_factor,
        escort=escort,
        decades=decades,
        batch_size=batch_size,
        launchers=where,
        on_progress=on_progress or (lambda *_: None),
    )
    return run.stream()


def _shear(cost: Any, params: PyTree, frame: Frame, region: Star | Connected, room: float) -> Shear | None:
    """Return the shear of the cost where chains can use it: the star's segments and walls of a prior are straight."""
    if isinstance(region, Star) or frame.walls is not None or frame.ball is not None:
        return None
    draw = eqx.filter_jit(lambda key, precision: frame.params(frame.draw_reference(key, precision)))
    places = (draw(jax.random.key(i), jnp.float32(precision)) for i, precision in enumerate(_PLACES))
    shear = find_shear(cost, params, places)
    if shear is None or frame.stiffness == 0.0:
        return shear
    # A prior that holds the offset tighter than the cost holds the mean of the logits would hold all else by it.
    held = float(jnp.max(jnp.square(1.0 / jax.tree.leaves(frame.scale)[shear.leaf])))
    return shear if held < float(shear.curvature(params)) * 0.5 * tree.size(params) / room else None


def default_num_chains(dimension: int) -> int:
    """Return how many chains a pass has unless told otherwise: few long ones where gradients are dear."""
    return int(np.clip(10_000 // dimension, _USUAL_CHAINS, 64))


@dataclasses.dataclass
class _Run:
    """One run: what is fixed, then the legs in order."""

    ensemble: Ensemble
    key: Array
    chains: int
    budget: float
    anchor_cost: float
    prior_term: float
    proper: bool
    beta_factor: float
    escort: float
    decades: float
    batch_size: int | None
    launchers: tuple[Launcher, ...]
    """Of both passes, or of each its own."""
    on_progress: OnProgress
    metric: Metric = dataclasses.field(init=False)

    def stream(self) -> Iterator[VolumeEstimate]:
        pilot = self._fly()
        self.budget *= len(self.ensemble.guides) / len(pilot.ensemble.guides)
        self.ensemble, self.metric = pilot.ensemble, pilot.metric
        ensemble, cutoff = self.ensemble, float(self.ensemble.cutoff)
        survey, kappa, tried = self._ladder(pilot)
        temperatures = temperature_ladder(
            survey, decades=self.decades, most_steps=_MOST_STEPS, budget=_TEMPERATURE * self.budget
        )
        temperature, joint, _ = temperatures
        # The ensemble at the temperatures.
        ridged = with_ridge(ensemble, self.anchor_cost, survey.bulge) if temperatures.rises else ensemble
        with jax.enable_x64(True):
            first = jnp.float64(kappa.precision[0])
            log_reference = float(ensemble.frame.log_reference(first) + ensemble.frame.offset)
        depths = np.logspace(-self.decades, 0.0, 1 + round(8 * self.decades))
        cutoffs = self.anchor_cost + (cutoff - self.anchor_cost) * depths
        rays = SampleRays(ridged, self.anchor_cost, temperatures.betas[joint:]) if temperatures.rises else None
        tally = Tally(kappa, temperatures, log_reference, self.chains, self.anchor_cost, rays)
        plan = Plan(
            cutoff=cutoff,
            cutoffs=cutoffs,
            dimension=ensemble.dimension,
            prior_term=self.prior_term,
            proper=self.proper,
            region=ensemble.region.name,
        )
        kappa_table, temperature_table = pad(kappa), pad(temperature)
        bottom, last = len(kappa.precision) - 1, len(temperature.beta) - 1
        settling = max(round(_SETTLED * float(np.sum(kappa.gradients) / kappa.gradients[bottom])), 1)

        def enter_kappa(which: int) -> Callable[[list[int], Record], None]:
            return lambda rungs, record: tally.add_kappa(which, rungs, record)

        def enter_temperature(which: int, weighs: bool) -> Callable[[list[int], Record], None]:
            return lambda rungs, record: tally.add_temperature(which, rungs, record, weighs=weighs)

        cool = [
            Leg("cooling", ensemble, kappa_table, [*range(bottom + 1), bottom], _COOL, enter_kappa(COOLING)),
            Leg(
                "cooling",
                ridged,
                temperature_table,
                [*range(joint, last), *[last] * (_LAST_VISITS + 1)],
                _RELEASE,
                enter_temperature(COOLING, True),
            ),
        ]
        if joint > 0:
            # What is left of the lag at the coldest must not go back with them.
            there_and_back = [*range(last, 0, -1), *[0] * _COLDEST_VISITS, *range(last + 1), last]
            cool.append(
                Leg("curve", ridged, temperature_table, there_and_back, _CURVE, enter_temperature(COOLING, False))
            )
        over = jax.tree.map(lambda x: np.repeat(x[-1:], 2, axis=0), kappa)
        beyond = max(_OVERSHOOT, float(np.exp(-_BEYOND / np.std(survey.slope[-1]))))
        over = eqx.tree_at(lambda r: r.precision, over, over.precision * np.array([beyond, 1.0]))
        heat = [
            Leg(
                "heating", ensemble, pad(over), [0] * _FIRST_VISITS + [1] * (_FIRST_VISITS + 1), _OVER, lambda *_: None
            ),
            # At the natural β they are further out, and slow to come back: the climb begins without that.
            Leg(
                "heating",
                ridged,
                temperature_table,
                [*range(joint, last), *[last] * (_FIRST_VISITS + 1)],
                _WARM,
                lambda *_: None,
                aside=True,
            ),
            Leg(
                "heating",
                ridged,
                temperature_table,
                [*[last] * _LAST_VISITS, *range(last, joint - 1, -1), joint],
                _SETTLE,
                enter_temperature(HEATING, False),
                aside=True,
            ),
            # They come from beyond, as the cooling pass does from before: its lag must not be theirs too.
            Leg("heating", ensemble, kappa_table, [bottom] * (settling + 1), _DWELL, lambda *_: None),
            Leg("heating", ensemble, kappa_table, [*range(bottom, 0, -1), 1], _HEAT, enter_kappa(HEATING)),
        ]
        if ensemble.frame.stiffness == 0.0:
            heat = heat[1:]
        key, indices = jax.random.fold_in(self.key, _START), jnp.arange(self.chains, dtype=jnp.int32)
        starts = [begin(ensemble, key, first, indices, launcher.mesh) for launcher in self.launchers]
        cooling, heating = (
            Pass(launcher, self.metric, self.key, self.batch_size, origin, legs)
            for launcher, origin, legs in (
                (self.launchers[0], starts[0], cool),
                (self.launchers[-1], laid_out_like(pilot.ends, starts[-1]), heat),
            )
        )
        before, each = pilot.gradients + tried, len(ensemble.guides)
        total = before + cooling.gradients + heating.gradients
        noise, spoke = np.nan, time.perf_counter()
        for passes in rounds(cooling, heating):
            for latest in walk(passes):
                if latest.ended:
                    _require_meant(ensemble, latest.positions)
                    if latest is cooling:
                        noise = self._noise(cooling.positions, float(temperature.beta[-1]))
                spent = before + cooling.spent + heating.spent
                self.on_progress(stages(passes), spent / total)
                if latest.leg_ended or time.perf_counter() - spoke > _SECONDS:
                    spoke, final = time.perf_counter(), cooling.ended and heating.ended
                    costs = tally.held(cooling.positions.cost, cooling.positions.ridge)
                    yield summarise(tally, plan, costs, each * spent, spent / total, final=final, noise=noise)

    def _ladder(self, pilot: Pilot) -> tuple[Survey, Rung, int]:
        """Return the survey, the κ ladder, and the gradients of each chain that it took to find it after the pilot."""
        guides, survey = len(self.ensemble.guides), pilot.survey
        make = functools.partial(
            kappa_ladder, most_steps=_MOST_STEPS, escort=self.escort,
            overhead=self.ensemble.checks / (_FORWARDS * guides),
        )  # fmt: skip
        budget, trial = _KAPPA * self.budget, None
        # Where the region is most of the prior there may be no way to go; stars gain nothing by it.
        if self.ensemble.dimension >= CHEAP and not self.ensemble.checks and len(survey.x) > 1:
            trial = make(survey, budget=_TRIAL * budget, whole=True)
        if trial is None or float(np.sum(trial.gradients)) > _MOST_TRIAL * budget:
            return survey, make(survey, budget=budget), 0
        seen = try_ladder(
            self.ensemble, self.metric, jax.random.fold_in(self.key, _TRIAL_KEY), trial, pilot.ends, self.batch_size,
            self.launchers, lambda share: self.on_progress("trying the ladder", share),
        )  # fmt: skip
        survey = survey.restepped(seen.friction.x, seen.acceptance)
        return survey, make(survey, budget=budget - 0.5 * seen.gradients, friction=seen.friction), seen.gradients

    def _fly(self) -> Pilot:
        return fly(
            self.ensemble,
            jax.random.fold_in(self.key, _PILOT_KEY),
            chains=self.chains,
            budget=_PILOT * self.budget * min(self.chains / _USUAL_CHAINS, 1.0),
            anchor_cost=self.anchor_cost,
            beta_factor=self.beta_factor,
            batch_size=self.batch_size,
            launchers=self.launchers,
            on_progress=lambda share: self.on_progress("pilot", share),
        )

    def _noise(self, positions: Position, beta: float) -> float:
        """Return by about how many nats the rounding of matrix products moves a result; NaN where they are exact."""
        if jax.default_backend() == "cpu":
            return np.nan
        return beta * float(_rounding(self.ensemble, positions))


@eqx.filter_jit
def _rounding(ensemble: Ensemble, positions: Position) -> Float[Array, ""]:
    """Return the root mean square over chains of what full precision changes in the cost, float64 nats."""
    with jax.default_matmul_precision("highest"):
        exact = jax.lax.map(ensemble.value, positions.displacement)
    with jax.enable_x64(True):
        return jnp.sqrt(jnp.mean(jnp.square(exact - positions.cost)))


def _require_meant(ensemble: Ensemble, positions: Position) -> None:
    """Raise a RuntimeError if the cost of a chain's parameters is not what its sheared coordinates said."""
    if ensemble.shear is None:
        return
    off = float(jnp.max(_off(ensemble, positions)))
    if off > _MEANT * float(ensemble.cutoff):
        raise RuntimeError(
            f"the network's outputs are not what they were plus an offset where chains came: costs are up to "
            f"{off:.3g} nats off; pass `lambda params: cost(params)` in place of the behaviour"
        )


@eqx.filter_jit
def _off(ensemble: Ensemble, positions: Position) -> Float[Array, "chains"]:
    def one(args: tuple[PyTree, Array]) -> Array:
        displacement, cost = args
        assert ensemble.shear is not None
        meant = ensemble.shear.restored(ensemble.frame.params(displacement))
        return jnp.abs(ensemble.cost(meant) - cost.astype(jnp.float32))

    return jax.lax.map(one, (positions.displacement, positions.cost))
