"""Rules that decide coordinate by coordinate, and the median that stands in where another rule is not defined."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from cedarjax.core.axis import by_layer, num_clients, tree_structure
from cedarjax.core.columns import map_columns
from cedarjax.core.lowrank import dense
from cedarjax.core.types import Aggregator, PyTree
from cedarjax.robust.order import median_of
from cedarjax.robust.presence import Presence, read_presence
from cedarjax.robust.rule import Round, RuleInfo, combine, from_round
from cedarjax.robust.selection import check_enough, num_present

ColumnRule = Callable[[jax.Array, jax.Array], jax.Array]
"""`rule(block, weights) -> aggregate`, `[C, B]` and `[C]` to `[B]`, each column by itself."""


def by_columns(
    rule: ColumnRule, updates: PyTree, weights: PyTree, *, layered: bool = False, mesh: Mesh | None = None
) -> PyTree:
    """A column rule on every coordinate.

    Args:
      rule: gets a block and the clients' weights.
      updates: tree with leaves `[C, ...]`, or a `Mixture`.
      weights: tree of `[C]` leaves shaped like the updates, 0 = absent.
      layered: whether the leaves of `weights` differ.
      mesh: mesh over which the client axis lies.

    Returns:
      Tree with leaves `[...]` in the dtype of `updates`.
    """
    if not layered:
        kept = jax.tree.leaves(weights)[0]
        return map_columns(lambda block: rule(block, kept), updates, mesh=mesh)
    leaves = jax.tree.leaves(dense(updates))

    def of_leaf(x: jax.Array, w: jax.Array) -> jax.Array:
        return map_columns(lambda block: rule(block, w), x, mesh=mesh)

    out = [of_leaf(x, w) for x, w in zip(leaves, jax.tree.leaves(weights), strict=True)]
    return jax.tree.unflatten(tree_structure(updates), out)


def from_columns(rule: ColumnRule, *, min_clients: int = 1, condition: str = "", f: int = 0) -> Aggregator:
    """Lifts a function of the clients' numbers for one parameter to a rule.

    Args:
      rule: `rule(block, weights) -> aggregate`: `block` `[C, B]` in any floating dtype, weights `[C]`, 0 for absent
        clients, whose numbers may be anything; defined for any number of present clients.
      min_clients: the fewest clients for which the definition holds. A smaller cohort is an error when shapes tell;
        when only values tell, `rule` falls back by itself and `info.ok` is False.
      condition: the same in words, for the error.
      f: number of attackers, for the error.

    Returns:
      An `Aggregator` that reads `weights=` (`[C]`, a tree of `[C]` leaves, or `None` for equal weights) and `mesh=`.
      Its state is a `RuleState`.

    Raises:
      ValueError: when `update` is traced, for fewer than `min_clients` clients, or if client axes disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = from_columns(lambda block, weights: jnp.where((weights > 0)[:, None], block, -jnp.inf).max(axis=0))
      >>> update, state = rule.update({"a": jnp.array([[1.0, 5.0], [4.0, 3.0]])}, rule.init({"a": jnp.zeros(2)}))
      >>> print(update)
      {'a': Array([4., 5.], dtype=float32)}
    """

    def answer(told: Round) -> tuple[PyTree, RuleInfo]:
        check_enough(f, num_clients(told.updates), min_clients, condition)
        layered = by_layer(told.updates, told.weights)
        presence = read_presence(told.updates, told.weights)
        out = by_columns(rule, told.updates, presence.weights, layered=layered, mesh=told.mesh)
        return out, RuleInfo(None, presence.nonfinite, num_present(presence.clients) >= max(min_clients, 1))

    return from_round(answer)


def combine_or_median(
    updates: PyTree,
    presence: Presence,
    coefficients: jax.Array,
    defined: jax.Array,
    *,
    layered: bool = False,
    mesh: Mesh | None = None,
) -> tuple[PyTree, RuleInfo]:
    """The answer of a rule where it is defined, and else the coordinate-wise median with `ok` False.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture`.
      presence: who is there.
      coefficients: `[C]`.
      defined: bool scalar.
      layered: whether layers are masked.
      mesh: mesh over which the client axis lies.

    Returns:
      Tree with leaves `[...]` in the dtype of `updates`, and what the rule tells.
    """
    coefficients = jnp.where(presence.present & defined, coefficients, 0)
    out = lax.cond(
        defined,
        lambda: combine(updates, presence, coefficients, layered=layered, mesh=mesh),
        lambda: by_columns(median_of, updates, presence.weights, layered=layered, mesh=mesh),
    )
    return out, RuleInfo(coefficients, presence.nonfinite, defined)
