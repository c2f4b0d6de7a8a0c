"""What an ideal entropy coder would make of codes and indices: estimates beside the exact counts of fixed width."""

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln


def code_entropy(codes: jax.Array, num_symbols: int) -> jax.Array:
    """Bits of codes at their own empirical entropy of order zero, `sum_s n_s log2(n / n_s)`.

    The table of frequencies is not counted.

    Args:
      codes: `[n]` integers in `[0, num_symbols)`.
      num_symbols: how many codes there are.

    Returns:
      float32 scalar; 0 for no codes.

    Example:
      >>> import jax.numpy as jnp
      >>> print(code_entropy(jnp.array([0, 1, 0, 1, 2, 2, 3, 3]), 4))
      16.0
    """
    counts = jnp.zeros(num_symbols, jnp.float32).at[codes.astype(jnp.int32)].add(1.0)
    seen = jnp.where(counts > 0, counts, 1.0)
    return jnp.sum(jnp.where(counts > 0, counts * (math.log2(max(codes.shape[0], 1)) - jnp.log2(seen)), 0.0))


def subset_entropy(size: int, num_chosen: jax.Array | int) -> jax.Array:
    """Bits of a set of indices when all of its size are alike, `log2 binomial(d, k)`.

    Args:
      size: `d`.
      num_chosen: `k`, a number or an array of whole numbers.

    Returns:
      float32 of the shape of `k`.

    Example:
      >>> print(subset_entropy(4, 2).round(4))  # of six sets
      2.585
    """
    chosen = jnp.asarray(num_chosen, jnp.float32)
    ways = math.lgamma(size + 1) - gammaln(chosen + 1.0) - gammaln(float(size) - chosen + 1.0)
    return jnp.maximum(ways / math.log(2), 0.0)
