"""Directed deviation: attackers push every coordinate against the sign of the honest mean.

Reference: Fang et al., `Local Model Poisoning Attacks to Byzantine-Robust Federated Learning
<https://arxiv.org/abs/1911.11815>`_, 2020, with full knowledge of the honest updates. The paper speaks of models; in
terms of pseudo-gradients the received model is 0 and the direction in which it would change without attackers is minus
the sign of the honest mean.
"""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cedarjax.attacks.collusion import Knowledge, collude, honest_mean, know
from cedarjax.attacks.krum_score import krum_selects, nearest_sums
from cedarjax.attacks.min_max import honest_distances
from cedarjax.attacks.rows import overwrite_rows
from cedarjax.attacks.search import Objective, Plan, against
from cedarjax.core.chunks import ChunkSize
from cedarjax.core.columns import map_columns
from cedarjax.core.lowrank import dense
from cedarjax.core.trees import sq_norms
from cedarjax.core.types import Aggregator, PyTree

Rule = Literal["trimmed_mean", "median", "krum"]


def beyond(known: Knowledge, factor: float) -> tuple[PyTree, PyTree]:
    """Interval of every coordinate just outside the honest updates, on the side away from their mean's sign.

    Where the mean is positive, `[min / b, min]` if the least honest number is positive, else `[b min, min]`; elsewhere
    `[max, b max]` if the greatest is positive, else `[max, max / b]`.

    Args:
      known: what attackers know.
      factor: `b`, above 1.

    Returns:
      Lower and upper ends, leaves `[...]`; zeros with nobody honest.
    """
    someone = known.honest.any()

    def extreme(block: jax.Array, sign: int) -> jax.Array:
        rows = jnp.where(known.honest[:, None], block, jnp.full((), sign * math.inf, block.dtype))
        found = rows.min(axis=0) if sign > 0 else rows.max(axis=0)
        return jnp.where(someone, found, 0)

    least = map_columns(lambda block: extreme(block, 1), known.updates, mesh=known.mesh)
    greatest = map_columns(lambda block: extreme(block, -1), known.updates, mesh=known.mesh)
    mean = honest_mean(known)

    def lower(m: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(m > 0, jnp.where(a > 0, a / factor, a * factor), b)

    def upper(m: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(m > 0, a, jnp.where(b > 0, b * factor, b / factor))

    return jax.tree.map(lower, mean, least, greatest), jax.tree.map(upper, mean, least, greatest)


def _outside(factor: float) -> Aggregator:
    """The attack on coordinate-wise rules: every attacker draws every coordinate from `beyond`."""

    def draw(low: jax.Array, high: jax.Array, count: int, key: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count, dtype=jnp.int32))
        return jax.vmap(lambda k: low + (high - low) * jax.random.uniform(k, low.shape, low.dtype))(keys)

    def update(
        updates: PyTree,
        state: optax.EmptyState,
        params: PyTree | None = None,
        *,
        weights: PyTree | None = None,
        key: jax.Array | None = None,
        byzantine: jax.Array | None = None,
        mesh: Mesh | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, optax.EmptyState]:
        del params, extra_args
        updates = dense(updates)
        known = know(updates, weights, byzantine, mesh)
        if key is None:
            raise ValueError("key must be given to draw the attackers' updates; got None.")
        low, high = beyond(known, factor)
        leaves, structure = jax.tree.flatten(updates)
        ends = zip(jax.tree.leaves(low), jax.tree.leaves(high), strict=True)
        drawn = [draw(a, b, known.honest.shape[0], jax.random.fold_in(key, i)) for i, (a, b) in enumerate(ends)]
        poisoned = [overwrite_rows(known.byzantine, x, y.astype(x.dtype)) for x, y in zip(leaves, drawn, strict=True)]
        return jax.tree.unflatten(structure, poisoned), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def halved_strengths(known: Knowledge, num_halvings: int) -> jax.Array:
    """The bound beyond which Krum cannot choose an attacker, and its halves.

    `lambda_0 = sqrt(min_i S_i / ((n - 2 f - 1) D)) + max_i |x_i| / sqrt(D)`, where `S_i` adds up the squared distances
    of honest client `i` to its `n - f - 2` nearest honest ones.

    Args:
      known: what attackers know.
      num_halvings: halvings.

    Returns:
      `[num_halvings + 1]`, descending, finite, at least 0.
    """
    _, between = honest_distances(known)
    dtype = between.dtype
    size = sum(x[0].size for x in jax.tree.leaves(known.updates))
    counted = known.num_present - known.num_byzantine - 2
    sums = nearest_sums(jnp.where(known.honest[None, :], between, jnp.inf), known.honest, counted)
    rest = jnp.maximum(known.num_present - 2 * known.num_byzantine - 1, 1).astype(dtype)
    longest = jnp.where(known.honest, sq_norms(known.updates).astype(dtype), 0).max()
    bound = (jnp.sqrt(jnp.where(known.honest.any(), sums.min(), 0) / rest) + jnp.sqrt(longest)) / math.sqrt(size)
    bound = jnp.where(jnp.isfinite(bound), bound, 0)
    return bound * jnp.exp2(-jnp.arange(num_halvings + 1, dtype=jnp.int32).astype(dtype))


def _against_krum(num_halvings: int) -> Aggregator:
    """The attack on Krum: the greatest strength at which it selects an attacker, else the least that was tried."""

    def plan(known: Knowledge) -> PyTree:
        signs = jax.tree.map(jnp.sign, honest_mean(known))
        strengths = halved_strengths(known, num_halvings)
        _, between = honest_distances(known)
        dtype = between.dtype
        squares = jnp.where(known.honest, sq_norms(known.updates).astype(dtype), 0)
        along = _along(known, signs, dtype)
        length = jnp.stack([jnp.square(s).sum().astype(dtype) for s in jax.tree.leaves(signs)]).sum()
        flagged = known.byzantine & known.present

        def selected(strength: jax.Array) -> jax.Array:
            to_attackers = jnp.maximum(squares + 2 * strength * along + jnp.square(strength) * length, 0)
            distances = jnp.where(flagged[:, None], to_attackers[None, :], between)
            distances = jnp.where(flagged[None, :], to_attackers[:, None], distances)
            distances = jnp.where(flagged[:, None] & flagged[None, :], 0, distances)
            return krum_selects(distances, known.present, known.num_byzantine)

        chosen = jax.lax.map(lambda s: flagged[selected(s)], strengths)
        strength = strengths[jnp.argmax(jnp.where(chosen, strengths, -strengths))]
        return jax.tree.map(lambda s: -strength.astype(s.dtype) * s, signs)

    return collude(plan)


def _along(known: Knowledge, direction: PyTree, dtype: jnp.dtype) -> jax.Array:
    """`<x_i, direction>` of every honest client, `[C]`."""

    def leaf(x: jax.Array, d: jax.Array) -> jax.Array:
        return (x * d[None]).reshape(x.shape[0], -1).sum(axis=1).astype(dtype)

    terms = jax.tree.leaves(jax.tree.map(leaf, known.updates, direction))
    return jnp.where(known.honest, jnp.stack(terms).sum(axis=0), 0)


def _against(rule: Aggregator, num_halvings: int, chunk_size: ChunkSize) -> Aggregator:
    """The attack on any rule: the strength at which its answer goes farthest against the honest signs."""

    def plan(known: Knowledge) -> Plan:
        mean = honest_mean(known)
        away = jax.tree.map(lambda x: -jnp.sign(x), mean)

        return Plan(
            jax.tree.map(jnp.zeros_like, mean), away, halved_strengths(known, num_halvings), Objective(mean, away)
        )

    return against(rule, plan, 0, chunk_size)


def fang(
    rule: Rule | Aggregator, *, factor: float = 2.0, num_halvings: int = 20, chunk_size: ChunkSize = 1
) -> Aggregator:
    """Directed deviation against a rule that is known by name, or against any rule.

    - `"trimmed_mean"`, `"median"`: every attacker draws every coordinate uniformly from an interval just outside the
      honest numbers, on the side away from the mean's sign (`beyond`).
    - `"krum"`: all attackers send `-lambda * sign(mean)` with the greatest `lambda` of `halved_strengths` at which Krum
      selects one of them.
    - an `Aggregator`: the same vector, with the `lambda` of `halved_strengths` at which the rule's answer goes farthest
      against the signs of the honest mean, `argmax <sign(mean), mean - rule(rows)>`.

    With nobody honest, attackers send zeros.

    Args:
      rule: a name, or the aggregator that follows in the server's chain.
      factor: `b` of the intervals, above 1; read by the first two.
      num_halvings: how often the bound on `lambda` is halved, at least 0; read by the others.
      chunk_size: strengths that are tried at once on an `Aggregator`, as in `cohort_map`.

    Returns:
      An optax transformation that keeps the client axis, reads `byzantine=` (`[C]` bool), `weights=` and `mesh=`, and
      leaves other rows untouched; the first two need `key=`, of which row `i` has a key of its own, and an `Aggregator`
      is handed it. Same dtype out as in. Absent and non-finite rows are never read. Against an `Aggregator` its state
      is a `SearchState`, else empty.

    Raises:
      ValueError: if an option is out of range or `rule` is an unknown name (here), or `byzantine` or a `key` is missing
        or client axes disagree (when `update` is traced).

    Example:
      >>> import jax.numpy as jnp
      >>> attack = fang("krum")
      >>> updates = {"a": jnp.array([1.0, 1.1, 0.9, 1.0, 9.0])}
      >>> poisoned, _ = attack.update(updates, attack.init(None), byzantine=jnp.array([False] * 4 + [True]))
      >>> poisoned["a"][-1] < 0
      Array(True, dtype=bool)
    """
    if not 1 < factor < math.inf:
        raise ValueError(f"factor must be above 1 and finite, got {factor}.")
    if num_halvings < 0:
        raise ValueError(f"num_halvings must be at least 0, got {num_halvings}.")
    if not isinstance(rule, str):
        return _against(rule, num_halvings, chunk_size)
    if rule not in get_args(Rule):
        raise ValueError(f"rule must be an Aggregator or one of {get_args(Rule)}, got {rule!r}.")
    return _against_krum(num_halvings) if rule == "krum" else _outside(factor)
