r"""Stochastic gradient Langevin dynamics, unadjusted and in minibatches, as the literature on λ has it.

.. math:: \theta \leftarrow \theta - \tfrac{e}{2} \left( \beta \nabla C_B(\theta) + \gamma (\theta - \theta_0)
          - \nabla \log \pi(\theta) \right) + \sqrt{e}\, \xi, \quad \xi \sim N(0, I)

with C_B the mean cost on a batch drawn anew at each step. The stationary state is wider than the target by a factor
1/(1 − e a/4) in a direction of stiffness a, and by the batches' noise on top.

Sources: Welling & Teh, ICML 2011; Lau, Furman, Wang, Murfet & Wei, arXiv 2308.12108, appendix, whose nβ is this β.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from volumejax import tree

__all__ = ["Pull", "langevin", "wander"]


class Pull(eqx.Module):
    """The quadratic part of the target: its force at θ is precision·(centre − θ), leaf by leaf, float32."""

    precision: PyTree
    centre: PyTree


def langevin(
    cost: Callable[[PyTree], Float[Array, ""]],
    pull: Pull,
    beta: Float[Array, ""],
    step_size: Float[Array, ""],
    batch_size: int | None,
    num_examples: int,
) -> Callable[[Key[Array, ""], PyTree], PyTree]:
    """Return step(key, params) -> params.

    Args:
        cost: params -> scalar; with `on(indices)` where batches are taken.
        pull: prior and localisation.
        beta: β.
        step_size: e, in squared units of the parameters.
        batch_size: examples a step, drawn with replacement; None takes all of them.
        num_examples: to draw from.
    """

    def step(key: Array, params: PyTree) -> PyTree:
        batch = cost
        if batch_size is not None:
            indices = jax.random.randint(jax.random.fold_in(key, 0), (batch_size,), 0, num_examples)
            batch = cost.on(indices)  # pyright: ignore[reportFunctionMemberAccess]
        slope = jax.grad(batch)(params)
        noise = tree.normal_like(jax.random.fold_in(key, 1), params)
        return jax.tree.map(
            lambda x, g, z, a, m: (x - 0.5 * step_size * (beta * g + a * (x - m)) + jnp.sqrt(step_size) * z).astype(
                x.dtype
            ),
            params, slope, noise, pull.precision, pull.centre,
        )  # fmt: skip

    return step


@eqx.filter_jit
def wander(
    cost: Callable[[PyTree], Float[Array, ""]],
    pull: Pull,
    key: Key[Array, ""],
    params: PyTree,
    settings: tuple[Array, Array],
    first: Int[Array, ""],
    num_draws: int,
    steps_per_draw: int,
    batch_size: int | None,
    num_examples: int,
) -> tuple[PyTree, Float[Array, "chains draws"]]:
    """Take all chains on by `num_draws` draws, `steps_per_draw` steps each, and return the cost on all data at each.

    Args:
        cost: as for `langevin`.
        pull: as for `langevin`.
        key: draw k of chain i uses `fold_in(fold_in(key, i), k)`.
        params: of all chains, leading axis.
        settings: (β, step size), float32.
        first: number of draws before.
        num_draws: of each chain.
        steps_per_draw: steps between them.
        batch_size: as for `langevin`.
        num_examples: as for `langevin`.
    """
    step = langevin(cost, pull, *settings, batch_size, num_examples)

    def one(index: Array, params: PyTree) -> tuple[PyTree, Array]:
        chain = jax.random.fold_in(key, index)

        def draw(params: PyTree, k: Array) -> tuple[PyTree, Array]:
            here = jax.random.fold_in(chain, first + k)
            params = jax.lax.fori_loop(0, steps_per_draw, lambda i, p: step(jax.random.fold_in(here, i), p), params)
            return params, cost(params)

        return jax.lax.scan(draw, params, jnp.arange(num_draws))

    chains: Any = jax.tree.leaves(params)[0].shape[0]
    return jax.vmap(one)(jnp.arange(chains), params)
