r"""The local learning coefficient from chains around the anchor.

.. math:: \hat\lambda(\beta) = \beta \left( \mathbb{E}[C] - C(\theta_0) \right), \quad
          \theta \sim \pi(\theta) \exp\left( -\beta C(\theta) - \tfrac{\gamma}{2} |\theta - \theta_0|^2 \right)

β is the literature's nβ, γ its localisation, and π the prior, which the literature takes flat: `Lebesgue()`. The
anchor's loss is that of all data. Metropolis-adjusted chains sample this density whatever their step; Langevin chains
are there to compare with the literature.

Source: Lau, Furman, Wang, Murfet & Wei, "The Local Learning Coefficient", arXiv 2308.12108, eq. 3.9.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree
from numpy.typing import NDArray

from volumejax import tree
from volumejax.chains import LearningCoefficient
from volumejax.diagnostics import chain_mean
from volumejax.frames import frame_of
from volumejax.hessian import hessian_product
from volumejax.lanczos import lanczos
from volumejax.langevin import Pull, wander
from volumejax.parallel import require_threefry
from volumejax.priors import Gaussian, Lebesgue
from volumejax.release import release, sample
from volumejax.spectrum import gauss
from volumejax.tree import wide
from volumejax.validation import check_deterministic, check_question, named

__all__ = ["SGLD", "Hamiltonian", "learning_coefficient"]

Cost = Callable[[PyTree], Float[Array, ""]]

_PILOT_KEY, _MAIN_KEY, _PROBE_KEY = range(3)
_BIAS = 0.05
"""Share by which an automatic Langevin step widens the stiffest direction."""
_PROBE_STEPS = 20
_LARGEST = float(np.finfo(np.float32).max)
"""A cutoff that every anchor meets."""


def _require_counts(sampler: eqx.Module, **least: int) -> None:
    for name, value in least.items():
        if getattr(sampler, name) < value:
            raise ValueError(f"{type(sampler).__name__} {name} must be at least {value}, got {getattr(sampler, name)}")


class Hamiltonian(eqx.Module):
    """Metropolis-adjusted Hamiltonian chains: no bias from the step, which a discarded pilot sets with the metric.

    Args:
        num_chains: independent chains.
        num_draws: of each, after the pilot.
        num_steps: mean leapfrog steps, one gradient each, between two draws.
    """

    num_chains: int = eqx.field(static=True, default=32)
    num_draws: int = eqx.field(static=True, default=400)
    num_steps: int = eqx.field(static=True, default=16)

    def __check_init__(self) -> None:
        _require_counts(self, num_chains=2, num_draws=8, num_steps=1)


class SGLD(eqx.Module):
    """Unadjusted Langevin chains in minibatches, with the biases of step and batch that `volumejax.langevin` states.

    Args:
        step: e, in squared units of the parameters; None takes 0.2 over the largest stiffness at the anchor, which
            makes its direction 5 % too wide.
        batch_size: examples a step, drawn with replacement by the cost's `on(indices)`; None takes all.
        num_chains: independent chains, all from the anchor.
        num_draws: of each, at which the cost on all data is taken, after as many half that are discarded.
        steps_per_draw: steps between them.
    """

    step: float | None = eqx.field(static=True, default=None)
    batch_size: int | None = eqx.field(static=True, default=None)
    num_chains: int = eqx.field(static=True, default=16)
    num_draws: int = eqx.field(static=True, default=400)
    steps_per_draw: int = eqx.field(static=True, default=20)

    def __check_init__(self) -> None:
        _require_counts(self, num_chains=2, num_draws=8, steps_per_draw=1)
        if self.step is not None and not (math.isfinite(self.step) and self.step > 0.0):
            raise ValueError(f"SGLD step must be a positive number, got {self.step}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"SGLD batch_size must be at least 1, got {self.batch_size}")


def learning_coefficient(
    key: Key[Array, ""],
    cost: Cost,
    params: PyTree,
    prior: Any,
    *,
    beta: float,
    gamma: float = 0.0,
    sampler: Hamiltonian | SGLD = Hamiltonian(),  # noqa: B008 - frozen and stateless
) -> LearningCoefficient:
    """Estimate λ̂(β) = β(E[C] − C(θ0)) around `params`, with the heat capacity β² Var C.

    For the host; jitted in pieces. λ̂(β) is λ of a singular minimum up to corrections that fall with β: −(m−1)/log β for
    multiplicity m, and those of the prior's and the localisation's scale.

    Args:
        key: typed threefry key.
        cost: params -> scalar nats, differentiable and deterministic; for `SGLD` in minibatches a behaviour, or any
            cost with `on(indices)` and `num_examples`.
        params: the anchor θ0, a minimum of the cost; a pytree of floating arrays.
        prior: π. `Lebesgue()` for the literature's flat one, which needs γ > 0 unless every direction is confined or
            without effect; `Gaussian`, or for Hamiltonian chains `UniformBox` or `UniformBall`.
        beta: β > 0, in inverse nats.
        gamma: γ ≥ 0, in inverse squared units of the parameters. It biases λ̂ downward where it is not small against
            the stiffness β∇²C.
        sampler: `Hamiltonian(…)` or `SGLD(…)`.

    Returns:
        A `LearningCoefficient`; NumPy leaves. `std_error` is the larger of the autocorrelation's and the scatter of the
        chains' means: chains that have not met say so by `r_hat` and `status`.

    Raises:
        ValueError: arguments that do not fit each other, or a cost that is not deterministic.

    Example:
        >>> import jax, jax.numpy as jnp, volumejax as vj
        >>> cost = lambda w: 0.5 * jnp.sum(jnp.array([10.0, 1.0, 0.0]) * w**2)
        >>> found = vj.learning_coefficient(
        ...     jax.random.key(0), cost, jnp.zeros(3), vj.Gaussian(1.0), beta=1e4,
        ...     sampler=vj.Hamiltonian(num_chains=8, num_draws=200),
        ... )
        >>> bool(abs(found.value - 1.0) < 4 * found.std_error), bool(found.std_error < 0.1)
        (True, True)

    Reference: docs/learning_coefficient.md.
    """
    key = require_threefry(key)
    for name, value, least in (("beta", beta, "positive"), ("gamma", gamma, "zero or a positive number")):
        if not (math.isfinite(value) and value >= 0.0) or (name == "beta" and value == 0.0):
            raise ValueError(f"{name} must be {least}, got {value}")
    params, _ = check_question(cost, params, prior, _LARGEST)
    check_deterministic(cost, params)
    anchor_cost = float(_value(cost, params))
    if not isinstance(sampler, Hamiltonian | SGLD):
        raise ValueError(f"sampler must be vj.Hamiltonian() or vj.SGLD(), got {named(sampler)}")
    if isinstance(sampler, SGLD):
        costs, acceptance, step, gradients = _langevin(key, cost, params, prior, beta, gamma, sampler)
    else:
        costs, acceptance, step, gradients = _hamiltonian(key, cost, params, prior, beta, gamma, sampler)
    excess = np.asarray(costs, np.float64) - anchor_cost
    energy = chain_mean(beta * excess)
    heat = chain_mean(np.square(beta * (excess - excess.mean())))
    return LearningCoefficient(
        value=np.asarray(energy.mean),
        std_error=np.asarray(energy.std_error),
        beta=np.asarray(float(beta)),
        heat_capacity=np.asarray(heat.mean),
        heat_capacity_error=np.asarray(heat.std_error),
        r_hat=np.asarray(energy.r_hat),
        ess=np.asarray(energy.ess),
        acceptance=np.asarray(acceptance),
        step_size=np.asarray(step),
        gradients=np.asarray(gradients),
        costs=excess,
    )


def _hamiltonian(
    key: Array, cost: Cost, params: PyTree, prior: Any, beta: float, gamma: float, sampler: Hamiltonian
) -> tuple[NDArray, float, float, int]:
    """Return costs [chains, draws], acceptance, step size and gradients per chain."""
    localised, extra = _localised(prior, params, gamma)
    with jax.enable_x64(True):
        frame = frame_of(localised, params)
        unit = float(jnp.max(wide(jax.tree.leaves(frame.scale)[0])))
    precision = frame.stiffness + extra * unit**2
    pilot = release(
        jax.random.fold_in(key, _PILOT_KEY),
        cost,
        frame,
        beta=beta,
        precision=precision,
        num_chains=sampler.num_chains,
        num_steps=sampler.num_steps,
    )
    costs, acceptance = sample(pilot, jax.random.fold_in(key, _MAIN_KEY), sampler.num_draws, sampler.num_steps)
    spent = pilot.gradients + sampler.num_draws * (sampler.num_steps + 1)
    return costs, acceptance, pilot.step_size, spent


def _langevin(
    key: Array, cost: Cost, params: PyTree, prior: Any, beta: float, gamma: float, sampler: SGLD
) -> tuple[NDArray, float, float, int]:
    """Return what `_hamiltonian` does."""
    if not isinstance(prior, Gaussian | Lebesgue):
        raise ValueError(
            f"SGLD knows no walls, and {type(prior).__name__} has some; use sampler=vj.Hamiltonian(), or vj.Lebesgue()"
        )
    num_examples = 0
    if sampler.batch_size is not None:
        if not (hasattr(cost, "on") and hasattr(cost, "num_examples")):
            raise ValueError(
                "minibatches need a cost with on(indices) and num_examples, such as vj.loss; use batch_size=None"
            )
        num_examples = int(cost.num_examples)  # pyright: ignore[reportFunctionMemberAccess]
    pull = _pull(prior, params, gamma)
    step = sampler.step
    if step is None:
        top = _stiffest(jax.random.fold_in(key, _PROBE_KEY), cost, params, beta, pull)
        step = 4.0 * _BIAS / top
    start = jax.tree.map(lambda x: jnp.broadcast_to(x, (sampler.num_chains, *x.shape)), params)
    discarded = sampler.num_draws // 2
    settings = (jnp.float32(beta), jnp.float32(step))
    many = (sampler.steps_per_draw, sampler.batch_size, num_examples)
    main = jax.random.fold_in(key, _MAIN_KEY)
    where, _ = wander(cost, pull, main, start, settings, jnp.int32(0), discarded, *many)
    _, costs = wander(cost, pull, main, where, settings, jnp.int32(discarded), sampler.num_draws, *many)
    spent = (discarded + sampler.num_draws) * sampler.steps_per_draw
    return np.asarray(costs), math.nan, float(step), spent


def _localised(prior: Any, params: PyTree, gamma: float) -> tuple[Any, float]:
    """Return the prior that holds the localisation too, and what is left of γ where it cannot."""
    if gamma == 0.0:
        return prior, 0.0
    if isinstance(prior, Lebesgue):
        return Gaussian(gamma**-0.5, mean=params), 0.0
    if not isinstance(prior, Gaussian):
        return prior, gamma
    pull = _pull(prior, params, gamma)
    with jax.enable_x64(True):
        return Gaussian(
            jax.tree.map(lambda a: (1.0 / jnp.sqrt(wide(a))).astype(jnp.float32), pull.precision), pull.centre
        ), 0.0


def _pull(prior: Any, params: PyTree, gamma: float) -> Pull:
    """Return the Gaussian that prior and localisation make together."""
    precision = prior.precision(params)
    displacement = prior.displacement(params) if isinstance(prior, Gaussian) else jax.tree.map(jnp.zeros_like, params)
    with jax.enable_x64(True):
        total = jax.tree.map(lambda a: wide(a) + gamma, precision)
        # θ0 + (m − θ0) Λ/(Λ + γ): exactly θ0 under a flat prior, whatever γ is.
        centre = jax.tree.map(
            lambda x, d, a, t: (wide(x) - wide(d) * wide(a) / jnp.where(t > 0.0, t, 1.0)).astype(x.dtype),
            params,
            displacement,
            precision,
            total,
        )
        return Pull(jax.tree.map(lambda t: t.astype(jnp.float32), total), centre)


def _stiffest(key: Array, cost: Cost, params: PyTree, beta: float, pull: Pull) -> float:
    """Return the largest stiffness at the anchor, of βC with the prior and the localisation."""
    product = _Stiffness(hessian_product(cost, params), pull.precision, jnp.float32(beta))
    top = float(gauss(lanczos(product, tree.normal_like(key, params), _PROBE_STEPS)).nodes[-1])
    if not (math.isfinite(top) and top > 0.0):
        raise ValueError("no curvature at the anchor to take a step size from; give SGLD(step=…) one")
    return top


class _Stiffness(eqx.Module):
    product: Callable[[PyTree], PyTree]
    precision: PyTree
    beta: Array

    def __call__(self, vector: PyTree) -> PyTree:
        return jax.tree.map(lambda h, a, v: self.beta * h + a * v, self.product(vector), self.precision, vector)


@eqx.filter_jit
def _value(cost: Cost, params: PyTree) -> Float[Array, ""]:
    return cost(params)
