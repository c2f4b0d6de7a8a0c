"""Inner products between clients about a centre, which keep the digits of their distances.

Uncentred, a common offset of 100 standard deviations costs 37 % of the distances in float32. So the mean of the present
clients is subtracted first, block by block of columns, and a second time the mean of the bulk where the first was drawn
away by a few rows that lie far out, as an attacker's may.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from cedarjax.core.columns import block_width
from cedarjax.core.dtypes import accumulator
from cedarjax.core.lowrank import reduce
from cedarjax.core.lowrank.node import LowRank, is_low_rank, keep
from cedarjax.core.mixture import Mixture
from cedarjax.core.sharded import all_reduced, divides, own_columns, share_of_parameters
from cedarjax.core.types import PyTree

_HIGHEST = lax.Precision.HIGHEST
_OFF_CENTRE = 16.0  # squared distance of the bulk from the centre, in units of its own spread, that is put right


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
      [[ 0.25 -0.25]
       [-0.25  0.25]]
    """
    if not isinstance(updates, Mixture):
        dtype = accumulator(*jax.tree.leaves(updates, is_leaf=is_low_rank))
        kept = present.astype(dtype)
        updates = Mixture((jnp.eye(present.shape[0], dtype=dtype) * kept[:, None],), (updates,), kept)
    if updates.inner is not None:
        return updates
    read = jnp.concatenate(updates.read())
    first = _inner(updates.parts, read, _mean_of(read), mesh)
    off, bulk = _bulk(first, read)
    inner = lax.cond(off, lambda: _inner(updates.parts, read, bulk, mesh), lambda: first)
    return dataclasses.replace(updates, inner=inner)


def centered_gram(updates: PyTree | Mixture, present: jax.Array, *, mesh: Mesh | None = None) -> jax.Array:
    """Inner products between all pairs of clients about a common centre near the bulk of them.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture`.
      present: `[C]` bool; other rows and columns are 0.
      mesh: as in `with_inner`.

    Returns:
      `[C, C]`, float32 or wider. Differences between rows are what they were; the centre is the mean of the present
      rows unless a few of them lie far out.

    Example:
      >>> import jax.numpy as jnp
      >>> print(centered_gram({"a": jnp.array([101.0, 102.0, 106.0])}, jnp.array([True, True, False])))
      [[ 0.25 -0.25  0.  ]
       [-0.25  0.25  0.  ]
       [ 0.    0.    0.  ]]
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


def _mean_of(chosen: jax.Array) -> jax.Array:
    """`[C]` coefficients of the mean of the chosen rows, in float32."""
    return chosen.astype(jnp.float32) / jnp.maximum(chosen.sum(dtype=jnp.int32), 1).astype(jnp.float32)


def _bulk(inner: jax.Array, read: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether the nearer rows, just more than half of them, lie off the centre, and the coefficients of its mean."""
    gram = inner[:-1, :-1]
    squares = jnp.where(read, jnp.diagonal(gram), jnp.inf)
    half = read.sum(dtype=jnp.int32) // 2 + 1
    # Rank by counting: stable, and no sort.
    before = (squares[None, :] < squares[:, None]) | (
        (squares[None, :] == squares[:, None]) & (jnp.arange(read.size)[None, :] < jnp.arange(read.size)[:, None])
    )
    nearer = read & (before.sum(axis=1, dtype=jnp.int32) < half)
    mean = _mean_of(nearer).astype(gram.dtype)
    offset = mean @ jnp.where(jnp.isfinite(gram), gram, 0) @ mean
    spread = (
        jnp.where(nearer, squares, 0).sum() / jnp.maximum(nearer.sum(dtype=jnp.int32), 1).astype(squares.dtype) - offset
    )
    return offset > _OFF_CENTRE * jnp.maximum(spread, 0), mean.astype(jnp.float32)


def _inner(parts: tuple[PyTree, ...], read: jax.Array, centre: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Inner products of the rows that are read about a centre, `centre @ rows`, and of the centre, leaf by leaf."""
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
    width = min(length, block_width(count, factor=4))

    def about_centre(start: jax.Array | int, first: jax.Array | int) -> jax.Array:
        blocks = [lax.dynamic_slice_in_dim(x, start, width, axis=1).astype(dtype) for x in rows]
        block = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks)
        # A block that reaches back counts its new columns only.
        counted = (start + jnp.arange(width, dtype=jnp.int32) >= first)[None, :]
        block = jnp.where(read[:, None] & counted, block, 0)
        middle = jnp.matmul(centre.astype(dtype)[None, :], block, precision=_HIGHEST)
        block = jnp.where(read[:, None], block - middle, 0)
        return jnp.concatenate([block, middle])

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
    gram = reduce.products(x, accumulator(x))
    centre = centre.astype(gram.dtype)
    about = jnp.where(read[:, None], jnp.eye(read.size, dtype=gram.dtype) - centre[None, :], 0)
    return products(jnp.concatenate([about, centre[None, :]]), gram)


def _dense_rows(x: jax.Array | LowRank) -> jax.Array:
    full = x.dense() if isinstance(x, LowRank) else x
    return full.reshape(full.shape[0], -1)
