"""The dtype in which sums run."""

import jax
import jax.numpy as jnp

from cedarjax.core.lowrank.node import LowRank


def accumulator(*arrays: jax.Array | LowRank) -> jnp.dtype:
    """Dtype in which sums run: float32, or the widest of the arrays' where that is wider.

    Unlike `jnp.promote_types` it is defined under strict dtype promotion.

    Args:
      *arrays: arrays of any dtype.

    Returns:
      A floating dtype of at least 32 bits.

    Example:
      >>> import jax.numpy as jnp
      >>> print(accumulator(jnp.ones(2, jnp.bfloat16)))
      float32
    """
    floats = [x.dtype for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact)]
    return max([jnp.dtype(jnp.float32), *floats], key=lambda dtype: dtype.itemsize)
