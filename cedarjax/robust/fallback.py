"""What a rule answers where it is not defined: the coordinate-wise median, flagged."""

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from cedarjax.core.trees import num_clients
from cedarjax.core.types import Aggregator, PyTree
from cedarjax.robust.presence import Presence, by_layer, read_presence
from cedarjax.robust.rule import (
    GramRule,
    RuleInfo,
    RuleState,
    combine,
    coordinate_median,
    from_gram,
    init_rule,
    next_state,
)
from cedarjax.robust.selection import check_enough, num_present


def combine_or_median(
    updates: PyTree,
    state: RuleState,
    presence: Presence,
    coefficients: jax.Array,
    defined: jax.Array,
    *,
    layered: bool = False,
    mesh: Mesh | None = None,
) -> tuple[PyTree, RuleState]:
    """The answer of a rule where it is defined, and else the coordinate-wise median with `info.ok` False.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture`.
      state: the state before.
      presence: who is there.
      coefficients: `[C]`.
      defined: bool scalar.
      layered: whether layers are masked.
      mesh: mesh over which the client axis lies.

    Returns:
      Tree with leaves `[...]` in the dtype of `updates`, and the next state.
    """
    coefficients = jnp.where(presence.present & defined, coefficients, 0)
    out = lax.cond(
        defined,
        lambda: combine(updates, presence, coefficients, layered=layered, mesh=mesh),
        lambda: coordinate_median(updates, presence.weights, layered=layered, mesh=mesh),
    )
    return out, next_state(state, RuleInfo(coefficients, presence.nonfinite, defined))


def from_partial(rule: GramRule, *, min_clients: int, condition: str, f: int) -> Aggregator:
    """`from_gram` for a rule that is not defined for all Gram matrices of enough clients.

    Args:
      rule: as in `from_gram`; coefficients that are all 0 say that it is not defined.
      min_clients: as in `from_gram`.
      condition: as in `from_gram`.
      f: as in `from_gram`.

    Returns:
      An `Aggregator` that falls back to the coordinate-wise median, with `info.ok` False, where too few clients are
      present or the rule is not defined.

    Raises:
      ValueError: as in `from_gram`.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = from_partial(lambda gram, weights: jnp.zeros_like(weights), min_clients=1, condition="", f=0)
      >>> update, state = rule.update({"a": jnp.array([1.0, 2.0, 9.0])}, rule.init({"a": jnp.zeros(())}))
      >>> print(update, state.info.ok)
      {'a': Array(2., dtype=float32)} False
    """

    def or_zeros(gram: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.where(num_present(weights) >= min_clients, rule(gram, weights), 0)

    lifted = from_gram(or_zeros)

    def update(
        updates: PyTree,
        state: RuleState,
        params: PyTree | None = None,
        *,
        weights: PyTree | None = None,
        mesh: Mesh | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, RuleState]:
        check_enough(f, num_clients(updates), min_clients, condition)
        out, state = lifted.update(updates, state, params, weights=weights, mesh=mesh, **extra_args)
        assert state.info is not None and state.info.coefficients is not None
        defined = jnp.any(state.info.coefficients != 0)

        def median() -> PyTree:
            presence = read_presence(updates, weights)
            return coordinate_median(updates, presence.weights, layered=by_layer(updates, weights), mesh=mesh)

        return lax.cond(defined, lambda: out, median), state._replace(info=state.info._replace(ok=defined))

    return optax.GradientTransformationExtraArgs(init_rule, update)
