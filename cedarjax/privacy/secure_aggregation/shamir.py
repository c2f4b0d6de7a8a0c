"""Secrets in shares, of which any `t` tell the secret and `t - 1` tell nothing.

Reference: Shamir, `How to Share a Secret <https://doi.org/10.1145/359168.359176>`_, 1979. The secret is the value at 0
of a random polynomial of degree `t - 1`; shares are its values elsewhere; `t` of them determine it (Lagrange).
Everything is written for the secrets of one owner: map it over owners.
"""

import jax
import jax.numpy as jnp
from jax import lax

from cedarjax.privacy.secure_aggregation import field
from cedarjax.privacy.secure_aggregation.field import PRIME


def split_secret(
    secrets: jax.Array, points: jax.Array, threshold: int, key: jax.Array, *, prime: int = PRIME
) -> jax.Array:
    """Shares of one owner's secrets, drawn at random.

    Args:
      secrets: `[S]` uint32 elements of the field; each has a polynomial of its own.
      points: `[m]` uint32, where the holders' shares are taken: different, and none of them 0.
      threshold: `t`, shares that tell a secret, from 1 to `m`.
      key: the owner's PRNG key.
      prime: number of elements of the field.

    Returns:
      `[m, S]` uint32.

    Raises:
      ValueError: if `threshold` is not from 1 to `m`, there are not fewer points than elements of the field, or the
        prime is none of `field.check_prime`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> points = jnp.array([1, 2, 3, 4], jnp.uint32)
      >>> shares = split_secret(jnp.array([2023, 7], jnp.uint32), points, 3, jax.random.key(0))
      >>> reconstruct_secret(shares, points, jnp.array([True, False, True, True]), 3).tolist()
      [2023, 7]
    """
    field.check_prime(prime)
    if not 1 <= threshold <= points.shape[0]:
        raise ValueError(f"threshold must be from 1 to the number of shares, {points.shape[0]}, got {threshold}.")
    if points.shape[0] >= prime:
        raise ValueError(f"points must be fewer than the elements of the field, got {points.shape[0]} and {prime}.")
    coefficients = field.uniform(key, (threshold - 1, *secrets.shape), prime=prime)
    return evaluate(secrets, coefficients, points, prime=prime)


def evaluate(secrets: jax.Array, coefficients: jax.Array, points: jax.Array, *, prime: int = PRIME) -> jax.Array:
    """Values of the polynomials `secrets + coefficients[0] x + coefficients[1] x^2 + ...`, by Horner's scheme.

    Args:
      secrets: `[S]` uint32, the values at 0.
      coefficients: `[t - 1, S]` uint32.
      points: `[m]` uint32.
      prime: number of elements of the field.

    Returns:
      `[m, S]` uint32.
    """
    shape = (points.shape[0], *secrets.shape)
    x = jnp.broadcast_to(points[:, None], shape)

    def horner(value: jax.Array, coefficient: jax.Array) -> tuple[jax.Array, None]:
        coefficient = jnp.broadcast_to(coefficient[None], shape)
        return field.add(field.multiply(value, x, prime=prime), coefficient, prime=prime), None

    powers = jnp.concatenate([secrets[None], coefficients])
    return lax.scan(horner, jnp.zeros(shape, jnp.uint32), powers, reverse=True)[0]


def reconstruct_secret(
    shares: jax.Array, points: jax.Array, answered: jax.Array, threshold: int, *, prime: int = PRIME
) -> jax.Array:
    """The secrets of one owner from the first `t` shares that came.

    `secret = sum_j share_j prod_(l != j) x_l / (x_l - x_j)`.

    Args:
      shares: `[m, S]` uint32; what a holder that did not answer has there is not read.
      points: `[m]` uint32, as they were given to `split_secret`.
      answered: `[m]` bool, whose shares came.
      threshold: `t`.
      prime: number of elements of the field.

    Returns:
      `[S]` uint32; numbers that mean nothing if fewer than `t` answered.
    """
    chosen = answered & (jnp.cumsum(answered, dtype=jnp.int32) <= threshold)

    def product(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        above, below = carry
        x = jnp.broadcast_to(points[i], points.shape)
        counts = chosen[i] & (jnp.arange(points.shape[0], dtype=jnp.int32) != i)
        above = jnp.where(counts, field.multiply(above, x, prime=prime), above)
        difference = field.subtract(x, points, prime=prime)
        return above, jnp.where(counts, field.multiply(below, difference, prime=prime), below)

    one = jnp.full(points.shape, 1 % prime, jnp.uint32)
    above, below = lax.fori_loop(0, points.shape[0], product, (one, one))
    coefficients = jnp.where(chosen, field.multiply(above, field.inverse(below, prime=prime), prime=prime), 0)
    read = jnp.where(chosen[:, None], shares, 0)
    terms = field.multiply(jnp.broadcast_to(coefficients[:, None], read.shape), read, prime=prime)
    return field.total(terms, prime=prime)
