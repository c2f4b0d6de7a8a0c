"""Robust rules above secure sums: the rule sees the means of random groups, each of which is a secure sum of its own.

Reference: Velicheti et al., `Secure Byzantine-Robust Distributed Learning via Clustering
<https://arxiv.org/abs/2110.02940>`_, 2021: clients are clustered at random, each cluster is averaged securely, and the
averages are filtered. One attacker spoils the mean of its group, so a rule that withstands `f` bad rows withstands `f`
attackers, and groups must be many enough for the rule: `num_groups > 2 f`. Fewer clients hide behind each mean the more
groups there are: this is what robustness costs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cedarjax.core.axis import by_layer, num_clients
from cedarjax.core.told import take_info
from cedarjax.core.types import Aggregator, PyTree
from cedarjax.privacy.secure_aggregation.aggregator import SecureInfo, check_options, in_shape, split_key, tell
from cedarjax.privacy.secure_aggregation.contributions import (
    Encoding,
    Sums,
    read_contributions,
    sum_contributions,
    uploads_of,
)
from cedarjax.privacy.secure_aggregation.protocol import check_threshold
from cedarjax.privacy.secure_aggregation.sums import Round, make_ring


class GroupInfo(NamedTuple):
    """What a round of secure sums in groups tells."""

    secure: SecureInfo
    """Of the clients; `ok` is False if any group was refused."""
    group: jax.Array
    """`[C]` int32, the group of each client."""
    num_refused: jax.Array
    """int32 scalar, groups that were refused and are absent."""
    ok: jax.Array
    """bool scalar, False if every group was refused, or the rule says so of its rows."""


class GroupState(NamedTuple):
    """State of `group_wise`."""

    rule: PyTree
    """State of the rule."""
    info: GroupInfo | None = None
    """What the last round tells; `None` after `init`."""


def random_groups(present: jax.Array, num_groups: int, key: jax.Array) -> jax.Array:
    """Deals clients into groups of equal size, those that are present first.

    Args:
      present: `[C]` bool.
      num_groups: `K`.
      key: randomness. The draws belong to the present clients in their order, so absent ones change nothing.

    Returns:
      `[K, ceil(C / K)]` int32, the clients of each group; `C` where a group has one less.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> groups = random_groups(jnp.array([True, False, True, True, True]), 2, jax.random.key(0))
      >>> sorted(groups.reshape(-1).tolist())
      [0, 1, 2, 3, 4, 5]
    """
    count = present.shape[0]
    place = jnp.cumsum(present, dtype=jnp.int32) - 1
    draws = jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(key, i), dtype=jnp.uint32))(place)
    dealt = jnp.lexsort((draws, ~present)).astype(jnp.int32)
    size = -(-count // num_groups)
    return jnp.pad(dealt, (0, size * num_groups - count), constant_values=count).reshape(size, num_groups).T


def group_wise(
    rule: optax.GradientTransformation,
    num_groups: int,
    clip: float | jax.Array,
    *,
    num_bits: int = 16,
    max_weight: int = 1,
    threshold: int | None = None,
    num_neighbors: int | None = None,
    stochastic: bool = False,
) -> Aggregator:
    """Hands a rule the means of random groups of clients, each mean by way of a secure sum.

    A row's weight is the weight of its group's survivors. A group that too few survive is absent. Groups are dealt
    anew each round among the clients whose upload comes, and who dropped out fills them up; so absent rows change
    nothing, though a real server deals before it knows. The law of order holds in distribution only.

    One attacker spoils its group: choose `num_groups > 2 f` against `f` of them, or as many rows as `rule` asks for. A
    group has `floor(C / num_groups)` clients or one more, and its mean hides a client among no more than these. Costs
    `C^2 / (2 num_groups)` masks of `D` numbers, and writes `num_groups` rows.

    Args:
      rule: an aggregator, such as `robust.median()`; it gets `num_groups` rows, `weights=` and a `key=` of its own.
      num_groups: `K`, at least 1, with `2 K <= C`.
      clip: as in `secure_mean`.
      num_bits: as in `secure_mean`, where `n` is the clients of a group.
      max_weight: as in `secure_mean`.
      threshold: as in `secure_mean`, within a group.
      num_neighbors: as in `secure_mean`, within a group.
      stochastic: as in `secure_mean`.

    Returns:
      An `Aggregator` with a `GroupState`. It reads `key=` and `weights=` (`[C]`, a tree of `[C]` leaves, or `None`);
      arguments that it does not know go to `rule`, but for those with a client axis or a mesh.

    Raises:
      ValueError: if an argument is out of range (here, or when `update` is traced).
      TypeError: if `rule` is not an optax transformation, `num_groups` not an int, or the updates are the rows of a
        pre-aggregator.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cedarjax.robust import median
      >>> rule = group_wise(median(), 3, clip=100.0, num_bits=20)
      >>> updates = {"a": jnp.array([1.0, 1.0, 1.0, 1.0, 1.0, 99.0])}
      >>> update, state = jax.jit(rule.update)(updates, rule.init({"a": jnp.zeros(())}), key=jax.random.key(0))
      >>> print(update["a"].round(3), state.info.num_refused)
      1.0 0
    """
    if not isinstance(rule, optax.GradientTransformation):
        raise TypeError(f"rule must be an aggregator such as robust.median(), got {type(rule).__name__}.")
    if isinstance(num_groups, bool) or not isinstance(num_groups, int):
        raise TypeError(f"num_groups must be an int, got {num_groups!r}.")
    if num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {num_groups}.")
    encoding = Encoding(clip, num_bits, max_weight, stochastic)
    encoding.check(1)
    check_options(threshold, num_neighbors)
    inside = optax.with_extra_args_support(rule)

    def init(params: PyTree) -> GroupState:
        return GroupState(inside.init(params))

    def update(
        updates: PyTree,
        state: GroupState,
        params: PyTree | None = None,
        *,
        weights: PyTree | None = None,
        key: jax.Array | None = None,
        byzantine: jax.Array | None = None,
        mesh: jax.sharding.Mesh | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, GroupState]:
        del byzantine, mesh
        own_key, rule_key = split_key(key)
        updates = uploads_of(updates)
        count = num_clients(updates)
        if 2 * num_groups > count:
            raise ValueError(f"num_groups must satisfy 2 * num_groups <= num_clients, got {num_groups} and {count}.")
        contributions = read_contributions(updates, weights, encoding)
        size = -(-count // num_groups)
        encoding.check(size)
        ring = make_ring(size, num_neighbors)
        needed = check_threshold(ring, threshold)
        deal_key, rounding_key, mask_key = jax.random.split(own_key, 3)
        groups = random_groups(contributions.survived, num_groups, deal_key)

        def of_group(number: jax.Array) -> Sums:
            members = jnp.minimum(groups[number], count - 1)
            present = (groups[number] < count) & contributions.survived[members]
            work = Round.of(ring, needed, present, jax.random.fold_in(mask_key, number))
            return sum_contributions(contributions, work, encoding, rounding_key, members, present)

        numbers = jnp.arange(num_groups, dtype=jnp.int32)
        sums = lax.map(of_group, numbers)  # one after the other: each reads the updates of its members only
        means = [
            total / jnp.maximum(mass, 1).astype(total.dtype)[:, None]
            for total, mass in zip(sums.totals, sums.weights, strict=True)
        ]
        masses = [mass.astype(jnp.float32) for mass in sums.weights]
        row_weights = (
            jax.tree.unflatten(jax.tree.structure(updates), masses) if by_layer(updates, weights) else masses[0]
        )
        out, rule_state = inside.update(
            in_shape(means, updates), state.rule, params, weights=row_weights, key=rule_key, **extra_args
        )
        rule_state, told = take_info(rule_state)
        flags = [info.ok for info in told if hasattr(info, "ok")]
        ok = jnp.stack([sums.ok.any(), *flags]).all()
        slots = jnp.broadcast_to(numbers[:, None], groups.shape)
        group = jnp.zeros(count, jnp.int32).at[groups.reshape(-1)].set(slots.reshape(-1), mode="drop")
        num_refused = (~sums.ok).sum(dtype=jnp.int32)
        return out, GroupState(rule_state, GroupInfo(tell(contributions, sums.ok.all()), group, num_refused, ok))

    return optax.GradientTransformationExtraArgs(init, update)
