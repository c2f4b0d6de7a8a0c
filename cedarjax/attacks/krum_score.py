"""Krum's selection as attackers foresee it, from squared distances alone.

Reference: Blanchard et al., `Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent
<https://arxiv.org/abs/1703.02757>`_, 2017.
"""

import jax
import jax.numpy as jnp


def nearest_sums(distances: jax.Array, counts: jax.Array, num_nearest: jax.Array) -> jax.Array:
    """Sum of the distances of each row to its nearest others.

    Args:
      distances: `[C, C]`; `inf` towards rows that do not count. The diagonal is not read.
      counts: `[C]` bool.
      num_nearest: int32 scalar, others that are added up.

    Returns:
      `[C]`, `inf` for rows that do not count.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([0.0, 1.0, 3.0])
      >>> print(nearest_sums(abs(x[:, None] - x[None, :]), jnp.ones(3, bool), jnp.int32(1)))
      [1. 1. 2.]
    """
    count = counts.shape[0]
    ranked = jnp.sort(jnp.where(jnp.eye(count, dtype=bool), jnp.inf, distances), axis=1)
    added = (jnp.arange(count, dtype=jnp.int32) < num_nearest)[None, :]
    return jnp.where(counts, jnp.where(added, ranked, 0).sum(axis=1), jnp.inf)


def krum_selects(distances: jax.Array, present: jax.Array, num_byzantine: jax.Array) -> jax.Array:
    """Place of the row of least distance to its `n - f - 2` nearest others; of equal ones, the first.

    Args:
      distances: `[C, C]` squared distances.
      present: `[C]` bool, `n` of them.
      num_byzantine: int32 scalar, `f`.

    Returns:
      int32 scalar.
    """
    num_nearest = jnp.maximum(present.sum(dtype=jnp.int32) - num_byzantine - 2, 1)
    scores = nearest_sums(jnp.where(present[None, :], distances, jnp.inf), present, num_nearest)
    return jnp.argmin(scores).astype(jnp.int32)
