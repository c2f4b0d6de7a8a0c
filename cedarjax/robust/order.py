"""Coordinate-wise rules on one block of parameters, `[C, B]` to `[B]`, each column by itself.

All of them are weighted means of some of a column's numbers: the middle ones, those between two order statistics, those
nearest to a centre. Which ones is found by `weighted_quantiles`. `f` counts clients, whatever their weights; the mean
of the chosen ones is weighted. With few present clients the rules turn into the median by themselves.

The derivative with respect to an update is its share in that mean; which numbers are chosen is piecewise constant.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from cedarjax.core.dtypes import accumulator
from cedarjax.robust.quantiles import fold_rows, from_sortable, sortable, weighted_quantiles

_ROUNDING = 1e-6  # of half the mass: weights that should balance need not do so to the last bit


def _prepared(block: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The block in the accumulators' dtype, weights of at most 1, presence as 0 and 1, and how many are present."""
    x = block.astype(accumulator(block))
    w = jnp.where(weights > 0, weights, 0).astype(x.dtype)
    w = w / jnp.where(w.max() > 0, w.max(), 1)
    there = (w > 0).astype(x.dtype)
    return jnp.where((w > 0)[:, None], x, 0), w, there, there.sum()


def _share_of(numbers: jax.Array, chosen: jax.Array, w: jax.Array) -> jax.Array:
    """Of each number that is chosen, its share in their weighted mean; `[C, B]`."""
    mass = jnp.where(chosen, w[:, None], 0)
    total = mass.sum(axis=0)
    return mass / jnp.where(total > 0, total, 1)[None, :]


def _halves(x: jax.Array, w: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
    """Shares in the number midway between two medians, `[1, B]`."""
    return (_share_of(x, x == lower, w) + _share_of(x, x == upper, w)) / 2


def _differentiable(value: Callable[..., jax.Array], shares: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A rule whose derivative along `block` is the sum of the shares times the tangents."""

    @functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
    def rule(block: jax.Array, weights: jax.Array, count: int) -> jax.Array:
        return value(block, weights, count).astype(block.dtype)

    @rule.defjvp
    def rule_jvp(count: int, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        block, weights = primals
        out = rule(block, weights, count)
        share = lax.stop_gradient(shares(block, weights, count))
        tangent = (share * jnp.where(share != 0, tangents[0].astype(share.dtype), 0)).sum(axis=0)
        return out, tangent.astype(out.dtype)

    return rule


def _middle(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The lower and the upper weighted median of each column."""
    total = w.sum()
    equal = ((w == 0) | (w == 1)).all()
    half = jnp.where(equal, 0.5, 0.5 * (1 - _ROUNDING)) * total
    keys = sortable(x)
    (lower,) = weighted_quantiles(keys, w, [half])
    largest = jnp.iinfo(keys.dtype).max

    def add(total: tuple, key: jax.Array, mass: jax.Array) -> tuple:
        below = key <= lower
        above = jnp.where(below | (mass == 0), largest, key)
        return total[0] + jnp.where(below, mass, 0), jnp.minimum(total[1], above)

    upto, following = fold_rows(add, (jnp.zeros_like(x[0]), jnp.full_like(lower, largest)), keys, w)
    past = upto > jnp.where(equal, 0.5, 0.5 * (1 + _ROUNDING)) * total
    return from_sortable(lower), from_sortable(jnp.where(past | (following == largest), lower, following))


def _median(block: jax.Array, weights: jax.Array, count: int) -> jax.Array:
    x, w, _, n = _prepared(block, weights)
    lower, upper = _middle(x, w)
    return jnp.where(n > 0, lower / 2 + upper / 2, 0)


def _median_shares(block: jax.Array, weights: jax.Array, count: int) -> jax.Array:
    x, w, _, _ = _prepared(block, weights)
    lower, upper = _middle(x, w)
    return _halves(x, w, lower[None, :], upper[None, :])


def _trimming(x: jax.Array, w: jax.Array, n: jax.Array, f: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The smallest and the largest number that are not cut off, and whether these are the medians for want of more."""
    few, half = n <= 2 * f, 0.5 * w.sum()
    counts = (w > 0).astype(x.dtype)
    targets = [jnp.where(few, half * (1 - _ROUNDING), f + 1), jnp.where(few, half * (1 + _ROUNDING), n - f)]
    low, high = weighted_quantiles(sortable(x), jnp.where(few, w, counts), targets)
    return from_sortable(low), from_sortable(high), few


def _trimmed_shares(block: jax.Array, weights: jax.Array, f: int) -> jax.Array:
    x, w, there, n = _prepared(block, weights)
    low, high, few = _trimming(x, w, n, f)
    low, high, p = low[None, :], high[None, :], there[:, None]
    # Of numbers equal to an end, some are cut off and some are not: they share what is kept.
    at_low, at_high = jnp.where(x == low, p, 0), jnp.where(x == high, p, 0)
    between = jnp.where((x > low) & (x < high), p, 0)
    num_low = jnp.where(x <= low, p, 0).sum(axis=0) - f
    num_high = n - f - num_low - f - between.sum(axis=0)
    counted = (
        between
        + at_low * (num_low / jnp.maximum(at_low.sum(axis=0), 1))[None, :]
        + at_high * (num_high / jnp.maximum(at_high.sum(axis=0), 1))[None, :]
    )
    mass = jnp.where(low == high, at_low, counted) * w[:, None]
    total = mass.sum(axis=0)
    kept = mass / jnp.where(total > 0, total, 1)[None, :]
    return jnp.where(few, _halves(x, w, low, high), kept)


def _trimmed(block: jax.Array, weights: jax.Array, f: int) -> jax.Array:
    x, w, there, n = _prepared(block, weights)

    def of_equal_weights() -> jax.Array:
        low, high, few = _trimming(x, w, n, f)

        # What is cut off counts as the end that it lies beyond, and is taken off again: nothing large is subtracted.
        def add(total: tuple, row: jax.Array, p: jax.Array) -> tuple:
            return (total[0] + jnp.where(p > 0, jnp.clip(row, low, high) - low, 0),)

        (above,) = fold_rows(add, (jnp.zeros_like(low),), x, there)
        kept = low + (above - f * (high - low)) / jnp.maximum(n - 2 * f, 1)
        return jnp.where(n > 0, jnp.where(few, low / 2 + high / 2, kept), 0)

    def of_any_weights() -> jax.Array:
        return (_trimmed_shares(x, weights, f) * x).sum(axis=0)

    return lax.cond(((w == 0) | (w == 1)).all(), of_equal_weights, of_any_weights)


def _nearest(x: jax.Array, there: jax.Array, centre: jax.Array, num_kept: jax.Array) -> tuple:
    """Distances to a centre, and of the farthest kept one the distance."""
    distances = jnp.abs(x - centre[None, :])
    (radius,) = weighted_quantiles(sortable(distances), there, [num_kept])
    return distances, from_sortable(radius)


def nearest_shares(block: jax.Array, weights: jax.Array, centre: jax.Array, num_kept: jax.Array) -> jax.Array:
    """Share of every number in the weighted mean of those nearest to a centre.

    Args:
      block: `[C, B]`.
      weights: `[C]`, 0 = absent.
      centre: `[B]`.
      num_kept: how many clients' numbers are kept, between 1 and the present ones. Of numbers equally far those below
        the centre come first; numbers that are equal share what is kept of them.

    Returns:
      `[C, B]`; the columns add up to 1.
    """
    x, w, there, _ = _prepared(block, weights)
    distances, radius = _nearest(x, there, centre.astype(x.dtype), num_kept)
    p = there[:, None]
    inside = jnp.where(distances < radius[None, :], p, 0)
    rim = jnp.where(distances == radius[None, :], p, 0)
    below = jnp.where(x <= centre[None, :], rim, 0)
    above = rim - below
    left = num_kept - inside.sum(axis=0)
    num_below = jnp.minimum(left, below.sum(axis=0))
    counted = (
        inside
        + below * (num_below / jnp.maximum(below.sum(axis=0), 1))[None, :]
        + above * ((left - num_below) / jnp.maximum(above.sum(axis=0), 1))[None, :]
    )
    mass = counted * w[:, None]
    total = mass.sum(axis=0)
    return mass / jnp.where(total > 0, total, 1)[None, :]


def mean_of_nearest(block: jax.Array, weights: jax.Array, centre: jax.Array, num_kept: jax.Array) -> jax.Array:
    """Weighted mean of the numbers nearest to a centre.

    Args:
      block: as in `nearest_shares`.
      weights: as there.
      centre: as there.
      num_kept: as there.

    Returns:
      `[B]`, float32 or wider; 0 if nobody is present.

    Example:
      >>> import jax.numpy as jnp
      >>> block = jnp.array([[1.0], [2.0], [4.0], [50.0]])
      >>> mean_of_nearest(block, jnp.ones(4), jnp.array([3.0]), jnp.array(3.0))
      Array([2.3333333], dtype=float32)
    """
    x, w, there, n = _prepared(block, weights)
    centre = centre.astype(x.dtype)

    def of_equal_weights() -> jax.Array:
        distances, radius = _nearest(x, there, centre, num_kept)

        def add(total: tuple, row: jax.Array, distance: jax.Array, p: jax.Array) -> tuple:
            inside, below = (p > 0) & (distance < radius), (p > 0) & (distance == radius) & (row <= centre)
            above = (p > 0) & (distance == radius) & (row > centre)
            offset = row - centre
            return (
                total[0] + jnp.where(inside, p, 0),
                total[1] + jnp.where(inside, offset, 0),
                total[2] + jnp.where(below, p, 0),
                jnp.minimum(total[3], jnp.where(below, offset, jnp.inf)),
                jnp.maximum(total[4], jnp.where(above, offset, -jnp.inf)),
            )

        zeros = jnp.zeros_like(centre)
        num_inside, offsets, num_rim, below, above = fold_rows(
            add, (zeros, zeros, zeros, zeros + jnp.inf, zeros - jnp.inf), x, distances, there
        )
        left = num_kept - num_inside
        num_below = jnp.minimum(left, num_rim)
        rim = num_below * jnp.where(num_below > 0, below, 0)
        rim += (left - num_below) * jnp.where(left > num_below, above, 0)
        return centre + (offsets + rim) / jnp.maximum(num_kept, 1)

    def of_any_weights() -> jax.Array:
        return (nearest_shares(x, weights, centre, num_kept) * x).sum(axis=0)

    return jnp.where(n > 0, lax.cond(((w == 0) | (w == 1)).all(), of_equal_weights, of_any_weights), 0)


def _around(centre_of: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The mean of the `n - f` numbers nearest to a centre; the derivative is taken with the centre where it is.

    With too few clients for that it is the centre, which then is the median.
    """

    def value(block: jax.Array, weights: jax.Array, f: int) -> jax.Array:
        x, _, _, n = _prepared(block, weights)
        centre = centre_of(x, weights, f)
        return jnp.where(n > 2 * f, mean_of_nearest(x, weights, centre, jnp.maximum(n - f, 1)), centre)

    def shares(block: jax.Array, weights: jax.Array, f: int) -> jax.Array:
        x, _, _, n = _prepared(block, weights)
        return lax.cond(
            n > 2 * f,
            lambda: nearest_shares(x, weights, centre_of(x, weights, f), jnp.maximum(n - f, 1)),
            lambda: _median_shares(x, weights, f),
        )

    return _differentiable(value, shares)


_median_rule = _differentiable(_median, _median_shares)


def median_of(block: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted median of every column; midway between the two middle numbers where the mass is cut in half.

    Args:
      block: `[C, B]`.
      weights: `[C]`, 0 = absent, whose numbers may be anything.

    Returns:
      `[B]` in the dtype of `block`; 0 if nobody is present.

    Example:
      >>> import jax.numpy as jnp
      >>> print(median_of(jnp.array([[1.0], [9.0], [2.0], [jnp.nan]]), jnp.array([1.0, 1.0, 0.0, 0.0])))
      [5.]
    """
    return _median_rule(block, weights, 0)


_trimmed_rule = _differentiable(_trimmed, _trimmed_shares)


def trimmed_mean_of(block: jax.Array, weights: jax.Array, f: int) -> jax.Array:
    """Weighted mean of every column without its `f` smallest and its `f` largest numbers.

    Args:
      block: `[C, B]`.
      weights: `[C]`, 0 = absent, whose numbers may be anything.
      f: numbers cut off at each end; the result is the median where there are not enough.

    Returns:
      `[B]` in the dtype of `block`; 0 if nobody is present.

    Example:
      >>> import jax.numpy as jnp
      >>> print(trimmed_mean_of(jnp.array([[1.0], [9.0], [2.0], [4.0]]), jnp.ones(4), f=1))
      [3.]
    """
    return _trimmed_rule(block, weights, f)


mean_around_median = _around(_median)
"""`mean_around_median(block, weights, f)`: weighted mean of the `n - f` numbers of a column nearest to its median."""

mean_around_trimmed_mean = _around(_trimmed)
"""The same around the trimmed mean."""
