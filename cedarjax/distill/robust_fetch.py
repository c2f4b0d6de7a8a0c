"""Reductions for `fetch` that a few poisoned entries among the related ones cannot carry away.

Malicious clients may write any logits; see `distill.poison`. The `R` related samples belong to several clients, so that
order statistics over them stand as long as fewer than half of those written are poisoned.
"""

import jax
import jax.numpy as jnp

from cedarjax.core import accumulator
from cedarjax.distill.cache import ReduceFn


def trimmed_mean(logits: jax.Array, mask: jax.Array, num_trimmed: jax.Array | int) -> jax.Array:
    """Mean, class by class, without the `num_trimmed` lowest and as many highest of the logits that count.

    Where so many do not count, as many are left out as leave one or two: the median.

    Args:
      logits: `[B, R, K]`.
      mask: `[B, R]` bool.
      num_trimmed: left out on each side; may be traced.

    Returns:
      `[B, K]`, zeros where nothing counts; summed in at least float32.
    """
    dtype = accumulator(logits)
    count = mask.sum(axis=1).astype(jnp.int32)
    values = jnp.sort(jnp.where(mask[:, :, None], logits, jnp.inf).astype(dtype), axis=1)
    trimmed = jnp.minimum(jnp.asarray(num_trimmed, jnp.int32), (count - 1) // 2)
    trimmed = jnp.maximum(trimmed, 0)
    rank = jnp.arange(mask.shape[1], dtype=jnp.int32)[None, :]
    inside = (rank >= trimmed[:, None]) & (rank < (count - trimmed)[:, None])
    total = jnp.where(inside[:, :, None], values, jnp.zeros_like(values)).sum(axis=1)
    return total / jnp.maximum(count - 2 * trimmed, 1).astype(dtype)[:, None]


def trimmed_logits(num_trimmed: int | jax.Array) -> ReduceFn:
    """The trimmed mean of the related logits; for `fetch` and `fedcache`.

    Args:
      num_trimmed: left out on each side, at least 0; a traced scalar is allowed.

    Returns:
      A `reduce_fn`.

    Raises:
      ValueError: if `num_trimmed` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> logits, mask = jnp.array([[[1.0], [2.0], [3.0], [99.0]]]), jnp.ones((1, 4), bool)
      >>> trimmed_logits(1)(logits, mask).tolist()
      [[2.5]]
    """
    if isinstance(num_trimmed, int) and num_trimmed < 0:
        raise ValueError(f"num_trimmed must be at least 0, got {num_trimmed}.")
    return lambda logits, mask: trimmed_mean(logits, mask, num_trimmed)


def median_logits(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """The median of the related logits, class by class; a `reduce_fn` for `fetch` and `fedcache`.

    Args:
      logits: `[B, R, K]`.
      mask: `[B, R]` bool.

    Returns:
      `[B, K]`, zeros where nothing counts; the mean of the two middle ones where an even number counts.

    Example:
      >>> import jax.numpy as jnp
      >>> median_logits(jnp.array([[[1.0], [99.0], [3.0], [7.0]]]), jnp.array([[True, True, True, False]])).tolist()
      [[3.0]]
    """
    return trimmed_mean(logits, mask, mask.shape[1])
