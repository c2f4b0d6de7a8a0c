"""Exact quantiles of every column, over rows that carry masses, without sorting.

The smallest number up to which the rows of a column add up to a given mass is found by probing: how much mass lies at
or below `t`? Probes are interpolated between the ends of a bracket, and every so often put half-way between their bit
patterns, so that no data need more than a few dozen. All columns of a block are probed at once, each at a `t` of its
own, and one comparison and one addition a number make a probe, which vector units do at full speed; XLA's sort along
clients costs a CPU a hundred times as much. Numbers are compared as the integers that are ordered as they are.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from cedarjax.core.columns import on_cpu

Total = TypeVar("Total")
_UNROLLED = 5  # rows in one pass of the loop over rows
_LOOSE = 12  # probes that only count, before those that look for the next numbers of the column too
_HALVING = 8  # one probe in as many is put half-way between bit patterns


def sortable(x: jax.Array) -> jax.Array:
    """Integers that are ordered as floats are; `-0.0` comes before `0.0`.

    Args:
      x: float32 or float64, no NaN.

    Returns:
      int32 or int64 of the same shape.

    Example:
      >>> import jax.numpy as jnp
      >>> keys = sortable(jnp.array([-jnp.inf, -1.0, 0.0, 2.0]))
      >>> print((keys[1:] > keys[:-1]).all(), from_sortable(keys))
      True [-inf  -1.   0.   2.]
    """
    integer = jnp.int64 if x.dtype.itemsize == 8 else jnp.int32
    bits = lax.bitcast_convert_type(x, integer)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(integer).max, bits)


def from_sortable(keys: jax.Array) -> jax.Array:
    """The inverse of `sortable`.

    Args:
      keys: int32 or int64.

    Returns:
      float32 or float64 of the same shape.
    """
    bits = jnp.where(keys < 0, keys ^ jnp.iinfo(keys.dtype).max, keys)
    return lax.bitcast_convert_type(bits, jnp.float64 if keys.dtype.itemsize == 8 else jnp.float32)


def fold_rows(add: Callable[..., Total], init: Total, *rows: jax.Array) -> Total:
    """Folds a function over the rows of arrays, a few rows a pass.

    Args:
      add: `add(total, *row) -> total`.
      init: the total before the first row.
      *rows: arrays `[C, ...]`.

    Returns:
      The total after the last row.
    """
    count = rows[0].shape[0]

    def some(index: jax.Array, total: Total) -> Total:
        for i in range(_UNROLLED):
            total = add(total, *(lax.dynamic_index_in_dim(x, index * _UNROLLED + i, keepdims=False) for x in rows))
        return total

    total = lax.fori_loop(0, count // _UNROLLED, some, init)
    for i in range(count // _UNROLLED * _UNROLLED, count):
        total = add(total, *(x[i] for x in rows))
    return total


# A bracket is `(low, high, below, upto)`, each `[B]`: the sought number lies in `[low, high]`; `below` is the mass of
# the rows below `low`, `upto` that of the rows up to `high`.
def _probe(bracket: tuple[jax.Array, ...], target: jax.Array, least: jax.Array, index: jax.Array) -> jax.Array:
    low, high, below, upto = bracket
    share = (target - below - 0.5 * least) / jnp.where(upto > below, upto - below, 1)
    between = sortable(from_sortable(low) * (1 - share) + from_sortable(high) * share)
    half_way = (low & high) + ((low ^ high) >> 1)
    probe = jnp.where(index % _HALVING == _HALVING - 1, half_way, between)
    return jnp.maximum(jnp.minimum(probe, high - 1), low)


def _found(bracket: tuple[jax.Array, ...], target: jax.Array, least: jax.Array) -> jax.Array:
    """Whether the sought number is an end of the bracket: nothing that weighs less than `least` fits beside it."""
    low, high, below, upto = bracket
    return (low >= high) | (target <= below + least) | (target > upto - least)


def weighted_quantiles(keys: jax.Array, masses: jax.Array, targets: Sequence[jax.Array]) -> list[jax.Array]:
    """The smallest number of each column up to which the rows add up to a target mass.

    Args:
      keys: `[C, B]`, as `sortable` makes them.
      masses: `[C]`, at least 0, and 0 for rows that are not there, whose keys are not read. Sums of masses are best
        exact: ones, or small integers.
      targets: scalars of the dtype of `masses`, above 0 and up to the sum of the masses.

    Returns:
      `[B]` keys for each target; they mean nothing if no row is there.

    Example:
      >>> import jax.numpy as jnp
      >>> keys = sortable(jnp.array([[7.0], [1.0], [3.0], [jnp.inf]]))
      >>> (median,) = weighted_quantiles(keys, jnp.array([1.0, 1.0, 1.0, 0.0]), [jnp.array(2.0)])
      >>> print(from_sortable(median))
      [3.]
    """
    # A search has no derivative, and loops of unknown length cannot be transposed.
    keys, masses = lax.stop_gradient(keys), lax.stop_gradient(masses)
    least_key, largest_key = jnp.iinfo(keys.dtype).min, jnp.iinfo(keys.dtype).max
    width = keys.shape[1]
    there = masses > 0
    keys = jnp.where(there[:, None], keys, largest_key)
    least = jnp.where(there, masses, jnp.inf).min()
    total = masses.sum()
    wanted = [jnp.asarray(target, masses.dtype) for target in targets]
    empty = jnp.zeros(width, masses.dtype)
    highest, lowest = jnp.full(width, least_key, keys.dtype), jnp.full(width, largest_key, keys.dtype)
    passes = _by_row if on_cpu() else _at_once

    def next_bracket(bracket: tuple, target: jax.Array, mass: jax.Array, up: jax.Array, down: jax.Array) -> tuple:
        low, high, below, upto = bracket
        enough = mass >= target
        return (
            jnp.where(enough, low, up),
            jnp.where(enough, down, high),
            jnp.where(enough, below, mass),
            jnp.where(enough, mass, upto),
        )

    def go_on(most: int, state: tuple) -> jax.Array:
        index, brackets = state
        found = [_found(b, target, least).all() for b, target in zip(brackets, wanted, strict=True)]
        return (index < most) & ~jnp.stack(found).all()

    def loosely(state: tuple) -> tuple:
        index, brackets = state
        probes = [_probe(b, target, least, index) for b, target in zip(brackets, wanted, strict=True)]
        counted = passes(_count, [(empty,)] * len(probes), probes, keys, masses)
        return index + 1, [
            next_bracket(b, target, mass, t + 1, t)
            for b, target, (mass,), t in zip(brackets, wanted, counted, probes, strict=True)
        ]

    def closely(state: tuple) -> tuple:
        index, brackets = state
        probes = [_probe(b, target, least, index) for b, target in zip(brackets, wanted, strict=True)]
        counted = passes(_count_beside, [(empty, highest, lowest)] * len(probes), probes, keys, masses)
        return index + 1, [
            next_bracket(b, target, mass, up, down)
            for b, target, (mass, down, up) in zip(brackets, wanted, counted, strict=True)
        ]

    def ends(brackets: list) -> list:
        """The brackets with the numbers of the column for ends that lie between them."""
        found = passes(_ends, [(lowest, highest)] * len(brackets), [b[:2] for b in brackets], keys, masses)
        return [(*new, *b[2:]) for new, b in zip(found, brackets, strict=True)]

    whole = (
        jnp.full(width, least_key, keys.dtype),
        jnp.full(width, largest_key - 1, keys.dtype),
        empty,
        empty + total,
    )
    first = ends([whole])[0]
    start = jnp.zeros((), jnp.int32)
    _, brackets = lax.while_loop(functools.partial(go_on, _LOOSE), loosely, (start, [first] * len(wanted)))
    most = _HALVING * 8 * keys.dtype.itemsize  # bits
    _, brackets = lax.while_loop(functools.partial(go_on, most), closely, (start, ends(brackets)))
    return [
        jnp.where(target <= below + least, low, high)
        for target, (low, high, below, _) in zip(wanted, brackets, strict=True)
    ]


def _count(total: tuple, t: jax.Array, row: jax.Array, mass: jax.Array) -> tuple:
    return (total[0] + jnp.where(row <= t, mass, 0),)


def _count_beside(total: tuple, t: jax.Array, row: jax.Array, mass: jax.Array) -> tuple:
    """Besides: the largest key up to `t` and the smallest one above."""
    below = row <= t
    info = jnp.iinfo(row.dtype)
    return (
        total[0] + jnp.where(below, mass, 0),
        jnp.maximum(total[1], jnp.where(below, row, info.min)),
        jnp.minimum(total[2], jnp.where(below, info.max, row)),
    )


def _ends(total: tuple, between: tuple, row: jax.Array, mass: jax.Array) -> tuple:
    """The smallest and the largest key between two others."""
    low, high = between
    info = jnp.iinfo(row.dtype)
    return (
        jnp.minimum(total[0], jnp.where(row >= low, row, info.max)),
        jnp.maximum(total[1], jnp.where(row <= high, row, info.min)),
    )


def _by_row(add: Callable, inits: list, queries: list, keys: jax.Array, masses: jax.Array) -> list:
    """All queries of a block in one loop over its rows: totals and queries stay in the fastest cache."""

    def each(totals: list, row: jax.Array, mass: jax.Array) -> list:
        return [add(total, query, row, mass) for total, query in zip(totals, queries, strict=True)]

    return fold_rows(each, inits, keys, masses)


def _at_once(add: Callable, inits: list, queries: list, keys: jax.Array, masses: jax.Array) -> list:
    """The same as reductions over the client axis, for accelerators."""
    reductions = {_count: (jnp.sum,), _count_beside: (jnp.sum, jnp.max, jnp.min), _ends: (jnp.min, jnp.max)}[add]

    def one(init: tuple, query: jax.Array | tuple) -> tuple:
        one_row = tuple(x[None] for x in init)
        terms = add(one_row, jax.tree.map(lambda x: x[None], query), keys, masses[:, None])
        return tuple(reduce(term, axis=0) for reduce, term in zip(reductions, terms, strict=True))

    return [one(init, query) for init, query in zip(inits, queries, strict=True)]
