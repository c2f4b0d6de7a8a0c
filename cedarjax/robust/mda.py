"""Minimum-diameter averaging: the `n - f` updates that lie closest together.

References: Rousseeuw, *Multivariate Estimation with High Breakdown Point*, 1985; El Mhamdi et al., `Genuinely
Distributed Byzantine Machine Learning <https://arxiv.org/abs/1905.03853>`_, 2019; guarantee from Farhadkhani et al.,
`Byzantine Machine Learning Made Easy by Resilient Averaging of Momentums <https://arxiv.org/abs/2205.12173>`_, 2022.
The subset of least diameter is not looked for among all `n! / (f! (n - f)!)`: whatever the subset, of the two clients
that lie farthest apart one has to go, so `f` times a choice of two, `2^f` leaves in all, contain it.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from cedarjax.core.types import Aggregator
from cedarjax.robust.gram import from_gram
from cedarjax.robust.selection import check_num_byzantine, distances_of, lowest, mean_over

_MAX_SUBSETS = 200_000
_MAX_WORK = 2**28  # numbers that the search looks at
_BLOCK = 2**20


def is_exact(num_clients: int, f: int) -> bool:
    """Whether `mda` finds the subset of least diameter or an approximation.

    Args:
      num_clients: `C`.
      f: number of attackers.

    Returns:
      True if there are at most 200,000 subsets, or `2^f C^2 <= 2^28`: for 100 clients up to `f = 14`.

    Example:
      >>> is_exact(100, 10), is_exact(100, 20)
      (True, False)
    """
    return math.comb(num_clients, f) <= _MAX_SUBSETS or 2**f * num_clients**2 <= _MAX_WORK


def least_diameter(distances: jax.Array, present: jax.Array, f: int) -> jax.Array:
    """The subset of all but `f` present clients whose greatest distance is least; of equal ones the first.

    Subsets are ordered by their clients in ascending order, the way dictionaries order words. Diameters that differ by
    rounding are equal.

    Args:
      distances: `[C, C]`, symmetric.
      present: `[C]` bool, of more than `2 f`.
      f: how many are left out; the cost is `2^f C^2`.

    Returns:
      `[C]` bool.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([0.0, 9.0, 1.0, 2.0])
      >>> least_diameter(jnp.abs(x[:, None] - x[None, :]), jnp.ones(4, bool), 1).tolist()
      [True, False, True, True]
    """
    count = present.size
    distances = jnp.where(present[:, None] & present[None, :], distances, 0)

    def farthest(kept: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        among = jnp.where(kept[:, None] & kept[None, :], distances, -1)
        by_client = among.max(axis=1)
        first = jnp.argmax(by_client)
        return by_client.max(), first, jnp.argmax(among[first])

    # `steps[i]` is the depth at which a client goes, f for those who stay; `diameters` are those met on the way.
    steps = jnp.full((1, count), f, jnp.int32)
    diameters: list[jax.Array] = []
    clients = jnp.arange(count, dtype=jnp.int32)[None, :]
    batch_size = max(1, _BLOCK // count**2)
    for depth in range(f + 1):
        kept = (steps == f) & present[None, :]
        diameter, *pair = lax.map(farthest, kept, batch_size=min(batch_size, kept.shape[0]))
        diameters = [*diameters, diameter]
        if depth < f:
            steps = jnp.concatenate([jnp.where(clients == i[:, None].astype(jnp.int32), depth, steps) for i in pair])
            diameters = [jnp.concatenate([d, d]) for d in diameters]
    tolerance = 1 + 16 * jnp.finfo(distances.dtype).eps
    bound = diameters[-1].min() * tolerance
    # Who has to go on this path to meet the bound; the rest of the f are the last ones.
    needed = jnp.stack([d > bound for d in diameters], axis=1)
    forced = (steps < f) & jnp.take_along_axis(needed, steps, axis=1)
    free = present[None, :] & ~forced
    missing = f - forced.sum(axis=1, dtype=jnp.int32)
    behind = jnp.flip(jnp.cumsum(jnp.flip(free.astype(jnp.int32), axis=1), axis=1), axis=1)
    kept = free & (behind > missing[:, None])
    return _first(kept, diameters[-1] <= bound)


def _first(kept: jax.Array, valid: jax.Array) -> jax.Array:
    """Of the valid rows of `kept` `[L, C]` the one that has the first clients."""

    def narrow(client: int, left: jax.Array) -> jax.Array:
        having = left & kept[:, client]
        return jnp.where(having.any(), having, left)

    return kept[jnp.argmax(lax.fori_loop(0, kept.shape[1], narrow, valid))]


def nearest_around_one(distances: jax.Array, present: jax.Array, f: int) -> jax.Array:
    """The `n - f` clients nearest to the one for which the farthest of them is nearest.

    Args:
      distances: `[C, C]`.
      present: `[C]` bool.
      f: how many are left out.

    Returns:
      `[C]` bool. Their diameter is at most twice the least, since no subset is narrower than the radius about one of
      its members.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([0.0, 9.0, 1.0, 2.0])
      >>> nearest_around_one(jnp.abs(x[:, None] - x[None, :]), jnp.ones(4, bool), 1).tolist()
      [True, False, True, True]
    """
    distances = jnp.where(present[:, None] & present[None, :], distances, jnp.inf)
    size = present.sum(dtype=jnp.int32) - f
    radii = jnp.sort(distances, axis=1)[:, jnp.maximum(size - 1, 0)]
    centre = jnp.argmin(jnp.where(present, radii, jnp.inf))
    return lowest(distances[centre], size)


def mda(f: int) -> Aggregator:
    """The mean of the `n - f` updates of least diameter, the greatest distance between two of them.

    Of equally wide subsets the first, in the order of `itertools.combinations`; there are often several, since it may
    decide nothing which end of the longest distance goes, and then the order of the clients matters. The choice is
    exact where `is_exact` says so, which only `C` and `f` decide; beyond that it is `nearest_around_one`, no more than
    twice as wide as need be, at a cost of `C^2 log C`.

    Guarantee: an `(f, lambda)`-resilient averaging with `lambda <= 2 f / (n - f)` where it is exact (Farhadkhani et al.
    2022): the result is no farther from the mean of any `n - f` updates than `lambda` times their diameter. With
    `f = 0` it is the mean. It moves and scales along with the updates.

    Args:
      f: number of attackers to withstand; `2 f < n` for `n` present clients.

    Returns:
      An `Aggregator`, see `from_gram` for what it reads, how absent and non-finite clients and masked layers are
      treated, and what it falls back to; the mean is weighted, the choice is not.

    Raises:
      ValueError: if `f` is negative (here), or there are too few clients for it (when `update` is traced).
      TypeError: if `f` is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = mda(f=1)
      >>> updates = {"a": jnp.array([1.0, 2.0, 3.0, 900.0])}
      >>> print(rule.update(updates, rule.init({"a": jnp.zeros(())}))[0])
      {'a': Array(2., dtype=float32)}
    """
    check_num_byzantine(f)

    def rule(gram: jax.Array, weights: jax.Array) -> jax.Array:
        present = weights > 0
        choose = least_diameter if is_exact(weights.size, f) else nearest_around_one
        return mean_over(choose(distances_of(gram, present), present, f), weights)

    return from_gram(rule, min_clients=2 * f + 1, condition="2 * f < num_clients", f=f)
