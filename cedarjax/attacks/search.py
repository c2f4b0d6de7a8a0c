"""The strength of an attack against a rule that is known: every candidate is tried on the rule, and the best is sent.

All attackers send `start + strength * direction`. What a candidate achieves is read from the rule's answer alone, so
any rule will do. A rule that tells its coefficients is tried in the space of inner products: the clients' updates are
multiplied once, and a candidate costs numbers of the order of `C^2`, not of `C D`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from cedarjax.attacks.collusion import Knowledge, know, send, step
from cedarjax.core.chunks import ChunkSize
from cedarjax.core.cohort import MapFn, cohort_map
from cedarjax.core.dtypes import accumulator
from cedarjax.core.inner import with_inner
from cedarjax.core.lowrank import dense
from cedarjax.core.mixture import Mixture
from cedarjax.core.names import leaf_names
from cedarjax.core.told import take_info
from cedarjax.core.trees import inner_with
from cedarjax.core.types import Aggregator, PyTree


class Objective(NamedTuple):
    """What attackers achieve by an aggregate, the larger the better for them."""

    mean: PyTree
    """The honest mean, leaves `[...]`."""
    along: PyTree | None = None
    """`None` for the distance of the aggregate from the mean, or the direction along which it is to be moved."""

    def of(self, aggregate: PyTree) -> jax.Array:
        """What an aggregate is worth, a scalar."""
        dtype = accumulator(*jax.tree.leaves(self.mean))
        offset = jax.tree.map(lambda x, m: x.astype(m.dtype) - m, aggregate, self.mean)
        if self.along is None:
            return jnp.sqrt(sum(jnp.square(x).sum().astype(dtype) for x in jax.tree.leaves(offset)))
        return sum(jax.tree.leaves(jax.tree.map(lambda x, d: (x * d).sum().astype(dtype), offset, self.along)))


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


class Answer(NamedTuple):
    """The rule as the server will run it."""

    run: Callable[[PyTree], tuple[PyTree, PyTree]]
    """`run(rows) -> (aggregate, state)`."""
    tells: bool
    """Whether its state tells coefficients of which the aggregate is the combination."""


class _Space(NamedTuple):
    """What is known of a round before any candidate is tried on a rule that tells its coefficients."""

    rows: Mixture
    """The rows at strength 1, with the inner products of all that they are made of."""
    mean: jax.Array
    """`[B + 1]`, the honest mean in terms of the parts of the rows and of the centre."""
    along: jax.Array
    """`[B]`, of each part the product with the direction of the objective."""


def _at(rows: Mixture, byzantine: jax.Array, strength: jax.Array) -> Mixture:
    """The rows with the attackers' at some strength."""
    own, start, _ = rows.matrices
    flags = byzantine.astype(own.dtype)
    strength = strength.astype(own.dtype)
    matrices = (own, start, (flags * strength)[:, None])
    return dataclasses.replace(rows, matrices=matrices, sums=own.sum(axis=1) + flags * (1 + strength))


def _space(known: Knowledge, plan: Plan) -> _Space:
    dtype = accumulator(*jax.tree.leaves(known.updates))
    flags = known.byzantine.astype(dtype)
    vectors = [jax.tree.map(lambda x: x[None], vector) for vector in (plan.start, plan.direction)]
    parts = (known.updates, *vectors)
    matrices = (jnp.diag(known.honest.astype(dtype)), flags[:, None], flags[:, None])
    rows = Mixture(matrices, parts, flags * 2 + known.honest.astype(dtype))
    rows = with_inner(rows, known.present, mesh=known.mesh)
    shares = known.honest.astype(dtype) / jnp.maximum(known.num_honest, 1).astype(dtype)
    mean = jnp.concatenate([shares, jnp.zeros(2, dtype), jnp.ones(1, dtype)])
    along = jnp.zeros(shares.size + 2, dtype)
    if plan.objective.along is not None:
        products = [inner_with(part, plan.objective.along) for part in parts]
        along = jnp.concatenate([jnp.where(known.honest, products[0], 0), *products[1:]])
    return _Space(rows, mean, along)


def _candidates(
    known: Knowledge, updates: PyTree, plan: Plan, strengths: jax.Array, answer: Answer, map_fn: MapFn
) -> jax.Array:
    """What each strength achieves, `[K]`."""

    def written(plan: Plan, strength: jax.Array) -> jax.Array:
        """By rows that are written out, handed to the rule, and the answer judged."""
        rows = send(updates, known.byzantine, step(plan.start, strength, plan.direction))
        return plan.objective.of(answer.run(rows)[0])

    def unwritten(shared: tuple[Plan, _Space], strength: jax.Array) -> jax.Array:
        """By the coefficients that the rule tells; its answer itself is needed only where it fell back."""
        plan, space = shared
        rows = _at(space.rows, known.byzantine, strength)
        aggregate, state = answer.run(rows)

        def judged() -> jax.Array:
            places = state.info.coefficients.astype(space.mean.dtype) @ rows.coordinates
            offset = places - space.mean
            if plan.objective.along is None:
                return jnp.sqrt(jnp.maximum(offset @ (rows.inner @ offset), 0))
            return offset[:-1] @ space.along

        return lax.cond(state.info.ok, judged, lambda: plan.objective.of(aggregate).astype(space.mean.dtype))

    if answer.tells:
        found = map_fn(unwritten, (plan, _space(known, plan)), strengths)
    else:
        found = map_fn(written, plan, strengths)
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

        def run(rows: PyTree) -> tuple[PyTree, PyTree]:
            aggregate, new = rule.update(rows, state.rule, params, **extra)
            for name, got, want in zip(
                leaf_names(updates), jax.tree.leaves(aggregate), jax.tree.leaves(updates), strict=True
            ):
                if got.shape != want.shape[1:]:
                    raise ValueError(
                        f"rule must be an aggregator, which removes the client axis: it returned the shape {got.shape} "
                        f"for {name!r}, expected {want.shape[1:]}."
                    )
            return aggregate, new

        # Known from shapes alone. Where layers are masked, coefficients differ from layer to layer.
        told = getattr(jax.eval_shape(run, updates)[1], "info", None)
        coefficients = getattr(told, "coefficients", None)
        whole = weights is None or jax.tree.structure(weights) == jax.tree.structure(0)
        answer = Answer(run, coefficients is not None and coefficients.shape == known.honest.shape and whole)
        plan = make_plan(known)
        strength = strongest(known, updates, plan, answer, num_refinements, map_fn)
        poisoned = send(updates, known.byzantine, step(plan.start, strength, plan.direction))
        aggregate, rule_state = run(poisoned)
        return poisoned, SearchState(take_info(rule_state)[0], SearchInfo(strength, plan.objective.of(aggregate)))

    return optax.GradientTransformationExtraArgs(init, update)
