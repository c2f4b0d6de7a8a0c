"""Numbers that differ by no more than rounding, made equal, so that ties are decided by the order of the clients."""

import jax
import jax.numpy as jnp


def merge_ties(values: jax.Array, scales: jax.Array) -> jax.Array:
    """Values that follow each other within four roundings of their scales, replaced by the least of them.

    A distance that is computed from inner products about a rounded centre is off by roundings of the squared lengths,
    so that distances which are equal on paper come out in any order.

    Args:
      values: `[C]`, may be infinite.
      scales: `[C]`, at least 0: what was rounded when each value was computed.

    Returns:
      `[C]`.

    Example:
      >>> import jax.numpy as jnp
      >>> print(merge_ties(jnp.array([3.0, 1.0000001, 1.0, 2.0]), jnp.ones(4)))
      [3. 1. 1. 2.]
    """
    order = jnp.argsort(values, stable=True)
    ranked = values[order]
    margins = 4 * jnp.finfo(values.dtype).eps * scales[order].astype(values.dtype)
    close = ranked[1:] - ranked[:-1] <= jnp.maximum(margins[1:], margins[:-1])  # False where infinite or NaN
    first = jnp.concatenate([jnp.ones(1, bool), ~close])
    # Where the run begins that a value belongs to.
    begins = jax.lax.cummax(jnp.where(first, jnp.arange(values.size, dtype=jnp.int32), 0))
    return jnp.zeros_like(values).at[order].set(ranked[begins])
