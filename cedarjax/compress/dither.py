"""Random numbers for rounding, so cheap that they cost nothing beside the update that they round.

Thresholds of a stochastic rounding need a uniform distribution and no visible relation to each other; they need not
withstand an adversary. So they are a counter `i A + B` put through a bijective mixer of 32 bits, with an odd `A` and a
`B` that are hashed from the key: over keys each number is uniform, and `A` keeps the sequences of two keys apart. That
is a dozen vector instructions a number, where a CPU takes fifty times as long for the generator of `jax.random`.

The mixer is the one found by search by Wellons, `Prospecting for Hash Functions
<https://nullprogram.com/blog/2018/07/31/>`_, 2018.
"""

import jax
import jax.numpy as jnp
from jax import lax

_GOLDEN = 0x9E3779B9


def mix(x: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which every bit of the argument changes half of the result's.

    Args:
      x: uint32.

    Returns:
      uint32 of the same shape.
    """
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
    return x ^ (x >> jnp.uint32(16))


def seeds(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two numbers of 32 bits, hashed from all words of a key.

    Args:
      key: one PRNG key of any implementation.

    Returns:
      Two uint32 scalars.
    """
    words = jax.random.key_data(key).reshape(-1)
    first, second = jnp.uint32(_GOLDEN), jnp.uint32(0)
    for i in range(words.shape[0]):
        first, second = mix(second ^ words[i]), mix(first + words[i] * jnp.uint32(_GOLDEN))
    return first, second


def random_words(key: jax.Array, num_words: int) -> jax.Array:
    """Uniform words.

    Args:
      key: one PRNG key.
      num_words: how many.

    Returns:
      `[num_words]` uint32.

    Example:
      >>> import jax
      >>> words = random_words(jax.random.key(0), 10_000)
      >>> print(abs(words.astype("float32").mean() / 2.0**31 - 1.0) < 0.03)
      True
    """
    step, start = seeds(key)
    return mix(lax.iota(jnp.uint32, num_words) * (step | jnp.uint32(1)) + start)


def uniforms(key: jax.Array, num_uniforms: int, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Uniform numbers in `[0, 1)`, multiples of 2^-24.

    Args:
      key: one PRNG key.
      num_uniforms: how many.
      dtype: float32 or float64.

    Returns:
      `[num_uniforms]`.
    """
    return (random_words(key, num_uniforms) >> jnp.uint32(8)).astype(dtype) * jnp.asarray(2.0**-24, dtype)
