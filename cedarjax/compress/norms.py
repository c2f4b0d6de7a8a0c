"""Norms of vectors, each in one pass."""

import math

import jax
import jax.numpy as jnp

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
    """Euclidean norm of numbers as updates have them, in one pass.

    A scale that depended on the numbers would need a second pass, which costs more than all else about a quantiser.

    Args:
      vector: `[d]` float32 or float64.

    Returns:
      Scalar, right to rounding from 1e-12 to 1.8e19 (float64: from 1e-138 to 1e154). Not finite if a number is not, or
      if the norm lies above; 0 if it lies below, where squares vanish.

    Example:
      >>> import jax.numpy as jnp
      >>> print(two_norm(jnp.array([3.0, -4.0])), two_norm(jnp.array([3e30, -4e30])))
      5.0 inf
    """
    info = jnp.finfo(vector.dtype)
    squared = jnp.sum(vector * vector)  # scaling the numbers first, even by a constant, takes XLA:CPU twice as long
    vanishes = squared < float(info.tiny) / float(info.eps) ** 2  # not so for NaN
    return jnp.where(vanishes, 0.0, jnp.sqrt(squared))


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
    # `abs` would do: but then XLA:CPU works the update out again for the sum, which takes a tenth of a round.
    parts = jnp.where(vector < 0, vector * (-1.0 / power), vector * (1.0 / power))
    return jnp.sum(parts) * (power / size)
