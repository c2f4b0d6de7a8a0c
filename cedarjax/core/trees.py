"""Reductions over the client axis: the two primitives `gram` and `weighted_sum`, and what follows from them.

Every function takes a tree whose leaves are `[C, ...]`, arrays or `LowRank`, or a `Mixture`, and never
flattens it. Sums over clients
are written as matrix products, which XLA runs at the speed of the hardware on every backend (a plain `sum(axis=0)` is
about 100 times slower on CPU), and are accumulated in at least float32 at `Precision.HIGHEST`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cedarjax.core.axis import num_clients, per_leaf
from cedarjax.core.dtypes import accumulator
from cedarjax.core.inner import products, with_inner
from cedarjax.core.lowrank import reduce
from cedarjax.core.lowrank.node import LowRank, is_low_rank, keep
from cedarjax.core.mixture import Mixture
from cedarjax.core.sharded import all_reduced, divides, share_of_parameters
from cedarjax.core.types import PyTree

_HIGHEST = jax.lax.Precision.HIGHEST
_BLOCK = 2**18  # numbers that are masked at once: they stay in the cache of a CPU


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


def _leaves(updates: PyTree) -> list[jax.Array | LowRank]:
    leaves = jax.tree.leaves(updates, is_leaf=is_low_rank)
    return [leaf.checked() if is_low_rank(leaf) else leaf for leaf in leaves]


def gram(updates: PyTree, *, mesh: Mesh | None = None) -> jax.Array:
    """Inner products between all pairs of clients, `G[i, j] = <updates_i, updates_j>`.

    Centre the updates first when distances are wanted: a common offset costs digits.

    Args:
      updates: tree with leaves `[C, ...]`.
      mesh: mesh over which the client axis lies. Then each device multiplies its share of the parameters of all
        clients, and one all-reduce of `[C, C]` adds them up; no device ever holds all updates.

    Returns:
      `[C, C]`, float32 or wider.

    Example:
      >>> import jax.numpy as jnp
      >>> gram({"a": jnp.array([[1.0, 2.0], [0.0, 1.0]]), "b": jnp.array([1.0, -1.0])})
      Array([[6., 1.],
             [1., 2.]], dtype=float32)
    """
    count = num_clients(updates)
    if isinstance(updates, Mixture):
        return _inner_products(updates, mesh)
    if divides(mesh, count):
        assert mesh is not None
        return all_reduced(lambda own: gram(share_of_parameters(own, mesh)), mesh, updates)

    def products(x: jax.Array | LowRank) -> jax.Array:
        if isinstance(x, LowRank):
            return reduce.products(x, accumulator(x))
        rows = _rows(x)
        return jnp.matmul(rows, rows.T, precision=_HIGHEST, preferred_element_type=accumulator(x))

    return _sum_leaves([products(x) for x in _leaves(updates)])


def _sum_leaves(terms: list[jax.Array]) -> jax.Array:
    dtype = accumulator(*terms)
    total = terms[0].astype(dtype)
    for term in terms[1:]:
        total = total + term.astype(dtype)
    return total


def sq_norms(updates: PyTree, *, mesh: Mesh | None = None) -> jax.Array:
    """Squared Euclidean norm of each client's update.

    Args:
      updates: tree with leaves `[C, ...]`.
      mesh: mesh over which the client axis lies; read for a `Mixture`.

    Returns:
      `[C]`, float32 or wider.

    Example:
      >>> import jax.numpy as jnp
      >>> sq_norms({"a": jnp.array([[3.0, 4.0], [0.0, 1.0]])})
      Array([25.,  1.], dtype=float32)
    """
    num_clients(updates)
    if isinstance(updates, Mixture):
        return jnp.maximum(jnp.diagonal(_inner_products(updates, mesh)), 0)

    def squares(x: jax.Array | LowRank) -> jax.Array:
        if isinstance(x, LowRank):
            return reduce.sq_norms(x, accumulator(x))
        return jnp.square(_rows(x).astype(accumulator(x))).sum(axis=1)

    return _sum_leaves([squares(x) for x in _leaves(updates)])


def inner_with(updates: PyTree, vector: PyTree) -> jax.Array:
    """Inner product of each client's update with one vector.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture`.
      vector: tree with leaves `[...]`.

    Returns:
      `[C]`, float32 or wider; NaN or Inf only for clients whose update holds them.

    Example:
      >>> import jax.numpy as jnp
      >>> inner_with({"a": jnp.array([[3.0, 4.0], [0.0, 1.0]])}, {"a": jnp.array([1.0, 2.0])})
      Array([11.,  2.], dtype=float32)
    """
    if isinstance(updates, Mixture):
        of_parts = [
            jnp.matmul(m, jnp.where(read, inner_with(part, vector), 0).astype(m.dtype), precision=_HIGHEST)
            for m, read, part in zip(updates.matrices, updates.read(), updates.parts, strict=True)
        ]
        return _sum_leaves(of_parts)

    def product(x: jax.Array | LowRank, v: jax.Array) -> jax.Array:
        rows = _rows(x.dense() if isinstance(x, LowRank) else x)
        v = v.reshape(-1).astype(rows.dtype)
        return jnp.matmul(rows, v, precision=_HIGHEST, preferred_element_type=accumulator(x))

    return _sum_leaves([product(x, v) for x, v in zip(_leaves(updates), jax.tree.leaves(vector), strict=True)])


def _inner_products(rows: Mixture, mesh: Mesh | None) -> jax.Array:
    rows = with_inner(rows, jnp.ones(rows.num_rows, bool), mesh=mesh)
    assert rows.inner is not None
    return products(rows.coordinates.astype(rows.inner.dtype), rows.inner)


def finite_rows(updates: PyTree) -> jax.Array:
    """Which clients sent only finite numbers.

    Args:
      updates: tree with leaves `[C, ...]`.

    Returns:
      `[C]` bool.

    Example:
      >>> import jax.numpy as jnp
      >>> finite_rows({"a": jnp.array([[1.0, jnp.nan], [0.0, 1.0]])})
      Array([False,  True], dtype=bool)
    """
    count = num_clients(updates)
    if isinstance(updates, Mixture):
        return jnp.ones(count, bool)

    def finite(x: jax.Array | LowRank) -> jax.Array:
        if isinstance(x, LowRank):
            return reduce.finite_rows(x, accumulator(x))
        # 0 * x is 0 or NaN, and the product costs a CPU a seventh of `isfinite(x).all(axis=1)`. A maximum would not do:
        # XLA:CPU loses a NaN among a few thousand numbers.
        rows = _rows(x)
        return jnp.isfinite(jnp.matmul(rows, jnp.zeros(rows.shape[1], x.dtype), precision=_HIGHEST))

    return jnp.stack([finite(x) for x in _leaves(updates)]).all(axis=0)


def weighted_sum(coefficients: PyTree, updates: PyTree, *, mesh: Mesh | None = None, guarded: bool = True) -> PyTree:
    """Linear combination of the clients' updates, `sum_i coefficients_i * updates_i`.

    Rows of coefficient 0 are absent: they may hold NaN or Inf. The plain product is taken first and the rows are masked
    only if its result is not finite, so that the guard costs no pass over `[C, D]` when all is well, and then in blocks
    of columns, so that it never costs a second `[C, D]`.

    Args:
      coefficients: `[C]`, or a tree shaped like `updates` with `[C]` leaves.
      updates: tree with leaves `[C, ...]`.
      mesh: mesh over which the client axis lies. Then each device sums over its clients, and one all-reduce adds up.
      guarded: whether to look; without, a NaN or Inf in an absent row makes a NaN, for callers that look themselves.

    Returns:
      Tree with leaves `[...]` in the dtype of `updates`.

    Raises:
      ValueError: if the client axes disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> weighted_sum(jnp.array([0.5, 0.0]), {"a": jnp.array([[2.0, 4.0], [jnp.nan, 1.0]])})
      {'a': Array([1., 2.], dtype=float32)}
    """
    count = num_clients(updates)
    by_leaf = per_leaf(coefficients, updates)
    for leaf in jax.tree.leaves(by_leaf):
        if leaf.shape != (count,):
            raise ValueError(f"coefficients must be [C] with C = {count}, got the shape {leaf.shape}.")
    if isinstance(updates, Mixture):
        return _of_mixture(by_leaf, updates, mesh)

    if divides(mesh, count):
        assert mesh is not None
        sums = all_reduced(functools.partial(_sums, guarded=guarded), mesh, by_leaf, updates)
    else:
        sums = _sums(by_leaf, updates, guarded=guarded)
    return jax.tree.map(lambda total, x: total.astype(x.dtype), sums, updates)


def _of_mixture(by_leaf: PyTree, rows: Mixture, mesh: Mesh | None) -> PyTree:
    def of_part(matrix: jax.Array, part: PyTree) -> PyTree:
        def through(c: jax.Array) -> jax.Array:
            dtype = accumulator(c, matrix)
            return jnp.matmul(c.astype(dtype), matrix.astype(dtype), precision=_HIGHEST)

        return weighted_sum(jax.tree.map(through, by_leaf), part, mesh=mesh if num_clients(part) > 1 else None)

    sums = [of_part(matrix, part) for matrix, part in zip(rows.matrices, rows.parts, strict=True)]
    return jax.tree.map(lambda *x: functools.reduce(jnp.add, x), *sums)


def _sums(coefficients: PyTree, updates: PyTree, *, guarded: bool) -> PyTree:
    """`weighted_sum` with coefficients for every leaf, in the accumulators' dtype."""
    pairs = list(zip(jax.tree.leaves(coefficients), _leaves(updates), strict=True))
    plain = [_combine(c, x) for c, x in pairs]
    sums = plain
    if guarded:
        finite = jnp.stack([jnp.isfinite(x).all() for x in plain]).all()
        sums = jax.lax.cond(finite, lambda: plain, lambda: [_combine_present(c, x) for c, x in pairs])
    return jax.tree.unflatten(jax.tree.structure(updates, is_leaf=is_low_rank), sums)


def _combine(c: jax.Array, x: jax.Array | LowRank) -> jax.Array:
    dtype = accumulator(x)
    if isinstance(x, LowRank):
        return reduce.combination(c, x, dtype)
    return jnp.tensordot(c.astype(dtype), x, axes=1, precision=_HIGHEST, preferred_element_type=dtype)


def _combine_present(c: jax.Array, x: jax.Array | LowRank) -> jax.Array:
    """The same over the rows of which the coefficient is not 0, in blocks of columns."""
    if isinstance(x, LowRank):
        return _combine(c, keep(c != 0, x))
    rows = _rows(x)
    count, length = rows.shape
    width = min(length, max(64, _BLOCK // count))

    def block(start: jax.Array | int) -> jax.Array:
        return _combine(c, keep(c != 0, jax.lax.dynamic_slice_in_dim(rows, start, width, axis=1)))

    def add_block(index: jax.Array, total: jax.Array) -> jax.Array:
        start = jnp.minimum(index * width, length - width)
        return jax.lax.dynamic_update_slice_in_dim(total, block(start), start, axis=0)

    if width == length:
        return block(0).reshape(x.shape[1:])
    num_blocks = -(-length // width)
    return jax.lax.fori_loop(0, num_blocks, add_block, jnp.zeros(length, accumulator(x))).reshape(x.shape[1:])


def weighted_mean(updates: PyTree, weights: PyTree, *, mesh: Mesh | None = None, guarded: bool = True) -> PyTree:
    """Weighted mean over clients, leaf by leaf; 0 where a leaf's weights sum to 0.

    Args:
      updates: tree with leaves `[C, ...]`.
      weights: `[C]` at least 0, or a tree shaped like `updates` with `[C]` leaves; 0 means absent.
      mesh: as in `weighted_sum`.
      guarded: as in `weighted_sum`.

    Returns:
      Tree with leaves `[...]` in the dtype of `updates`.

    Example:
      >>> import jax.numpy as jnp
      >>> weighted_mean({"a": jnp.array([[2.0], [6.0]])}, jnp.array([1.0, 3.0]))
      {'a': Array([5.], dtype=float32)}
    """
    leaves = _leaves(updates.parts[0] if isinstance(updates, Mixture) else updates)

    def normalise(w: jax.Array) -> jax.Array:
        w = w.astype(accumulator(w, *leaves))
        total = w.sum()
        return w / jnp.where(total > 0, total, jnp.ones_like(total))

    return weighted_sum(jax.tree.map(normalise, per_leaf(weights, updates)), updates, mesh=mesh, guarded=guarded)
