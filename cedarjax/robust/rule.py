"""What a rule is told in a round, what it answers, and what lifts such a function to an `Aggregator`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cedarjax.core.axis import as_rows, as_update
from cedarjax.core.trees import weighted_sum
from cedarjax.core.types import Aggregator, Params, PyTree
from cedarjax.robust.layers import renormalised
from cedarjax.robust.presence import Presence


class Round(NamedTuple):
    """What a rule is told in a round."""

    updates: PyTree
    """Tree with leaves `[C, d]`, the `d` numbers of a layer in one row a client, or a `Mixture`."""
    weights: PyTree | None
    """`None` for equal weights, `[C]`, or a tree of `[C]` leaves shaped like the updates; 0 = absent."""
    params: Params | None
    """The received model, if it was given."""
    key: jax.Array | None
    """For rules that draw, if it was given."""
    mesh: Mesh | None
    """Mesh over which the client axis lies."""


class RuleInfo(NamedTuple):
    """What a rule tells about one round."""

    coefficients: jax.Array | None
    """`[C]`, the result is their combination of the updates (renormalised where layers are masked); 0 for clients that
    were not selected. `None` for rules that decide coordinate by coordinate."""
    nonfinite: jax.Array
    """`[C]` bool, clients treated as absent because their upload is not finite."""
    ok: jax.Array
    """bool scalar. False if nobody was present, or too few for the rule, so that it fell back to the coordinate-wise
    median."""
    selected: jax.Array | None = None
    """`[C]` bool, clients that a rule selected before it decided coordinate by coordinate; `None` for other rules."""


class RuleState(NamedTuple):
    """State of a rule that needs nothing of earlier rounds."""

    num_nonfinite: jax.Array
    """int32 scalar, uploads left out so far because they were not finite, summed over rounds."""
    info: RuleInfo | None = None
    """What the last round tells; `None` after `init`."""


def from_round(answer: Callable[[Round], tuple[PyTree, RuleInfo]]) -> Aggregator:
    """Lifts a function of what one round tells to a rule that needs nothing of earlier rounds.

    Args:
      answer: `answer(told) -> (update, info)`; `update` has leaves `[d]`, which take the layers' shapes.

    Returns:
      An `Aggregator` that reads `params`, `weights=`, `key=` and `mesh=`. Its state is a `RuleState`.

    Example:
      >>> import jax.numpy as jnp
      >>> from cedarjax.robust import RuleInfo
      >>> def first(told):
      ...     nobody = jnp.zeros(3, bool)
      ...     return told.updates[0], RuleInfo(jnp.array([1.0, 0.0, 0.0]), nobody, jnp.array(True))
      >>> rule = from_round(first)
      >>> update, state = rule.update(jnp.array([2.0, 5.0, 9.0]), rule.init(jnp.zeros(())))
      >>> print(update, state.num_nonfinite)
      2.0 0
    """

    def init(params: PyTree) -> RuleState:
        del params
        return RuleState(jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree,
        state: RuleState,
        params: PyTree | None = None,
        *,
        weights: PyTree | None = None,
        key: jax.Array | None = None,
        mesh: Mesh | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, RuleState]:
        del extra_args
        out, info = answer(Round(as_rows(updates), weights, params, key, mesh))
        return as_update(out, updates), RuleState(state.num_nonfinite + info.nonfinite.sum(dtype=jnp.int32), info)

    return optax.GradientTransformationExtraArgs(init, update)


def combine(
    updates: PyTree,
    presence: Presence,
    coefficients: jax.Array,
    *,
    layered: bool = False,
    mesh: Mesh | None = None,
) -> PyTree:
    """The answer of a rule, coefficients of absent clients set to 0.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture`.
      presence: who is there.
      coefficients: `[C]`.
      layered: whether layers are masked; then the coefficients are renormalised layer by layer.
      mesh: mesh over which the client axis lies.

    Returns:
      Tree with leaves `[...]` in the dtype of `updates`.
    """
    kept = jnp.where(presence.present, coefficients, 0)
    return weighted_sum(renormalised(kept, presence.weights) if layered else kept, updates, mesh=mesh)
