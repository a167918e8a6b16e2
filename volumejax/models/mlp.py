"""A multilayer perceptron in flax.nnx, and its functional form for the estimators."""

import functools
import itertools
import math
from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float, PyTree

__all__ = ["MLP", "mlp_apply", "mlp_params"]


class MLP(nnx.Module):
    """Linear layers with the tanh form of GELU between them; weights and biases start as N(0, 1/fan_in).

    Args:
        features: widths from the inputs to the logits; (64, 64, 10) has one hidden layer.
        rngs: the random number streams of flax.nnx; `params` is used.

    Raises:
        ValueError: fewer than two widths.
    """

    def __init__(self, features: tuple[int, ...], *, rngs: nnx.Rngs) -> None:
        """Draw the initial weights."""
        if len(features) < 2:
            raise ValueError(f"features must hold the input and the output width at least, got {features}")
        self.layers = nnx.List([_linear(a, b, rngs) for a, b in itertools.pairwise(features)])

    def __call__(self, inputs: Float[Array, "... features"]) -> Float[Array, "... classes"]:
        """Return the logits."""
        *hidden, last = self.layers
        for layer in hidden:
            inputs = jax.nn.gelu(layer(inputs), approximate=True)
        return last(inputs)


@functools.cache
def mlp_apply(features: tuple[int, ...]) -> Callable[[PyTree, Array], Array]:
    """Return `apply_fn(params, inputs) -> logits` of an MLP with these widths.

    Equal widths give the very same function, so that costs built on it share their compiled code.

    Args:
        features: widths from the inputs to the logits.

    Returns:
        A pure function of `mlp_params`-like nested dictionaries and inputs with shape [..., features[0]].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = mlp_params((3, 4, 2), jax.random.key(0))
        >>> mlp_apply((3, 4, 2))(params, jnp.ones((5, 3))).shape
        (5, 2)
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: MLP(features, rngs=nnx.Rngs(0))))

    def apply_fn(params: PyTree, inputs: Array) -> Array:
        return nnx.merge(graph, params)(inputs)

    return apply_fn


def mlp_params(features: tuple[int, ...], key: Array) -> PyTree:
    """Return freshly initialised parameters as a nested dictionary of float32 arrays, for `mlp_apply`.

    Example:
        >>> import jax
        >>> mlp_params((3, 2), jax.random.key(0))["layers"][0]["kernel"].shape
        (3, 2)
    """
    return nnx.to_pure_dict(nnx.state(MLP(features, rngs=nnx.Rngs(key))))


def _linear(fan_in: int, fan_out: int, rngs: nnx.Rngs) -> nnx.Linear:
    normal = jax.nn.initializers.normal(1.0 / math.sqrt(fan_in))
    # In the short floats of an accelerator's matrix products chains find another region: 16 nats less of digits.
    precision = None if jax.default_backend() == "cpu" else jax.lax.Precision.HIGHEST
    return nnx.Linear(fan_in, fan_out, precision=precision, kernel_init=normal, bias_init=normal, rngs=rngs)
