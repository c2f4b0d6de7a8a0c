"""Bucketing: a rule sees the means of random groups, which are more alike than single clients.

Reference: Karimireddy et al., `Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing
<https://arxiv.org/abs/2006.09365>`_, 2022.
"""

import jax
import jax.numpy as jnp
import optax

from cedarjax.core.dtypes import accumulator
from cedarjax.core.types import Aggregator
from cedarjax.robust.presence import Presence
from cedarjax.robust.selection import num_present
from cedarjax.robust.wrap import Mixing, wrap


def random_buckets(present: jax.Array, size: int, key: jax.Array) -> jax.Array:
    """Deals the present clients into buckets.

    Args:
      present: `[C]` bool.
      size: clients in a bucket; the last one may have fewer.
      key: randomness. The draws belong to the present clients in their order, so absent ones change nothing.

    Returns:
      `[C]` int32, the number of each client's bucket; `C` for absent clients.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> random_buckets(jnp.array([True, False, True, True]), 2, jax.random.key(0)).tolist()
      [0, 4, 0, 1]
    """
    count = present.size
    place = jnp.cumsum(present, dtype=jnp.int32) - 1
    draws = jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(key, i)))(place)
    # A tie between draws, once in billions, goes to the earlier place.
    drawn_before = (draws[None, :] < draws[:, None]) | (
        (draws[None, :] == draws[:, None]) & (place[None, :] < place[:, None])
    )
    rank = (drawn_before & present[None, :]).sum(axis=1, dtype=jnp.int32)
    return jnp.where(present, rank // size, count)


def bucketing(s: int, rule: optax.GradientTransformation) -> Aggregator:
    """Hands a rule the weighted means of random buckets of `s` clients, whose weights are those of their clients.

    A rule inside must withstand as many buckets as there are attackers: each may spoil one. With `s = 1` the rule gets
    the updates in another order. The law of order holds in distribution only: who shares a bucket with whom follows the
    clients' places and the key.

    Args:
      s: clients in a bucket, at least 1; the last bucket may have fewer.
      rule: an aggregator; it gets `ceil(C / s)` rows.

    Returns:
      An `Aggregator` with a `WrapState`. It reads `key=`, `weights=` (`[C]`, a tree of `[C]` leaves, or `None`) and
      `mesh=`.

    Raises:
      ValueError: if `s` is less than 1 (here) or there is no `key` (when `update` is traced).
      TypeError: if `s` is not an int or `rule` is not an optax transformation.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cedarjax.robust import median
      >>> rule = bucketing(2, median())
      >>> updates = {"a": jnp.array([1.0, 2.0, 3.0, 4.0, 5.0, 900.0])}
      >>> update, _ = rule.update(updates, rule.init({"a": jnp.zeros(())}), key=jax.random.key(1))
      >>> print(update["a"] < 5)
      True
    """
    if isinstance(s, bool) or not isinstance(s, int):
        raise TypeError(f"s must be an int, got {s!r}.")
    if s < 1:
        raise ValueError(f"s must be at least 1, got {s}.")

    def mix(presence: Presence, weights: jax.Array, key: jax.Array | None) -> Mixing:
        if key is None:
            raise ValueError("key must be given to deal the clients into buckets; got None.")
        count = presence.present.size
        num_buckets = -(-count // s)
        bucket = random_buckets(presence.present, s, key)
        kept = jnp.where(presence.present, weights, 0).astype(accumulator(weights))
        mine = bucket[None, :] == jnp.arange(num_buckets, dtype=jnp.int32)[:, None]
        mass = jnp.where(mine, kept[None, :], 0)
        total = mass.sum(axis=1)
        matrix = mass / jnp.where(total > 0, total, 1)[:, None]
        return Mixing(matrix, total, num_present(kept) > 0)

    return wrap(rule, mix, reads="weights", means=True)
