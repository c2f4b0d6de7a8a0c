"""The strength of an attack against a rule that is known: every candidate is tried on the rule, and the best is sent.

All attackers send `start + strength * direction`. What a candidate achieves is read from the rule's answer alone, so
any rule will do.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cedarjax.attacks.collusion import Knowledge, know, send, step
from cedarjax.core.chunks import ChunkSize
from cedarjax.core.cohort import MapFn, cohort_map
from cedarjax.core.lowrank import dense
from cedarjax.core.names import leaf_names
from cedarjax.core.told import take_info
from cedarjax.core.types import Aggregator, PyTree

Answer = Callable[[PyTree], tuple[PyTree, PyTree]]
"""`answer(rows) -> (aggregate, state)`: the rule as the server will run it."""

Objective = Callable[[PyTree], jax.Array]
"""`objective(aggregate) -> scalar`: what attackers achieve, the larger the better for them."""


class Plan(NamedTuple):
    """What attackers choose among in one round."""

    start: PyTree
    """What they send at strength 0, leaves `[...]`."""
    direction: PyTree
    """Leaves `[...]`."""
    strengths: jax.Array
    """`[K]`, the candidates, one after another on the axis that is refined."""
    objective: Objective
    """What is maximised."""


class SearchInfo(NamedTuple):
    """What the attackers know of their round."""

    strength: jax.Array
    """Scalar, the strength that they chose."""
    objective: jax.Array
    """Scalar, what they achieve by it against the rule."""


class SearchState(NamedTuple):
    """State of an attack that knows the rule."""

    rule: PyTree
    """The rule's state, which goes along with the server's."""
    info: SearchInfo | None = None
    """What the last round tells; `None` after `init`."""


def check_strengths(strengths: Sequence[float], num_refinements: int) -> None:
    """Checks the options of a search.

    Args:
      strengths: candidates.
      num_refinements: how often the best candidate's neighbourhood is searched again.

    Raises:
      ValueError: if there is no candidate, one is not finite, they do not ascend, or the number is negative.
    """
    ascending = all(a < b for a, b in zip(strengths, strengths[1:], strict=False))
    if not strengths or not ascending or not all(abs(s) < float("inf") for s in strengths):
        raise ValueError(f"strengths must be finite and ascending, at least one, got {tuple(strengths)}.")
    if num_refinements < 0:
        raise ValueError(f"num_refinements must be at least 0, got {num_refinements}.")


def _candidates(
    known: Knowledge, updates: PyTree, plan: Plan, strengths: jax.Array, answer: Answer, map_fn: MapFn
) -> jax.Array:
    """What each strength achieves, `[K]`: rows are written out, handed to the rule, and the answer judged."""

    def achieved(plan: tuple[PyTree, PyTree], strength: jax.Array) -> jax.Array:
        rows = send(updates, known.byzantine, step(plan[0], strength, plan[1]))
        return objective(answer(rows)[0])

    objective = plan.objective
    found = map_fn(achieved, (plan.start, plan.direction), strengths)
    return jnp.where(jnp.isnan(found), -jnp.inf, found)


def strongest(
    known: Knowledge, updates: PyTree, plan: Plan, answer: Answer, num_refinements: int, map_fn: MapFn
) -> jax.Array:
    """The strength that achieves most; of equal ones, the first.

    Args:
      known: what attackers know.
      updates: leaves `[C, ...]`, as they were uploaded.
      plan: the candidates and how they are judged.
      answer: the rule.
      num_refinements: how often as many candidates again are laid evenly between the neighbours of the best one.
      map_fn: how the candidates are laid out on the hardware, from `cohort_map`.

    Returns:
      Scalar in the dtype of the candidates.
    """
    strengths = plan.strengths
    achieved = _candidates(known, updates, plan, strengths, answer, map_fn)
    best = jnp.argmax(achieved)
    chosen, most = strengths[best], achieved[best]
    places = jnp.arange(1, strengths.size + 1, dtype=jnp.int32).astype(strengths.dtype) / (strengths.size + 1)
    low, high = strengths[jnp.maximum(best - 1, 0)], strengths[jnp.minimum(best + 1, strengths.size - 1)]
    for _ in range(num_refinements):
        finer = low + (high - low) * places
        achieved = _candidates(known, updates, plan, finer, answer, map_fn)
        best = jnp.argmax(achieved)
        better = achieved[best] > most
        width = (high - low) / (strengths.size + 1)
        chosen, most = jnp.where(better, finer[best], chosen), jnp.where(better, achieved[best], most)
        low, high = jnp.maximum(low, chosen - width), jnp.minimum(high, chosen + width)
    return chosen


def against(
    rule: Aggregator, make_plan: Callable[[Knowledge], Plan], num_refinements: int, chunk_size: ChunkSize
) -> Aggregator:
    """Lifts `make_plan(known) -> Plan` to a transformation that tries the plan's strengths on the rule.

    Args:
      rule: an aggregator, the one that follows in the server's chain.
      make_plan: the candidates and how they are judged.
      num_refinements: as in `strongest`.
      chunk_size: as in `cohort_map`: candidates that are tried at once, 1 for one after another.

    Returns:
      A transformation that keeps the client axis, with a `SearchState`; it reads `byzantine=`, `weights=`, `key=` and
      `mesh=` and hands all but the first on to the rule.

    Raises:
      ValueError: if `chunk_size` is out of range (here), or `rule` leaves the client axis in place (when `update` is
        traced).
    """
    rule = optax.with_extra_args_support(rule)
    map_fn = cohort_map(chunk_size)

    def init(params: PyTree) -> SearchState:
        return SearchState(take_info(rule.init(params))[0])

    def update(
        updates: PyTree,
        state: SearchState,
        params: PyTree | None = None,
        *,
        weights: PyTree | None = None,
        key: jax.Array | None = None,
        byzantine: jax.Array | None = None,
        mesh: Mesh | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, SearchState]:
        del extra_args
        updates = dense(updates)
        known = know(updates, weights, byzantine, mesh)
        extra = {"weights": weights, "key": key} | ({} if mesh is None else {"mesh": mesh})

        def answer(rows: PyTree) -> tuple[PyTree, PyTree]:
            aggregate, new = rule.update(rows, state.rule, params, **extra)
            for name, got, want in zip(
                leaf_names(rows), jax.tree.leaves(aggregate), jax.tree.leaves(rows), strict=True
            ):
                if got.shape != want.shape[1:]:
                    raise ValueError(
                        f"rule must be an aggregator, which removes the client axis: it returned the shape {got.shape} "
                        f"for {name!r}, expected {want.shape[1:]}."
                    )
            return aggregate, take_info(new)[0]

        plan = make_plan(known)
        strength = strongest(known, updates, plan, answer, num_refinements, map_fn)
        poisoned = send(updates, known.byzantine, step(plan.start, strength, plan.direction))
        aggregate, rule_state = answer(poisoned)
        return poisoned, SearchState(rule_state, SearchInfo(strength, plan.objective(aggregate)))

    return optax.GradientTransformationExtraArgs(init, update)
