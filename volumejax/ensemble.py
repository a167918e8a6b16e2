r"""The tethered, tempered ensemble around the anchor, in whitened coordinates.

.. math:: p(\delta) \propto \exp(-U),\quad U = \beta E(\delta) + \tfrac12 a|\delta|^2 + b\cdot\delta
          \quad\text{inside the region and the prior's support}

The guide E is the cost C(θ0 + s·δ) itself. For the star it is the mean of C at δ and at 0.7·δ, or where else a pilot
finds that chains need it: the segment to the anchor bulges out of a curved valley, and chains that feel only their own
cost end their trajectories behind its wall. Once the tether is gone the ridge, a smooth maximum of the cost along the
segment, takes the guide's place step by step: the region's wall is there, and not where the mean is high.
a is the prior's stiffness plus the tether κ. Where the cost has a shear, δ are its coordinates, in which the prior is
off its own form by a toll that comes to U.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from volumejax import tree
from volumejax.frames import Frame
from volumejax.metric import Metric
from volumejax.regions import Connected, Star
from volumejax.ridge import RIDGE_PRICE, Climb, Places, Ridge, held, places_of, ridge_of
from volumejax.shear import Shear
from volumejax.tree import wide

__all__ = [
    "CHEAP",
    "FIELDS",
    "PACES",
    "SHORT",
    "Ensemble",
    "Position",
    "Rung",
    "ensemble_of",
    "toll_share",
    "trajectories",
    "with_bulges",
    "with_ridge",
]

TRAJECTORIES, SHORT, PACES = 3, 12, (1.0, 0.3, 0.1)
"""Trajectories of one move at most, by how much fewer steps all but the first have, and the share of the step size that
each takes: where a chain is held in a place much narrower than most, only the small ones move it."""
CHEAP = 1000
"""Below so many dimensions regions may have arms, where no one step and no one map fits: steps are spread, and maps
stretch all leaves alike and slide none."""
FIELDS, STRETCHES = 4, 2
"""Ways to move each leaf from one rung to the next: stretch it, stretch it by its softness, slide it along b as far as
the cost lets each coordinate, and slide it as if there were none. And how many of them stretch it; these come first."""
_MOST_BULGES, _BULGES = 2, (0.7,)
"""How many places beside its end a guide has on a segment at most; where segments that leave the region do so first,
unless a pilot finds other places: on the digits network between 0.6 and 0.85 where the prior is as wide as the
parameters, at 0.2 where it is six times as wide and 0.7 is held."""


class Position(eqx.Module):
    """Where a chain stands."""

    displacement: PyTree
    """δ, float32."""
    cost: Float[Array, ""]
    """The guide E, float64 nats; C itself but for the star."""
    reach: Float[Array, ""]
    """The largest cost on the checked segment from the anchor (star), or C itself; float64 nats."""
    virials: Float[Array, "fields leaves"]
    """v·∇(E + toll/β) of each leaf for each of the `fields` v, as a trajectory last measured it; float64, NaN before
    any."""
    toll: Float[Array, ""] | None = None
    """What the prior is off in sheared coordinates, float64 nats; U has the `toll_share` of it."""
    ridge: Float[Array, ""] | None = None
    """The star's ridge, float64 nats; NaN where a map has moved the chain and nobody has looked since."""


class Rung(eqx.Module):
    """The parameters of one ensemble of the ladder, and how chains move there; all float64 or int32 scalars."""

    precision: Float[Array | np.ndarray, "*levels"]
    """a = stiffness + κ."""
    beta: Float[Array | np.ndarray, "*levels"]
    masses: Float[Array | np.ndarray, "*levels leaves"]
    """Mass of each leaf's coordinates: about one over their variance."""
    step_size: Float[Array | np.ndarray, "*levels"]
    spread: Float[Array | np.ndarray, "*levels"]
    """Steps are drawn log-uniformly down to exp(−spread) of that, for ensembles whose scale differs from place to
    place."""
    num_steps: Any
    num_moves: Any
    stretch: Float[Array | np.ndarray, "*levels stretches"]
    """log of the factor by which each leaf is scaled on the way to the next rung, then what comes to it times softness,
    then half the changes of log a for which it slides in either way; FIELDS · leaves numbers."""
    ridge: Float[Array | np.ndarray, "*levels"] | None = None
    """Share of the star's ridge in what holds the chains, the guide having the rest; no map may lead to or from one."""

    @property
    def gradients(self) -> Any:
        """Gradients of the guide that one visit is worth, NumPy: a trajectory's steps, and one more at its start."""
        steps = np.asarray(self.num_steps)
        count = trajectories(steps, np.asarray(self.spread))
        price = 1 if self.ridge is None else np.where(np.asarray(self.ridge) > 0.0, RIDGE_PRICE, 1)
        return price * np.asarray(self.num_moves) * (steps + (count - 1) * np.maximum(steps // SHORT, 1) + count)


def trajectories(num_steps: Any, spread: Any) -> Any:
    """Return the trajectories of one move: a long one, and short ones where that is dear or no one step fits all."""
    return TRAJECTORIES - (TRAJECTORIES - 1) * ((spread == 0.0) & (num_steps < 2 * SHORT))


def toll_share(precision: Any, beta: Any) -> Array:
    """Return how much of the toll an ensemble has: all, but none at the reference, whose β is 0.

    Beyond the end of the tether it goes with the rest of the prior.
    """
    return jnp.where(beta > 0.0, jnp.minimum(precision, 1.0), 0.0)


class Slope(NamedTuple):
    """What a gradient sees at a place; float64 nats."""

    cost: Float[Array, ""]
    """E."""
    top: Float[Array, ""]
    """The largest cost, where the ridge has a share; E elsewhere."""
    toll: Float[Array, ""] | None
    ridge: Float[Array, ""] | None
    """NaN where it has no share."""


class Ensemble(eqx.Module):
    """A cost, the frame of its prior, a region and a cutoff."""

    cost: Callable[[PyTree], Float[Array, ""]]
    frame: Frame
    cutoff: Float[Array, ""]
    region: Star | Connected = eqx.field(static=True)
    callers_x64: bool = eqx.field(static=True)
    shear: Shear | None = None
    """For the connected region under a Gaussian prior or none."""
    bulges: Places = eqx.field(default_factory=lambda: places_of(_BULGES, _MOST_BULGES))
    """Where the star's guide looks at segments, beside their end."""
    ridge: Ridge | None = None
    """Of the star, which rungs may put in the guide's place."""

    @property
    def dimension(self) -> int:
        """D."""
        return tree.size(self.frame.anchor)

    def value(self, displacement: PyTree) -> Float[Array, ""]:
        """Return the guide E as float64: C(θ0 + s·δ), or for the star its mean with C at `bulges`."""
        return self._guide(displacement)[0]

    def position(self, displacement: PyTree) -> Position:
        """Return a chain that stands there and has not moved yet."""
        with jax.enable_x64(True):
            cost, _, toll = self._guide(displacement)
            reach, ridge = self.look(displacement, cost)
            return Position(displacement, cost, reach, self.no_virials, toll, ridge)

    def slope(self, displacement: PyTree, share_of_toll: Float[Array, ""], share: Any = None) -> tuple[Slope, PyTree]:
        """Return what is seen at a place, and the gradient in δ of what holds the chains, over β, as float32.

        That is (1 − `share`) · E + `share` · ridge + `share_of_toll` · toll.

        Args:
            displacement: δ.
            share_of_toll: float32.
            share: float64 and not mapped over; None for a ridge without a share.
        """
        if self.shear is None:
            with jax.enable_x64(True):
                return self._along(displacement, jnp.float64(0.0) if share is None else share)
        shear = self.shear

        def felt(d: PyTree) -> tuple[Array, tuple[Array, Array]]:
            cost, slip = shear(self.frame.params(d))
            return cost + share_of_toll * self._toll(d, slip), (cost, slip)

        with jax.enable_x64(self.callers_x64):
            (_, (cost, slip)), slope = jax.value_and_grad(felt, has_aux=True)(displacement)
        with jax.enable_x64(True):
            return Slope(wide(cost), wide(cost), self._toll(displacement, wide(slip)), None), slope

    def _toll(self, displacement: PyTree, slip: Array) -> Array:
        """Return ½ stiffness |δ|² + b·δ at the parameters that a place stands for, less that of the place itself."""
        assert self.shear is not None
        leaf, frame = self.shear.leaf, self.frame
        lag = slip / jax.tree.leaves(frame.scale)[leaf]
        toll = frame.stiffness * jnp.sum(lag * (jax.tree.leaves(displacement)[leaf] + 0.5 * lag))
        return toll if frame.pull is None else toll + jnp.sum(jax.tree.leaves(frame.pull)[leaf] * lag)

    def _along(self, displacement: PyTree, share: Array) -> tuple[Slope, PyTree]:
        """Return what is seen at the guide's places on the segment and, where it has a share, at the ridge's."""
        if not self.checks:
            cost, slope = self._slope_at(displacement, jnp.float32(1.0))
            return Slope(wide(cost), wide(cost), None, None), slope
        assert self.ridge is not None
        ridge, guides = self.ridge, 1 + jnp.asarray(self.bulges.count)
        eyes = jnp.where(share > 0.0, jnp.asarray(ridge.eyes.count), 0)

        def look(i: Array, sums: tuple[Array, PyTree, Climb]) -> tuple[Array, PyTree, Climb]:
            total, slopes, climb = sums
            is_eye = i >= guides
            bulge = jnp.asarray(self.bulges.values)[jnp.clip(i - 1, 0, _MOST_BULGES - 1)]
            eye = jnp.asarray(self._fractions)[jnp.asarray(ridge.eyes.values)[jnp.maximum(i - guides, 0)]]
            cost, slope = self._slope_at(displacement, jnp.where(is_eye, eye, jnp.where(i > 0, bulge, 1.0)))
            counts = (~is_eye).astype(jnp.float32)
            return (
                total + jnp.where(is_eye, 0.0, wide(cost)),
                jax.tree.map(lambda x, g: x + counts * g, slopes, slope),
                climb.seeing(ridge, cost, slope, is_eye),
            )

        flat = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), displacement)
        begun = (jnp.zeros(()), flat, Climb.begun(flat))
        total, slopes, climb = jax.lax.fori_loop(jnp.int32(0), guides + eyes, look, begun)
        height, steep = climb.ended(ridge)
        s, part = (x.astype(jnp.float32) for x in (share, (1.0 - share) / guides))
        slope = jax.tree.map(lambda g, r: part * g + jnp.where(s > 0.0, s * r, 0.0), slopes, steep)
        cost = total / guides
        seen = Slope(cost, jnp.where(share > 0.0, climb.top, cost), None, jnp.where(share > 0.0, height, jnp.nan))
        return seen, slope

    def _slope_at(self, displacement: PyTree, t: Array) -> tuple[Float[Array, ""], PyTree]:
        """Return C at t · δ and its gradient in δ as float32."""
        with jax.enable_x64(self.callers_x64):
            point = self.frame.params(jax.tree.map(lambda d: t * d, displacement))
            cost, slope = jax.value_and_grad(self.cost)(point)
            return cost, jax.tree.map(lambda g, s: t * (g.astype(jnp.float32) * s), slope, self.frame.scale)

    @property
    def guides(self) -> tuple[float, ...]:
        """Fractions of the segment from the anchor at which the cost holds the chains back; for the host."""
        return (1.0, *self.bulges.listed) if isinstance(self.region, Star) else (1.0,)

    @property
    def eyes(self) -> tuple[float, ...]:
        """Fractions of the segment at which the ridge looks, some of those that are checked; for the host."""
        return () if self.ridge is None else tuple(self._fractions[list(self.ridge.eyes.listed)].tolist())

    @property
    def _fractions(self) -> np.ndarray:
        return np.arange(1, self.checks + 1, dtype=np.float32) / np.float32(self.checks)

    def _guide(self, displacement: PyTree) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""] | None]:
        """Return E, C and the toll."""
        if self.shear is not None:
            with jax.enable_x64(self.callers_x64):
                cost, slip = self.shear(self.frame.params(displacement))
            with jax.enable_x64(True):
                return wide(cost), wide(cost), self._toll(displacement, wide(slip))
        with jax.enable_x64(True):
            own = self.cost_at(displacement, jnp.float32(1.0))
            if not self.checks:
                return own, own, None
            bulges, count = (jnp.asarray(x) for x in (self.bulges.values, self.bulges.count))
            total = jax.lax.fori_loop(jnp.int32(0), count, lambda i, c: c + self.cost_at(displacement, bulges[i]), own)
            return total / (1 + count), own, None

    def cost_at(self, displacement: PyTree, t: Any) -> Float[Array, ""]:
        """Return C at t · δ, float64."""
        with jax.enable_x64(self.callers_x64):
            cost = self.cost(self.frame.params(jax.tree.map(lambda d: t * d, displacement)))
        with jax.enable_x64(True):
            return wide(cost)

    def permits(self, cost: Float[Array, ""], displacement: PyTree) -> Bool[Array, ""]:
        """Return whether a point of this cost may belong to the region; NaN and infinity may not."""
        with jax.enable_x64(True):
            return jnp.isfinite(cost) & (cost <= self.cutoff) & self.frame.supports(displacement)

    @property
    def rescales(self) -> bool:
        """Whether leaves may change their scales against each other: regions of few dimensions may have arms.

        Not where nothing but the region holds the chains: whether it ends is seen from how far they go.
        """
        return not self.frame.improper and self.dimension < CHEAP and len(jax.tree.leaves(self.frame.anchor)) > 1

    @property
    def checks(self) -> int:
        """Evaluations beside the trajectory itself that its end costs."""
        return self.region.num_checks if isinstance(self.region, Star) else 0

    def look(self, displacement: PyTree, cost: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""] | None]:
        """Return the largest cost at the checked points between the anchor and δ, δ included, and the ridge.

        +inf for NaN.

        Args:
            displacement: δ.
            cost: E there.
        """
        with jax.enable_x64(True):
            top, ridge = cost, None
            if self.checks:
                costs = self.segment(displacement)
                top = jnp.max(costs)
                if self.ridge is not None:
                    ridge = self.ridge(costs)
            return jnp.where(jnp.isnan(top), jnp.inf, top), ridge

    def reach(self, displacement: PyTree, cost: Float[Array, ""]) -> Float[Array, ""]:
        """Return the first of `look`."""
        return self.look(displacement, cost)[0]

    def segment(self, displacement: PyTree) -> Float[Array, "checks"]:
        """Return C at equal steps from the anchor to δ, the last at δ, float64."""
        return jax.lax.map(lambda t: self.cost_at(displacement, t), jnp.asarray(self._fractions))

    def looked(self, position: Position) -> Position:
        """Return the position with the ridge as it is there."""
        return dataclasses.replace(position, ridge=self.look(position.displacement, position.cost)[1])

    def potential(self, position: Position, precision: Array, beta: Array) -> Float[Array, ""]:
        """Return U, float64."""
        with jax.enable_x64(True):
            d = position.displacement
            energy = beta * position.cost + 0.5 * precision * tree.dot(d, d) + self.frame.pulled(d)
            return energy if position.toll is None else energy + toll_share(precision, beta) * position.toll

    @property
    def no_virials(self) -> Float[Array, "fields leaves"]:
        """What stands for virials that have not been measured."""
        with jax.enable_x64(True):
            return jnp.full((FIELDS, len(jax.tree.leaves(self.frame.anchor))), jnp.nan, jnp.float64)

    def softness(self, precisions: PyTree) -> PyTree:
        """Return how far each coordinate gives way when the tether slackens, against the mean of its leaf.

        The star's maps keep a chain on its ray, whose segment has been looked at: there all are 1.
        """
        if self.checks:
            return jax.tree.map(jnp.ones_like, precisions)
        return jax.tree.map(lambda p: (1.0 / p) / jnp.mean(1.0 / p), precisions)

    @property
    def slides(self) -> bool:
        """Whether the prior pulls, and chains may follow: those of the star stay on their rays."""
        return self.frame.pull is not None and not self.checks and self.dimension >= CHEAP

    def slide(self, metric: Metric, precision: Array, beta: Array) -> list[PyTree]:
        """Return b/a times the square of each coordinate's share of a in its mean precision p, and b/a, in turned ones.

        The mean −b/p of a coordinate moves back by the first per unit of log a. The second keeps the parameters of a
        leaf in proportion, as a stretch of the next one asks for. Zero where nothing slides.
        """
        if not self.slides:
            still = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), jnp.float32), self.frame.anchor)
            return [still, still]
        shares = metric.tether_shares(precision, beta, self.frame.anchor)
        free = jax.tree.map(lambda b: b / precision, metric.turned(self.frame.pull))
        return [jax.tree.map(lambda b, w: b * w * w, free, shares), free]

    def fields(self, metric: Metric, precisions: PyTree, state: tuple[Array, Array], place: PyTree) -> list[PyTree]:
        """Return the ways in which maps may move a chain, each twice what free coordinates need per unit of log a.

        Args:
            metric: of the moves.
            precisions: the metric's at (a, β).
            state: (a, β), float32.
            place: δ in turned coordinates.
        """
        softened = jax.tree.map(jnp.multiply, self.softness(precisions), place)
        return [place, softened, *(jax.tree.map(jnp.negative, way) for way in self.slide(metric, *state))]

    def carry(
        self, position: Position, metric: Metric, gains: PyTree, shift: PyTree | None,
        here: tuple[Array, Array], there: tuple[Array, Array], shares: tuple[Any, Any] = (None, None),
        furthest: Any = None,
    ) -> tuple[Position, Float[Array, ""]]:  # fmt: skip
        """Map δ on the way from one ensemble to another.

        Args:
            position: where the chain stands.
            metric: in whose turned coordinates the map is diagonal.
            gains: what is added to each of them, as a share of itself, float32; for the star the same for all.
            shift: and what is added whatever it is, float32; None for the star.
            here: (a, β) left behind.
            there: (a, β) ahead.
            shares: of the ridge here and there.
            furthest: gain by which it is judged whether the star's segment has to be looked at; None for the largest.

        Returns:
            The image and the work U'(image) − U(δ) − log |∂image/∂δ| in nats, +inf where the image is outside.
        """
        with jax.enable_x64(True):
            d = position.displacement
            change = jax.tree.map(jnp.multiply, gains, metric.turned(d))
            change = metric.restored(change if shift is None else jax.tree.map(jnp.add, change, shift))
            moved = jax.tree.map(jnp.add, d, change)
            cost, own, toll = self._guide(moved)
            # The star's image lies on the same ray: unless it is far out, its segment has been looked at but for the
            # end.
            reach = jnp.where(jnp.isnan(own), jnp.inf, own)
            if self.checks:
                seen = jnp.maximum(position.reach, reach)
                furthest = jnp.max(jax.tree.leaves(gains)[0]) if furthest is None else furthest
                is_far = furthest > 1.0 / self.checks
                reach = jax.lax.cond(is_far, lambda: self.reach(moved, cost), lambda: seen)
            ridge = position.ridge
            if ridge is not None:
                ridge = jnp.where(jnp.max(jnp.abs(jax.tree.leaves(gains)[0])) > 0.0, jnp.nan, ridge)
            image = Position(moved, cost, reach, position.virials, toll, ridge)
            rounded = jax.tree.map(lambda x, y: wide(x) - wide(y), moved, d)
            middle = jax.tree.map(lambda x, y: 0.5 * (wide(x) + wide(y)), moved, d)
            growth = jax.tree.reduce(jnp.add, jax.tree.map(lambda g: jnp.sum(jnp.log1p(wide(g))), gains))
            work = (
                self.rest(position, here, there, shares)
                + there[1] * (held(cost, ridge, shares[1]) - held(position.cost, position.ridge, shares[1]))
                + there[0] * tree.dot(rounded, middle)
                + self.frame.pulled(rounded)
                - growth
            )
            if toll is not None and position.toll is not None:
                work = work + toll_share(*there) * (toll - position.toll)
            inside = self.permits(image.reach, moved)
            return image, jnp.where(inside, work, jnp.inf)

    def rest(
        self, position: Position, here: tuple[Array, Array], there: tuple[Array, Array], shares: tuple[Any, Any]
    ) -> Float[Array, ""]:
        """Return the work U'(δ) − U(δ) of a chain that stays where it is, nats; arguments as for `carry`."""
        with jax.enable_x64(True):
            d = position.displacement
            before, after = (
                beta * held(position.cost, position.ridge, share)
                for (_, beta), share in zip((here, there), shares, strict=True)
            )
            work = after - before + 0.5 * (there[0] - here[0]) * tree.dot(d, d)
            if position.toll is not None:
                work = work + (toll_share(*there) - toll_share(*here)) * position.toll
            return work


def with_bulges(ensemble: Ensemble, bulges: Sequence[float]) -> Ensemble:
    """Return the star's ensemble with a guide that looks there; its ridge has no height yet, see `with_ridge`."""
    ensemble = dataclasses.replace(ensemble, bulges=places_of(bulges, _MOST_BULGES))
    return with_ridge(ensemble, 0.0, 1.0, asks_rays=False)


def with_ridge(ensemble: Ensemble, anchor_cost: float, bulge: float, *, asks_rays: bool = True) -> Ensemble:
    """Return the star's ensemble with a ridge as high as its guide, whose samples' rays are looked along.

    Args:
        ensemble: of a star.
        anchor_cost: C(θ0), nats.
        bulge: by how much higher than the guide the largest cost on a segment is.
        asks_rays: False for rays that are not.
    """
    room = float(ensemble.cutoff) - anchor_cost
    ridge = ridge_of(room, bulge, ensemble.checks, len(ensemble.guides), asks_rays=asks_rays)
    return dataclasses.replace(ensemble, ridge=ridge)


def ensemble_of(
    cost: Callable[[PyTree], Float[Array, ""]],
    frame: Frame,
    *,
    cutoff: float = math.inf,
    region: Star | Connected = Connected(),  # noqa: B008 - frozen and stateless
    shear: Shear | None = None,
) -> Ensemble:
    """Return the ensemble of a question; the cost will run in the precision that its caller has set by now."""
    callers_x64 = bool(jax.config.read("jax_enable_x64"))
    with jax.enable_x64(True):
        ensemble = Ensemble(cost, frame, jnp.asarray(cutoff, jnp.float64), region, callers_x64, shear)
    return with_bulges(ensemble, _BULGES) if isinstance(region, Star) else ensemble
