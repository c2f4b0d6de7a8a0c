"""Norms of vectors whose squares or sums need not be floats."""

import math

import jax
import jax.numpy as jnp
from jax import lax

SCALE = 0.125  # by which numbers are scaled first, so that differences and inverses of the largest are normal floats


def inverse_or_zero(x: jax.Array) -> jax.Array:
    """`1 / x` where `x` is above 0, else 0.

    Args:
      x: floats.

    Returns:
      Floats of that shape.
    """
    positive = x > 0
    return jnp.where(positive, 1.0 / jnp.where(positive, x, 1.0), 0.0)


def two_norm(vector: jax.Array) -> jax.Array:
    """Euclidean norm, of any finite numbers.

    Where squares overflow or vanish, numbers are scaled by a power of two about the largest one and summed again.

    Args:
      vector: `[d]` float32 or float64.

    Returns:
      Scalar; not finite if a number is not, or if the norm is larger than any float.

    Example:
      >>> import jax.numpy as jnp
      >>> print(two_norm(jnp.array([3e30, 4e30])))
      5e+30
    """
    if vector.shape[0] == 0:
        return jnp.zeros((), vector.dtype)
    info = jnp.finfo(vector.dtype)
    squared = jnp.sum(vector * vector)
    is_off = ~(squared < float(info.max)) | (squared < float(info.tiny) / float(info.eps) ** 2)

    def scaled(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        largest = jnp.max(jnp.abs(vector))
        usual = (largest > 0) & jnp.isfinite(largest)
        exponent = jnp.frexp(jnp.where(usual, largest, 1.0))[1]
        exponent = jnp.clip(exponent, info.minexp + 2, info.maxexp - 2)
        scale = jnp.ldexp(jnp.ones((), vector.dtype), exponent)
        small = vector * (1.0 / scale)
        return jnp.sqrt(jnp.sum(small * small)) * scale, jnp.zeros((), bool)

    # A loop of no or one turn: unlike a condition it costs nothing under vmap unless some client needs it.
    return lax.while_loop(lambda state: state[1], scaled, (jnp.sqrt(squared), is_off))[0]


def mean_magnitude(vector: jax.Array) -> jax.Array:
    """`|v|_1 / d`, of any finite numbers.

    Args:
      vector: `[d]` float32 or float64.

    Returns:
      Scalar; 0 for no numbers. Numbers below `2 d` times the least normal float may count as 0.
    """
    size = vector.shape[0]
    if size == 0:
        return jnp.zeros((), vector.dtype)
    power = float(2 ** math.ceil(math.log2(size)))  # a sum of so many halves of floats is one
    return jnp.sum(jnp.abs(vector) * (1.0 / power)) * (power / size)
