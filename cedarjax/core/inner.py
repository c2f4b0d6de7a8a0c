"""Inner products between clients about a centre, which keep the digits of their distances.

Uncentred, a common offset of 100 standard deviations costs 37 % of the distances in float32. So one client's update is
subtracted from all, block by block of columns; and if that client turns out to lie far from the others, as an attacker
may, it is done again about the client that is most central. About a client and not about the mean, small integers stay
exact, so that ties stay ties.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from cedarjax.core.columns import block_width, even_width
from cedarjax.core.dtypes import accumulator
from cedarjax.core.lowrank import reduce
from cedarjax.core.lowrank.node import LowRank, is_low_rank, keep
from cedarjax.core.mixture import Mixture
from cedarjax.core.sharded import all_reduced, divides, own_columns, share_of_parameters
from cedarjax.core.types import PyTree

_HIGHEST = lax.Precision.HIGHEST
_FAR = 16.0  # times the median squared distance of the most central row


def with_inner(updates: PyTree | Mixture, present: jax.Array, *, mesh: Mesh | None = None) -> Mixture:
    """The updates as a `Mixture` whose inner products are known.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture`.
      present: `[C]` bool; what other rows hold is never read.
      mesh: mesh over which the client axis lies. Then each device multiplies its share of the parameters of all
        clients, and one all-reduce of `[C, C]` adds them up.

    Returns:
      A `Mixture` of the same rows. Where a present row is not finite its inner products with itself are not either.

    Example:
      >>> import jax.numpy as jnp
      >>> rows = with_inner({"a": jnp.array([101.0, 102.0, 106.0])}, jnp.array([True, True, False]))
      >>> print(rows.inner[:2, :2])
      [[1. 0.]
       [0. 0.]]
    """
    if not isinstance(updates, Mixture):
        dtype = accumulator(*jax.tree.leaves(updates, is_leaf=is_low_rank))
        updates = Mixture.kept(updates, present.astype(dtype))
    if updates.inner is not None:
        return updates
    read = jnp.concatenate(updates.read())
    middle = jnp.argmax(jnp.cumsum(read, dtype=jnp.int32) > read.sum(dtype=jnp.int32) // 2)
    first = _inner(updates.parts, read, middle, mesh)

    def again(state: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
        row, inner = state
        off, central = _central(inner, read, row)
        inner = lax.cond(off, lambda: _inner(updates.parts, read, central, mesh), lambda: inner)
        return (jnp.where(off, central, row), inner), None

    # Seen from very far out, a row that lies far out looks like the others: hence twice.
    (_, inner), _ = lax.scan(again, (middle, first), length=2)
    return dataclasses.replace(updates, inner=inner)


def centered_gram(updates: PyTree | Mixture, present: jax.Array, *, mesh: Mesh | None = None) -> jax.Array:
    """Inner products between all pairs of clients about a common centre near most of them.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture`.
      present: `[C]` bool; other rows and columns are 0.
      mesh: as in `with_inner`.

    Returns:
      `[C, C]`, float32 or wider. Differences between rows are what they were; the centre is one of the present rows
      that is not far out.

    Example:
      >>> import jax.numpy as jnp
      >>> print(centered_gram({"a": jnp.array([101.0, 102.0, 106.0])}, jnp.array([True, True, False])))
      [[1. 0. 0.]
       [0. 0. 0.]
       [0. 0. 0.]]
    """
    rows = with_inner(updates, present, mesh=mesh)
    assert rows.inner is not None
    sums = jnp.where(present, rows.sums, 0)
    common = sums.sum() / jnp.maximum(present.sum(dtype=jnp.int32), 1).astype(sums.dtype)
    places = jnp.where(present[:, None], dataclasses.replace(rows, sums=sums - common).coordinates, 0)
    return products(places.astype(rows.inner.dtype), rows.inner)


def products(places: jax.Array, inner: jax.Array) -> jax.Array:
    """Inner products of vectors that are given in terms of others, `places @ inner @ places.T`.

    Args:
      places: `[K, B]`.
      inner: `[B, B]`.

    Returns:
      `[K, K]`.
    """
    return jnp.matmul(jnp.matmul(places, inner, precision=_HIGHEST), places.T, precision=_HIGHEST)


def _central(inner: jax.Array, read: jax.Array, middle: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether a row lies far from most others, by the measure of the one nearest to most, and which that one is."""
    gram = inner[:-1, :-1]
    squares = jnp.diagonal(gram)
    distances = jnp.where(read[None, :], squares[:, None] + squares[None, :] - (gram + gram.T), jnp.inf)
    half = jnp.minimum(read.sum(dtype=jnp.int32) // 2, read.size - 1)
    medians = jnp.take(jnp.sort(distances, axis=1), half, axis=1)
    medians = jnp.where(read & ~jnp.isnan(medians), jnp.maximum(medians, 0), jnp.inf)
    central = jnp.argmin(medians)
    return medians[middle] > _FAR * medians[central], central


def _inner(parts: tuple[PyTree, ...], read: jax.Array, centre: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Inner products of the rows that are read about one of them, and of that one, leaf by leaf."""
    if divides(mesh, jax.tree.leaves(parts[0])[0].shape[0]):
        assert mesh is not None

        def on_shares(own: PyTree) -> jax.Array:
            others = [own_columns(part, own, mesh) for part in parts[1:]]  # not the clients': the same on all devices
            return _inner((share_of_parameters(own, mesh), *others), read, centre, None)

        return all_reduced(on_shares, mesh, parts[0])
    leaves = [jax.tree.leaves(part, is_leaf=is_low_rank) for part in parts]
    total = None
    for group in zip(*leaves, strict=True):
        if any(isinstance(x, LowRank) for x in group):
            term = _of_low_rank(group, read, centre)
        else:
            term = _of_columns([x.reshape(x.shape[0], -1) for x in group], read, centre)
        if total is None:
            total = term
        else:
            dtype = accumulator(total, term)
            total = total.astype(dtype) + term.astype(dtype)
    assert total is not None
    return total


def _of_columns(rows: list[jax.Array], read: jax.Array, centre: jax.Array) -> jax.Array:
    count, length = read.shape[0], rows[0].shape[1]
    dtype = accumulator(*rows)
    width = even_width(length, block_width(count, factor=4))

    def about_centre(start: jax.Array | int, first: jax.Array | int) -> jax.Array:
        blocks = [lax.dynamic_slice_in_dim(x, start, width, axis=1).astype(dtype) for x in rows]
        block = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks)
        # A block that reaches back counts its new columns only.
        counted = (start + jnp.arange(width, dtype=jnp.int32) >= first)[None, :]
        middle = lax.dynamic_slice_in_dim(block, centre, 1, axis=0)
        middle = jnp.where(counted & read.any(), middle, 0)
        return jnp.concatenate([jnp.where(counted & read[:, None], block - middle, 0), middle])

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        first = index * width
        block = about_centre(jnp.minimum(first, length - width), first)
        return total + jnp.matmul(block, block.T, precision=_HIGHEST)

    zeros = jnp.zeros((count + 1, count + 1), dtype)
    if not length:
        return zeros
    if width == length:
        return add(jnp.int32(0), zeros)
    return lax.fori_loop(0, -(-length // width), add, zeros)


def _of_low_rank(group: tuple, read: jax.Array, centre: jax.Array) -> jax.Array:
    """From the uncentred products of the factors: what the offset costs in digits is lost."""
    if len(group) != 1:
        dtype = accumulator(*group)
        return _of_columns([_dense_rows(x).astype(dtype) for x in group], read, centre)
    x = keep(read, group[0])
    assert isinstance(x, LowRank)
    gram = reduce.products(x, accumulator(x))
    own = jnp.eye(read.size, dtype=gram.dtype)
    centre = jnp.where(read.any(), lax.dynamic_index_in_dim(own, centre, keepdims=False), 0)
    about = jnp.where(read[:, None], own - centre[None, :], 0)
    return products(jnp.concatenate([about, centre[None, :]]), gram)


def _dense_rows(x: jax.Array | LowRank) -> jax.Array:
    full = x.dense() if isinstance(x, LowRank) else x
    return full.reshape(full.shape[0], -1)
