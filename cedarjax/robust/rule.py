"""What lifts a small function to an aggregation rule: presence, bad values, layer masks, too few clients, what is told.

Almost every rule sees the clients only through their inner products and answers with a linear combination of them.
`from_gram` makes an `Aggregator` of such a function of `[C, C]` numbers; the clients' `[C, D]` numbers are read twice,
once for the Gram matrix and once for the answer, however many iterations the rule takes. `from_columns` does the same
for rules on the order statistics of every coordinate.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from cedarjax.core.columns import map_columns
from cedarjax.core.inner import centered_gram, with_inner
from cedarjax.core.lowrank import dense
from cedarjax.core.mixture import Mixture
from cedarjax.core.trees import num_clients, tree_structure, weighted_sum
from cedarjax.core.types import Aggregator, PyTree
from cedarjax.robust.layers import layered_gram, renormalised
from cedarjax.robust.order import median_of
from cedarjax.robust.presence import Presence, by_layer, claimed_weights, finite_lengths, read_presence
from cedarjax.robust.selection import check_enough, num_present

GramRule = Callable[[jax.Array, jax.Array], jax.Array]
"""`rule(gram, weights) -> coefficients`, `[C, C]` and `[C]` to `[C]`."""

ColumnRule = Callable[[jax.Array, jax.Array], jax.Array]
"""`rule(block, weights) -> aggregate`, `[C, B]` and `[C]` to `[B]`, each column by itself."""


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


def init_rule(params: PyTree) -> RuleState:
    """State before the first round.

    Args:
      params: not read.

    Returns:
      A `RuleState`.
    """
    del params
    return RuleState(jnp.zeros((), jnp.int32))


def next_state(state: RuleState, info: RuleInfo) -> RuleState:
    """State after a round.

    Args:
      state: the state before.
      info: what the round tells.

    Returns:
      A `RuleState`.
    """
    return RuleState(state.num_nonfinite + info.nonfinite.sum(dtype=jnp.int32), info)


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


def coordinate_median(updates: PyTree, weights: PyTree, *, layered: bool = False, mesh: Mesh | None = None) -> PyTree:
    """The median of every coordinate over the present clients.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture`.
      weights: tree of `[C]` leaves shaped like the updates, 0 = absent.
      layered: whether the leaves of `weights` differ.
      mesh: mesh over which the client axis lies.

    Returns:
      Tree with leaves `[...]` in the dtype of `updates`.
    """
    return by_columns(median_of, updates, weights, layered=layered, mesh=mesh)


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


def from_gram(rule: GramRule, *, min_clients: int = 1, condition: str = "num_clients >= 1", f: int = 0) -> Aggregator:
    """Lifts a function of the clients' inner products to a rule.

    The updates are centred at one of them, multiplied in at least float32 and masked before the function sees them. A
    client whose upload is not finite, or too long for the square of its length to be, is absent. Where layers are
    masked, the distance of two clients is taken over the layers that both uploaded, scaled to all parameters, and the
    coefficients are renormalised layer by layer.

    Args:
      rule: `rule(gram, weights) -> coefficients`: `gram` `[C, C]` about a common centre, with rows and columns of 0 for
        absent clients; `weights` `[C]`, 0 for absent ones. The coefficients of a rule that moves along with its input
        add up to 1.
      min_clients: the fewest present clients for which `rule` is defined. A smaller cohort is an error when shapes
        tell; when only values tell, the result is the coordinate-wise median and `info.ok` is False.
      condition: the same in words, for the error.
      f: number of attackers, for the error.

    Returns:
      An `Aggregator` that reads `weights=` (`[C]`, a tree of `[C]` leaves, or `None` for equal weights) and `mesh=`.
      Its state is a `RuleState`.

    Raises:
      ValueError: when `update` is traced, for fewer than `min_clients` clients, or if client axes disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> from cedarjax.robust import distances_of, lowest, mean_over
      >>> def nearest_pair(gram, weights):
      ...     distances = jnp.sort(distances_of(gram, weights > 0), axis=1)
      ...     return mean_over(lowest(distances[:, 1], 2), weights)
      >>> rule = from_gram(nearest_pair)
      >>> updates = {"a": jnp.array([[1.0], [2.0], [6.0], [jnp.nan]])}
      >>> update, state = rule.update(updates, rule.init({"a": jnp.zeros(1)}))
      >>> print(update, state.info.coefficients, state.num_nonfinite)
      {'a': Array([1.5], dtype=float32)} [0.5 0.5 0.  0. ] 1
    """

    def update(
        updates: PyTree,
        state: RuleState,
        params: PyTree | None = None,
        *,
        weights: PyTree | None = None,
        mesh: Mesh | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, RuleState]:
        del params, extra_args
        check_enough(f, num_clients(updates), min_clients, condition)
        presence, gram, rows, layered = read_gram(updates, weights, mesh)
        present = presence.present
        kept = jnp.where(present, presence.clients, 0).astype(gram.dtype)
        enough = num_present(kept) >= min_clients
        coefficients = jnp.where(present & enough, rule(gram, kept).astype(gram.dtype), 0)
        info = RuleInfo(coefficients, presence.nonfinite, enough)

        def answer() -> PyTree:
            return combine(rows, presence, coefficients, layered=layered, mesh=mesh)

        if min_clients <= 1:  # with nobody present all coefficients are 0
            return answer(), next_state(state, info)
        fallen_back = lax.cond(
            enough, answer, lambda: coordinate_median(rows, presence.weights, layered=layered, mesh=mesh)
        )
        return fallen_back, next_state(state, info)

    return optax.GradientTransformationExtraArgs(init_rule, update)


def read_gram(
    updates: PyTree, weights: PyTree | None, mesh: Mesh | None = None
) -> tuple[Presence, jax.Array, PyTree, bool]:
    """Who is there and their inner products.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture`.
      weights: `None` for equal weights, `[C]`, or a tree of `[C]` leaves shaped like `updates`; 0 = absent.
      mesh: mesh over which the client axis lies.

    Returns:
      A `Presence`; `[C, C]` inner products about a common centre; the rows to combine; and whether layers are masked,
      in which case distances are those over the layers that two clients both uploaded, scaled to all parameters.

    Raises:
      ValueError: if the client axes or the structures disagree.
    """
    if by_layer(updates, weights):
        updates = dense(updates) if isinstance(updates, Mixture) else updates
        presence = read_presence(updates, weights, squared=True)
        return presence, layered_gram(updates, presence.weights, mesh=mesh), updates, True
    return *seen(updates, claimed_weights(updates, weights), mesh), False


def seen(updates: PyTree, weights: jax.Array, mesh: Mesh | None = None) -> tuple[Presence, jax.Array, Mixture]:
    """Who is there, their Gram matrix, and the rows with their inner products.

    The product of all rows tells by itself whether they are finite, so that nobody reads them before; only if it is not
    are the finite ones looked for.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture`.
      weights: `[C]`, 0 = absent.
      mesh: mesh over which the client axis lies.

    Returns:
      A `Presence`; `[C, C]` inner products about a common centre; the rows as a `Mixture` that knows them.
    """

    def whole(present: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = with_inner(updates, present, mesh=mesh)
        assert rows.inner is not None
        return centered_gram(rows, present), rows.inner

    claimed = weights > 0
    gram, inner = whole(claimed)

    def again() -> tuple[jax.Array, jax.Array, jax.Array]:
        nonfinite = claimed & ~finite_lengths(updates)
        return *whole(claimed & ~nonfinite), nonfinite

    finite = jnp.isfinite(gram).all()
    gram, inner, nonfinite = lax.cond(finite, lambda: (gram, inner, jnp.zeros(claimed.shape, bool)), again)
    present = claimed & ~nonfinite
    if isinstance(updates, Mixture):
        rows = Mixture(updates.matrices, updates.parts, updates.sums, inner)
    else:
        kept = present.astype(inner.dtype)
        rows = Mixture((jnp.eye(present.size, dtype=inner.dtype) * kept[:, None],), (updates,), kept, inner)
    structure = tree_structure(updates)
    shared = jax.tree.unflatten(
        structure, [jnp.where(present, weights, jnp.zeros_like(weights))] * structure.num_leaves
    )
    return Presence(shared, present, nonfinite), gram, rows


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

    def update(
        updates: PyTree,
        state: RuleState,
        params: PyTree | None = None,
        *,
        weights: PyTree | None = None,
        mesh: Mesh | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, RuleState]:
        del params, extra_args
        check_enough(f, num_clients(updates), min_clients, condition)
        layered = by_layer(updates, weights)
        presence = read_presence(updates, weights)
        out = by_columns(rule, updates, presence.weights, layered=layered, mesh=mesh)
        info = RuleInfo(None, presence.nonfinite, num_present(presence.clients) >= max(min_clients, 1))
        return out, next_state(state, info)

    return optax.GradientTransformationExtraArgs(init_rule, update)
