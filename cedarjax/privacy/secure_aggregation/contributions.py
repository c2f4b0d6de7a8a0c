"""What clients put into a secure sum, and the sum of a tree by way of it."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cedarjax.core.axis import by_layer, claimed_weights, num_clients, per_leaf
from cedarjax.core.dtypes import accumulator
from cedarjax.core.lowrank import dense
from cedarjax.core.mixture import Mixture
from cedarjax.core.names import leaf_names
from cedarjax.core.trees import finite_rows
from cedarjax.core.types import PyTree
from cedarjax.privacy.secure_aggregation.fixed_point import check_fixed_point, decode, encode
from cedarjax.privacy.secure_aggregation.sums import Round, walk_blocks

_SMALL = 2**12  # numbers a client; smaller leaves are masked together


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How an update becomes integers."""

    clip: float | jax.Array
    """Largest size of a number."""
    num_bits: int
    """`b`, bits of a number."""
    max_weight: int
    """`W`; a client's numbers are multiplied by its weight, rounded to an integer from 1 to `W`."""
    stochastic: bool
    """Whether numbers are rounded at random."""

    def check(self, num_summands: int) -> None:
        """Raises unless the weighted sum of so many clients has one meaning.

        Args:
          num_summands: clients.

        Raises:
          ValueError: naming the argument that is out of range.
        """
        if self.max_weight < 1:
            raise ValueError(f"max_weight must be at least 1, got {self.max_weight}.")
        check_fixed_point(self.clip, self.num_bits, num_summands * self.max_weight)


class Contributions(NamedTuple):
    """The clients' updates as they enter a sum."""

    leaves: list[jax.Array]
    """`[C, d]` each, not encoded yet."""
    weights: list[jax.Array]
    """`[C]` uint32 for each leaf, 0 for a layer left out and for a client that dropped out."""
    survived: jax.Array
    """`[C]` bool, clients whose upload comes."""
    nonfinite: jax.Array
    """`[C]` bool, clients that count as dropped out because a number of theirs is not finite."""
    num_clipped: jax.Array
    """`[C]` int32, numbers of a survivor that lie beyond the clip; only a simulation can tell."""


def uploads_of(updates: PyTree) -> PyTree:
    """The clients' updates as arrays, refused if they are not the clients' own.

    Args:
      updates: what an aggregator was given.

    Returns:
      Tree with leaves `[C, ...]`.

    Raises:
      TypeError: if they are rows that a pre-aggregator made of the clients', or do not hold floats.
    """
    if isinstance(updates, Mixture):
        raise TypeError(
            "updates must be the clients' own, got rows that a pre-aggregator made of them: under a secure sum nobody "
            "sees a client's row. Clip at the client, or put the rule above group means by group_wise(rule, ...)."
        )
    updates = dense(updates)
    for name, leaf in zip(leaf_names(updates), jax.tree.leaves(updates), strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"updates must hold floats, got {leaf.dtype} for {name!r}.")
    return updates


def read_contributions(updates: PyTree, weights: PyTree | None, encoding: Encoding) -> Contributions:
    """Reads the updates and weights of a round.

    Args:
      updates: tree with leaves `[C, ...]`.
      weights: `None`, `[C]`, or a tree of `[C]` leaves shaped like `updates`; 0 = dropped out, or layer left out.
      encoding: how updates become integers.

    Returns:
      `Contributions`. What a client that dropped out or a layer left out holds is never read.

    Raises:
      ValueError: if the client axes or the structures disagree.
    """
    count = num_clients(updates)
    claimed = jax.tree.leaves(per_leaf(claimed_weights(updates, weights), updates))
    leaves = [x.reshape(count, -1) for x in jax.tree.leaves(updates)]
    sent = [w > 0 for w in claimed]
    layered = by_layer(updates, weights)
    finite = [finite_rows(x) for x in leaves] if layered else [finite_rows(leaves)] * len(leaves)
    nonfinite = jnp.stack([s & ~f for s, f in zip(sent, finite, strict=True)]).any(axis=0)
    survived = jnp.stack(sent).any(axis=0) & ~nonfinite
    counts = [
        jnp.where(survived & s, jnp.clip(jnp.round(w), 1, encoding.max_weight), 0).astype(jnp.uint32)
        for s, w in zip(sent, claimed, strict=True)
    ]
    clipped = [_num_beyond(x, w > 0, encoding.clip) for x, w in zip(leaves, counts, strict=True)]
    return Contributions(leaves, counts, survived, nonfinite, jnp.stack(clipped).sum(axis=0, dtype=jnp.int32))


def _num_beyond(x: jax.Array, sent: jax.Array, clip: float | jax.Array) -> jax.Array:
    """`[C]` int32, numbers larger than the clip, a block of columns at a time: XLA:CPU would write them all down."""
    length = x.shape[1]
    width = min(length, _SMALL)

    def count(i: jax.Array, total: jax.Array) -> jax.Array:
        start = jnp.minimum(i * width, length - width)
        block = lax.dynamic_slice_in_dim(x, start, width, axis=1).astype(accumulator(x))
        is_new = start + jnp.arange(width, dtype=jnp.int32) >= i * width
        beyond = (jnp.abs(block) > jnp.asarray(clip, block.dtype)) & is_new[None]
        return total + beyond.sum(axis=1, dtype=jnp.int32)

    num_blocks = -(-length // width) if width else 0
    return jnp.where(sent, lax.fori_loop(0, num_blocks, count, jnp.zeros(x.shape[0], jnp.int32)), 0)


class Sums(NamedTuple):
    """What the server has after a round."""

    totals: list[jax.Array]
    """`[d]` each, `sum_i w_i x_i` over survivors in the accumulators' dtype; 0 if the round is refused."""
    weights: list[jax.Array]
    """Scalars, `sum_i w_i` over the survivors that uploaded the leaf; 0 if the round is refused."""
    ok: jax.Array
    """bool scalar, False if the round is refused."""


def sum_contributions(
    contributions: Contributions,
    work: Round,
    encoding: Encoding,
    key: jax.Array,
    members: jax.Array | None = None,
    present: jax.Array | None = None,
) -> Sums:
    """Encodes, masks, sums, unmasks and decodes, block of columns by block.

    Args:
      contributions: from `read_contributions`.
      work: the round, of as many clients as there are members.
      encoding: how updates become integers.
      key: PRNG key of stochastic rounding; row `i` draws from `fold_in(key, i)`.
      members: `[m]` int32, rows that take part; default: all.
      present: `[m]` bool, members whose uploads come; default: all that survived.

    Returns:
      `Sums`.
    """
    leaves, weights = contributions.leaves, contributions.weights
    if members is not None:
        assert present is not None
        weights = [jnp.where(present, w[members], 0) for w in weights]
    rows = jnp.arange(leaves[0].shape[0], dtype=jnp.int32) if members is None else members
    totals = [jnp.zeros(x.shape[1], accumulator(x)) for x in leaves]
    first = 0
    for group in _together(leaves):
        sizes = [leaves[i].shape[1] for i in group]
        flat = leaves[group[0]] if len(group) == 1 else jnp.concatenate([leaves[i] for i in group], axis=1)
        counts = jnp.stack([weights[i] for i in group], axis=1)
        owners = [jnp.full(size, place, jnp.int32) for place, size in enumerate(sizes)]
        columns = [flat] if len(group) == 1 else [flat, jnp.concatenate(owners)[None]]

        def of_block(block: jax.Array, x: jax.Array, *owner: jax.Array, counts: jax.Array = counts) -> jax.Array:
            multiples = counts[:, owner[0][0]] if owner else counts
            x = x if members is None else x[members]
            draws = _uniform(key, rows, block, x) if encoding.stochastic else None
            kept = jnp.where(multiples > 0, x, jnp.zeros((), x.dtype))
            integers = encode(kept, encoding.clip, encoding.num_bits, draws) * multiples
            total = work.sum_block(integers, block)
            return decode(total, encoding.clip, encoding.num_bits, accumulator(x))

        summed = walk_blocks(of_block, columns, first)
        first, start = first + flat.shape[1], 0
        for i, size in zip(group, sizes, strict=True):
            totals[i] = summed[start : start + size]
            start += size
    ok = work.recovery.ok
    known = [jnp.where(ok, w.sum(dtype=jnp.uint32), 0) for w in weights]
    return Sums(totals, known, ok)


def _together(leaves: list[jax.Array]) -> list[list[int]]:
    """Leaves that share blocks of columns: large ones alone, small ones of one dtype together."""
    alone = [[i] for i, leaf in enumerate(leaves) if leaf.shape[1] > _SMALL]
    small: dict[jnp.dtype, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if 0 < leaf.shape[1] <= _SMALL:
            small.setdefault(leaf.dtype, []).append(i)
    return [*alone, *small.values()]


def _uniform(key: jax.Array, rows: jax.Array, block: jax.Array, x: jax.Array) -> jax.Array:
    """`[C, B]` draws in [0, 1)."""

    def of_row(row: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, row), block)
        return jax.random.uniform(own, (x.shape[1],), accumulator(x))

    return jax.vmap(of_row)(rows)
