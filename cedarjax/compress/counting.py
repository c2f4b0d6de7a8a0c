"""Which numbers are the `k` largest, found by counting and without sorting.

How many numbers lie above `t`? One comparison and one addition a number tell, at the full speed of a vector unit, where
XLA's sort on a CPU takes hundreds of times as long. Probes follow the slope of the counts, with one in eight
put half-way between bit patterns, so that no data need more than a few dozen; the usual ones need five. The first probe
into a long vector comes from a search in a sample of its numbers. Magnitudes are compared as the integers that are
ordered as they are.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_LONG = 2**15  # numbers, from which on a sample is searched first
_SAMPLE = 8192
_HALVING = 8  # one probe in so many is put half-way between bit patterns
_EXACT = 2**24  # numbers that float32 counts exactly


class Bracket(NamedTuple):
    """Where the threshold lies: more numbers than wanted are above `low`, not more than wanted above `high`."""

    low: jax.Array
    """Key, or -1."""
    above_low: jax.Array
    """float32, numbers above `low`."""
    high: jax.Array
    """Key."""
    above_high: jax.Array
    """float32, numbers above `high`."""


def magnitude_keys(vector: jax.Array) -> jax.Array:
    """Integers that are ordered as the magnitudes are; NaN is the largest.

    Args:
      vector: float32 or float64.

    Returns:
      int32 or int64, at least 0.
    """
    integer = jnp.int64 if vector.dtype.itemsize == 8 else jnp.int32
    return lax.bitcast_convert_type(vector, integer) & jnp.asarray(jnp.iinfo(integer).max, integer)


def _magnitude(key: jax.Array) -> jax.Array:
    """The magnitude of a key, as a float; 0 for -1."""
    floating = jnp.float64 if key.dtype.itemsize == 8 else jnp.float32
    return lax.bitcast_convert_type(jnp.maximum(key, 0), floating)


def count(condition: jax.Array) -> jax.Array:
    """How many are true, in float32; exact up to 2^24, and to rounding from there.

    Args:
      condition: `[d]` bool.

    Returns:
      float32 scalar.
    """
    if condition.shape[0] >= _EXACT:
        return jnp.sum(condition, dtype=jnp.int32).astype(jnp.float32)
    return jnp.sum(condition.astype(jnp.float32))  # XLA:CPU adds floats faster than integers


def count_finite(condition: jax.Array, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many are true, and whether their numbers are finite, in one pass.

    Args:
      condition: `[d]` bool.
      vector: `[d]` numbers.

    Returns:
      float32 scalar, as `count`, and undefined if some are not finite; and bool scalar.
    """
    nothing = (vector * 0.0).astype(jnp.float32)  # NaN for what is not finite
    if condition.shape[0] >= _EXACT:
        return count(condition), jnp.isfinite(jnp.sum(jnp.where(condition, nothing, 0.0)))
    number = jnp.sum(jnp.where(condition, 1.0 + nothing, 0.0))
    return number, jnp.isfinite(number)


def narrow(
    keys: jax.Array, bracket: Bracket, fewest: float, most: float, probe: jax.Array, decay: jax.Array
) -> tuple[Bracket, jax.Array]:
    """Narrows a bracket until between `fewest` and `most` keys lie above its upper end, or nothing fits in between.

    Far from the goal, counts are taken to fall exponentially with the magnitude, as those of long tails do; near it, a
    straight line through the ends of the bracket tells more.

    Args:
      keys: `[d]`, from `magnitude_keys`.
      bracket: ends that need not be keys of the vector; counts that are right.
      fewest: keys wanted above the upper end.
      most: keys allowed there.
      probe: magnitude of the first probe.
      decay: logarithm of the counts lost for each unit of magnitude about there, a first guess above 0.

    Returns:
      The bracket, and the last decay.
    """
    goal = 0.5 * (fewest + most)
    floating = _magnitude(bracket.high).dtype

    def go_on(state: tuple) -> jax.Array:
        bracket = state[0]
        return (bracket.above_high < fewest) & (bracket.high - 1 > bracket.low)

    def step(state: tuple) -> tuple:
        bracket, probe, decay, last, above_last, index = state
        half_way = (bracket.low & bracket.high) + ((bracket.low ^ bracket.high) >> 1)
        wanted = magnitude_keys(jnp.maximum(probe, 0.0))
        key = jnp.where((index % _HALVING == _HALVING - 1) | ~jnp.isfinite(probe), half_way, wanted)
        key = jnp.clip(key, bracket.low + 1, bracket.high - 1)
        above = count(keys > key)
        many = above > most
        bracket = Bracket(
            low=jnp.where(many, key, bracket.low),
            above_low=jnp.where(many, above, bracket.above_low),
            high=jnp.where(many, bracket.high, key),
            above_high=jnp.where(many, bracket.above_high, above),
        )
        here = _magnitude(key)
        fallen = (jnp.log(above_last + 0.5) - jnp.log(above + 0.5)).astype(floating) / (here - last)
        decay = jnp.where((fallen > 0) & jnp.isfinite(fallen), fallen, decay)
        # A little beyond the goal, so that the next probe closes the bracket from the other side.
        beyond = jnp.where(many, -0.5, 0.5) * jnp.sqrt(jnp.abs(above - goal))
        aim = jnp.clip(goal + beyond, 0.5 * goal, 1.5 * goal + 1.0)
        outside = here + (jnp.log(above + 0.5) - jnp.log(aim + 0.5)).astype(floating) / decay
        low, high = _magnitude(bracket.low), _magnitude(bracket.high)
        share = (bracket.above_low - goal) / (bracket.above_low - bracket.above_high)
        inside = low + share.astype(floating) * (high - low)
        near = (bracket.above_low <= 1.5 * goal + 1.0) & (bracket.above_high >= 0.5 * goal - 1.0)
        return bracket, jnp.where(near, inside, outside), decay, here, above, index + 1

    start = (bracket, probe, decay, probe - probe, bracket.above_low, jnp.zeros((), jnp.int32))
    state = lax.while_loop(go_on, step, start)
    return state[0], state[2]


def _searched(keys: jax.Array, fewest: float, most: float) -> tuple[Bracket, jax.Array]:
    """The search from the start, between 0 and the largest."""
    size = keys.shape[0]
    largest = jnp.max(keys)
    bracket = Bracket(
        low=jnp.full((), -1, keys.dtype),
        above_low=jnp.asarray(float(size), jnp.float32),
        high=largest,
        above_high=jnp.zeros((), jnp.float32),
    )
    # As if magnitudes were exponential: the largest of d is at log d, and the fraction p begins at log 1 / p.
    decay = math.log(size + 1.0) / _magnitude(largest)
    return narrow(keys, bracket, fewest, most, math.log(size / max(0.5 * (fewest + most), 0.5)) / decay, decay)


def largest(vector: jax.Array, num_chosen: int) -> jax.Array:
    """Marks the `k` numbers of largest magnitude; of equal ones, those of lowest index.

    Zeros are all alike: where fewer than `k` numbers are not 0, all zeros are marked.

    Args:
      vector: `[d]` float32 or float64. NaN counts as the largest.
      num_chosen: `k`, `1 <= k <= d`.

    Returns:
      `[d]` bool.

    Example:
      >>> import jax.numpy as jnp
      >>> print(largest(jnp.array([1.0, -3.0, 2.0, 3.0, -2.0]), 3))
      [False  True  True  True False]
    """
    size = vector.shape[0]
    if num_chosen >= size:
        return jnp.ones(size, bool)
    goal = float(num_chosen)
    keys = magnitude_keys(lax.stop_gradient(vector))
    if size < _LONG:
        bracket, _ = _searched(keys, goal, goal)
    else:
        stride = (size // _SAMPLE) | 1  # odd, so that it meets all columns of a matrix
        sample = keys[::stride]
        share = sample.shape[0] / size
        spread = 0.5 * (goal * share) ** 0.5  # what a sample says is not more certain
        guess, decay = _searched(sample, max(goal * share - spread, 0.0), goal * share + spread)
        probe = _magnitude(guess.high)
        bracket = Bracket(
            low=jnp.full((), -1, keys.dtype),
            above_low=jnp.asarray(float(size), jnp.float32),
            high=jnp.asarray(jnp.iinfo(keys.dtype).max, keys.dtype),
            above_high=jnp.zeros((), jnp.float32),
        )
        bracket, _ = narrow(keys, bracket, goal, goal, probe, decay)
    end = _last_of_equals(keys, bracket, goal)
    return (keys > bracket.high) | ((keys == bracket.high) & (lax.iota(jnp.int32, size) < end))


def _last_of_equals(keys: jax.Array, bracket: Bracket, goal: float) -> jax.Array:
    """Where the numbers equal to the upper end stop being marked: 0 unless some of them are needed."""
    size = keys.shape[0]
    missing = goal - bracket.above_high
    equals = bracket.above_low - bracket.above_high
    all_or_none = (missing == 0) | (missing >= equals) | (bracket.high == 0)
    end = jnp.where(missing == 0, 0, size).astype(jnp.int32)
    low = jnp.where(all_or_none, end, 0)

    def halve(ends: tuple) -> tuple:
        low, high = ends
        middle = low + (high - low) // 2
        found = count((keys == bracket.high) & (lax.iota(jnp.int32, size) < middle))
        return jnp.where(found < missing, middle + 1, low), jnp.where(found < missing, high, middle)

    return lax.while_loop(lambda ends: ends[0] < ends[1], halve, (low, end))[1]
