"""Some parameters of all clients, drawn at random and gathered without writing the updates side by side."""

import itertools

import jax
import jax.numpy as jnp
from jax import lax

from cedarjax.core.columns import mixed
from cedarjax.core.dtypes import accumulator
from cedarjax.core.lowrank.node import LowRank, is_low_rank
from cedarjax.core.mixture import Mixture
from cedarjax.core.types import PyTree

_HIGHEST = lax.Precision.HIGHEST
_SMALL = 2**16


def distinct_indices(key: jax.Array, num_indices: int, length: int) -> jax.Array:
    """Indices drawn without replacement, in ascending order.

    Args:
      key: random key.
      num_indices: how many, at most `length`.
      length: indices are below it.

    Returns:
      `[num_indices]` int32. The cost does not grow with `length` where that is much larger.

    Example:
      >>> import jax
      >>> print(distinct_indices(jax.random.key(0), 4, 4))
      [0 1 2 3]
    """
    if length <= _SMALL or 4 * num_indices > length:
        order = jax.random.permutation(key, jnp.arange(length, dtype=jnp.int32))
        return jnp.sort(order[:num_indices])
    # Of more than twice as many draws the first distinct ones: with fewer than a quarter of all indices to find, and
    # at least 64 draws to spare, it never happens that they do not suffice.
    num_draws = 2 * num_indices + 64
    drawn = jax.random.randint(key, (num_draws,), 0, length, jnp.int32)
    order = jnp.argsort(drawn, stable=True)
    ranked = drawn[order]
    repeated = jnp.concatenate([jnp.zeros(1, bool), ranked[1:] == ranked[:-1]])
    new = jnp.zeros(num_draws, bool).at[order].set(~repeated)
    first = jnp.argsort(jnp.where(new, 0, 1), stable=True)[:num_indices]
    return jnp.sort(drawn[first])


def leaf_sizes(updates: PyTree) -> list[int]:
    """Number of parameters of each leaf.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture`.

    Returns:
      Python ints.
    """
    parts = updates.parts[0] if isinstance(updates, Mixture) else updates
    return [x.size // x.shape[0] for x in jax.tree.leaves(parts, is_leaf=is_low_rank)]


def sampled_columns(updates: PyTree, indices: jax.Array) -> jax.Array:
    """All clients' numbers for some parameters, gathered leaf by leaf.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture`.
      indices: `[B]` int32, ascending, of parameters in the order of the leaves.

    Returns:
      `[C, B]` in the dtype of the first leaf, or wider for a `Mixture`.

    Example:
      >>> import jax.numpy as jnp
      >>> updates = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[[3.0], [4.0]]])}
      >>> print(sampled_columns(updates, jnp.array([1, 2])))
      [[2. 3.]]
    """
    if isinstance(updates, Mixture):
        return mixed(updates.matrices, [sampled_columns(part, indices) for part in updates.parts])
    leaves = jax.tree.leaves(updates, is_leaf=is_low_rank)
    total = jnp.zeros((leaves[0].shape[0], indices.size), accumulator(*leaves))
    offset = 0
    for x in leaves:
        size = x.size // x.shape[0]
        width = min(size, indices.size)
        start = jnp.minimum(jnp.searchsorted(indices, offset).astype(jnp.int32), indices.size - width)
        own = lax.dynamic_slice_in_dim(indices, start, width) - offset
        inside = (own >= 0) & (own < size)
        found = _columns(x, jnp.clip(own, 0, max(size - 1, 0))).astype(total.dtype)
        old = lax.dynamic_slice_in_dim(total, start, width, axis=1)
        total = lax.dynamic_update_slice_in_dim(total, jnp.where(inside[None, :], found, old), start, axis=1)
        offset += size
    return total


def _columns(x: jax.Array | LowRank, columns: jax.Array) -> jax.Array:
    if isinstance(x, LowRank):
        x = x.checked()
        rows, columns = columns // x.shape[-1], columns % x.shape[-1]
        dtype = accumulator(x)
        return (jnp.take(x.left, rows, axis=2).astype(dtype) * jnp.take(x.right, columns, axis=2).astype(dtype)).sum(
            axis=1
        )
    return jnp.take(x.reshape(x.shape[0], -1), columns, axis=1)


def common_gram(rows: jax.Array, uploaded: jax.Array) -> jax.Array:
    """Inner products whose distances are those over the columns that both clients uploaded, scaled to all columns.

    Args:
      rows: `[C, B]`; what was not uploaded may be anything.
      uploaded: `[C, B]` bool.

    Returns:
      `[C, C]`, minus half the squared distances: inner products about no centre, to be centred.

    Example:
      >>> import jax.numpy as jnp
      >>> rows = jnp.array([[0.0, 0.0], [3.0, jnp.nan]])
      >>> print(-2 * common_gram(rows, jnp.array([[True, True], [True, False]])))
      [[ 0. 18.]
       [18.  0.]]
    """

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.matmul(x, y.T, precision=_HIGHEST)

    sent = uploaded.astype(rows.dtype)
    rows = jnp.where(uploaded, rows, 0)
    rows = jnp.where(uploaded, rows - (rows.sum(axis=0) / jnp.maximum(sent.sum(axis=0), 1))[None, :], 0)
    squares, common = product(jnp.square(rows), sent), product(sent, sent)
    distances = jnp.maximum(squares + squares.T - 2 * product(rows, rows), 0)
    scaled = distances * (rows.shape[1] / jnp.maximum(common, 1))
    scaled = jnp.where(common > 0, scaled, scaled.max())
    return jnp.where(jnp.eye(scaled.shape[0], dtype=bool), 0, scaled) / -2


def uploaded_columns(updates: PyTree, weights: PyTree, indices: jax.Array) -> jax.Array:
    """Who uploaded the layers of some parameters.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture`.
      weights: tree of `[C]` leaves shaped like the updates; 0 = not uploaded.
      indices: `[B]` int32 of parameters in the order of the leaves.

    Returns:
      `[C, B]` bool.
    """
    ends = jnp.array(list(itertools.accumulate(leaf_sizes(updates))), jnp.int32)
    layers = jnp.searchsorted(ends, indices, side="right")
    return jnp.stack([w > 0 for w in jax.tree.leaves(weights)], axis=1)[:, layers]
