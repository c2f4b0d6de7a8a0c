"""A function of rows, applied to blocks of them, so that memory is that of one block."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cedarjax.core import PyTree


def in_blocks(fun: Callable[[PyTree], PyTree], rows: PyTree, block_size: int) -> PyTree:
    """Applies a function whose results for a row depend on that row alone.

    Args:
      fun: leaves `[b, ...]` to leaves `[b, ...]`.
      rows: leaves `[n, ...]`, at least one row.
      block_size: rows at once; the last block is filled up with copies of the last row.

    Returns:
      Leaves `[n, ...]`.

    Example:
      >>> import jax.numpy as jnp
      >>> in_blocks(jnp.square, jnp.arange(5), 2).tolist()
      [0, 1, 4, 9, 16]
    """
    count = jax.tree.leaves(rows)[0].shape[0]
    size = min(block_size, count)
    if size == count:
        return fun(rows)

    def of_block(start: jax.Array) -> PyTree:
        index = jnp.minimum(start + jnp.arange(size, dtype=jnp.int32), count - 1)
        return fun(jax.tree.map(lambda x: x.at[index].get(mode="promise_in_bounds"), rows))

    results = jax.lax.map(of_block, jnp.arange(0, count, size, dtype=jnp.int32))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], results)
