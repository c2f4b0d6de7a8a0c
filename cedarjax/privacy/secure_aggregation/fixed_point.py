"""Numbers as integers modulo 2^32, so that their sum is exact and a mask can hide them.

A number in `[-clip, clip]` becomes a multiple of the step `clip / (2^(b-1) - 1)`, one of `2^b - 1` integers around 0;
a negative one is stored as `2^32` less its size. Zero is exact. A sum of `n` such integers has one meaning modulo 2^32
as long as `n (2^b - 1) < 2^32`.
"""

import jax
import jax.numpy as jnp

from cedarjax.core.dtypes import accumulator

MOST_BITS = 24
"""Beyond which float32 has no more digits to encode."""


def check_fixed_point(clip: float | jax.Array, num_bits: int, num_summands: int = 1) -> None:
    """Raises unless a sum of so many encoded numbers has one meaning.

    Args:
      clip: largest size of a number; checked if it is a Python number.
      num_bits: `b`.
      num_summands: `n`, clients that are summed, times the largest weight of one.

    Raises:
      ValueError: if `clip` is not positive and finite, `num_bits` is not from 2 to 24, or the sum could overflow.
    """
    if isinstance(clip, int | float) and not 0 < clip < float("inf"):
        raise ValueError(f"clip must be positive and finite, got {clip}.")
    if not 2 <= num_bits <= MOST_BITS:
        raise ValueError(f"num_bits must be from 2 to {MOST_BITS}, got {num_bits}.")
    if num_summands * (2**num_bits - 1) >= 2**32:
        raise ValueError(
            f"num_bits must satisfy n * (2^num_bits - 1) < 2^32, or the sum overflows, "
            f"got num_bits = {num_bits} for n = {num_summands} clients times weights."
        )


def step_size(clip: float | jax.Array, num_bits: int, dtype: jnp.dtype | type = jnp.float32) -> jax.Array:
    """The number that the integer 1 stands for, `clip / (2^(b-1) - 1)`.

    Args:
      clip: largest size of a number.
      num_bits: `b`.
      dtype: of the result.

    Returns:
      A scalar.
    """
    return jnp.asarray(clip, dtype) / (2 ** (num_bits - 1) - 1)


def error_bound(clip: float, num_bits: int, num_summands: int, *, stochastic: bool = False) -> float:
    """How far a decoded sum may lie from the sum of the clipped numbers.

    Half a step a summand, a whole one if rounding is stochastic, and what float32 rounds: two units in the last place
    of `clip` a summand where it is encoded, and as much where the sum is decoded.

    Args:
      clip: largest size of a number.
      num_bits: `b`.
      num_summands: `n`.
      stochastic: whether rounding is.

    Returns:
      A Python float, `n (step / 2 + 2^-21 clip)`, or with a whole step.

    Example:
      >>> error_bound(1.0, 16, 100) < 100 * 1.6e-5
      True
    """
    step = clip / (2 ** (num_bits - 1) - 1)
    return num_summands * ((1.0 if stochastic else 0.5) * step + 2**-21 * clip)


def encode(x: jax.Array, clip: float | jax.Array, num_bits: int, draws: jax.Array | None = None) -> jax.Array:
    """Rounds numbers to integers.

    Args:
      x: finite numbers; what lies outside of `[-clip, clip]` is moved to its end.
      clip: largest size of a number.
      num_bits: `b`.
      draws: `None` to round to the nearest, a tie to the even one; or uniform draws in `[0, 1)` of the shape of `x`, by
        which a number is rounded up with the chance that makes the result right in the mean.

    Returns:
      uint32, negative numbers modulo 2^32.

    Example:
      >>> import jax.numpy as jnp
      >>> encode(jnp.array([0.0, 1.0, -1.0, 5.0]), 1.0, 8).tolist()
      [0, 127, 4294967169, 127]
    """
    dtype = accumulator(x)
    largest = 2 ** (num_bits - 1) - 1
    scaled = jnp.clip(x.astype(dtype) * (largest / jnp.asarray(clip, dtype)), -largest, largest)
    if draws is None:
        rounded = jnp.round(scaled)
    else:
        below = jnp.floor(scaled)
        rounded = below + (draws.astype(dtype) < scaled - below).astype(dtype)
    return rounded.astype(jnp.int32).astype(jnp.uint32)


def decode(total: jax.Array, clip: float | jax.Array, num_bits: int, dtype: jnp.dtype | type) -> jax.Array:
    """Numbers of integers, or sums of integers.

    Args:
      total: uint32.
      clip: as given to `encode`.
      num_bits: as given to `encode`.
      dtype: floating dtype of the result.

    Returns:
      Numbers, within `error_bound` of the sum of the clipped ones.

    Example:
      >>> import jax.numpy as jnp
      >>> decode(encode(jnp.array([0.5, -0.25]), 1.0, 16), 1.0, 16, jnp.float32)
      Array([ 0.50001526, -0.25000763], dtype=float32)
    """
    return total.astype(jnp.int32).astype(dtype) * step_size(clip, num_bits, dtype)
