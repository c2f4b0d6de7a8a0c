"""Exact arithmetic modulo a prime without 64-bit integers.

The field of 2^31 - 1 elements fits uint32, and because 2^31 is 1 there, a product of two 31-bit numbers is reduced by
shifts and masks: no number ever reaches 2^32. Primes below 2^16 work too, by the remainder; a field small enough to be
enumerated is how it is shown that too few shares tell nothing.
"""

import jax
import jax.numpy as jnp
from jax import lax

PRIME = 2**31 - 1
"""The prime that secrets are shared over."""

_SMALL = 2**16


def check_prime(prime: int) -> None:
    """Raises unless the arithmetic below is exact for this prime.

    Args:
      prime: number of elements of the field; that it is prime is the caller's word.

    Raises:
      ValueError: if it is neither 2^31 - 1 nor from 2 to 2^16.
    """
    if prime != PRIME and not 2 <= prime <= _SMALL:
        raise ValueError(f"prime must be 2^31 - 1 = {PRIME}, or from 2 to {_SMALL}, got {prime}.")


def _fold(x: jax.Array) -> jax.Array:
    """The same number modulo 2^31 - 1, at most 2^31."""
    return (x & PRIME) + (x >> 31)


def _reduced(x: jax.Array, prime: int) -> jax.Array:
    """A number below `2 * prime` made smaller than `prime`."""
    return jnp.where(x >= prime, x - prime, x)


def add(a: jax.Array, b: jax.Array, *, prime: int = PRIME) -> jax.Array:
    """Sum of two elements.

    Args:
      a: uint32 elements of the field.
      b: the same, of the same shape.
      prime: number of elements of the field.

    Returns:
      uint32 elements.
    """
    return _reduced(a + b, prime)


def subtract(a: jax.Array, b: jax.Array, *, prime: int = PRIME) -> jax.Array:
    """Difference of two elements.

    Args:
      a: uint32 elements of the field.
      b: the same, of the same shape.
      prime: number of elements of the field.

    Returns:
      uint32 elements.
    """
    return _reduced(a + (prime - b), prime)


def multiply(a: jax.Array, b: jax.Array, *, prime: int = PRIME) -> jax.Array:
    """Product of two elements.

    With halves `a = a1 2^16 + a0` and `b = b1 2^16 + b0`,
    `a b = a1 b1 2^32 + (a1 b0 + a0 b1) 2^16 + a0 b0`, where `2^32 = 2`.

    Args:
      a: uint32 elements of the field.
      b: the same, of the same shape.
      prime: number of elements of the field.

    Returns:
      uint32 elements.

    Example:
      >>> import jax.numpy as jnp
      >>> int(multiply(jnp.uint32(PRIME - 2), jnp.uint32(3))) == PRIME - 6
      True
    """
    if prime != PRIME:
        return (a * b) % jnp.asarray(prime, jnp.uint32)
    a1, a0, b1, b0 = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    cross = a1 * b0 + a0 * b1  # below 2^32, for a1 and b1 have 15 bits
    high = 2 * (a1 * b1) + (cross >> 15)
    low = ((cross & 0x7FFF) << 16) + _fold(a0 * b0)
    return _reduced(_fold(_fold(high) + _fold(low)), prime)


def power(base: jax.Array, exponent: jax.Array, *, prime: int = PRIME) -> jax.Array:
    """`base ** exponent`, by squaring.

    Args:
      base: uint32 elements of the field.
      exponent: uint32 below 2^31, of the same shape.
      prime: number of elements of the field.

    Returns:
      uint32 elements.

    Example:
      >>> import jax.numpy as jnp
      >>> int(power(jnp.uint32(3), jnp.uint32(4), prime=7))
      4
    """

    def square(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        result, squared = carry
        bit = (exponent >> i.astype(jnp.uint32)) & 1
        result = jnp.where(bit == 1, multiply(result, squared, prime=prime), result)
        return result, multiply(squared, squared, prime=prime)

    one = jnp.full(base.shape, 1 % prime, jnp.uint32)
    return lax.fori_loop(0, 31, square, (one, base))[0]


def inverse(a: jax.Array, *, prime: int = PRIME) -> jax.Array:
    """`1 / a`, which is `a ** (prime - 2)`; 0 for 0.

    Args:
      a: uint32 elements of the field.
      prime: number of elements of the field.

    Returns:
      uint32 elements.
    """
    if prime == 2:
        return a
    return power(a, jnp.full(a.shape, prime - 2, jnp.uint32), prime=prime)


def total(values: jax.Array, *, prime: int = PRIME) -> jax.Array:
    """Sum over axis 0.

    Args:
      values: `[m, ...]` uint32 elements of the field, `m` below 2^16.
      prime: number of elements of the field.

    Returns:
      `[...]` uint32 elements.
    """
    low = (values & 0xFFFF).sum(axis=0, dtype=jnp.uint32) % jnp.asarray(prime, jnp.uint32)
    high = (values >> 16).sum(axis=0, dtype=jnp.uint32) % jnp.asarray(prime, jnp.uint32)
    return add(low, multiply(high, jnp.full(high.shape, 2**16 % prime, jnp.uint32), prime=prime), prime=prime)


def uniform(key: jax.Array, shape: tuple[int, ...], *, prime: int = PRIME) -> jax.Array:
    """Random elements.

    Args:
      key: PRNG key.
      shape: of the result.
      prime: number of elements of the field.

    Returns:
      uint32 elements; for 2^31 - 1 the element 0 comes twice as often as any other, which is once in a billion.
    """
    if prime != PRIME:
        return jax.random.randint(key, shape, 0, prime, jnp.int32).astype(jnp.uint32)
    return _reduced(jax.random.bits(key, shape, jnp.uint32) >> 1, prime)
