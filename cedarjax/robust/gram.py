"""Rules that see the clients only through their inner products and answer with a linear combination of them.

Almost every rule does. `from_gram` makes an `Aggregator` of such a function of `[C, C]` numbers; the clients' `[C, D]`
numbers are read twice, once for the Gram matrix and once for the answer, however many iterations the rule takes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from cedarjax.core.axis import by_layer, claimed_weights, num_clients
from cedarjax.core.inner import centered_gram, with_inner
from cedarjax.core.lowrank import dense
from cedarjax.core.mixture import Mixture
from cedarjax.core.types import Aggregator, PyTree
from cedarjax.robust.columns import combine_or_median
from cedarjax.robust.layers import layered_gram
from cedarjax.robust.presence import Presence, finite_lengths, read_presence
from cedarjax.robust.rule import Round, RuleInfo, combine, from_round
from cedarjax.robust.selection import check_enough, num_present

GramRule = Callable[[jax.Array, jax.Array], jax.Array]
"""`rule(gram, weights) -> coefficients`, `[C, C]` and `[C]` to `[C]`."""


def from_gram(
    rule: GramRule,
    *,
    min_clients: int = 1,
    condition: str = "num_clients >= 1",
    f: int = 0,
    partial: bool = False,
) -> Aggregator:
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
      partial: whether `rule` may be undefined for enough clients too, which coefficients that are all 0 say; the result
        is the same median then.

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

    def answer(told: Round) -> tuple[PyTree, RuleInfo]:
        check_enough(f, num_clients(told.updates), min_clients, condition)
        presence, gram, rows, layered = read_gram(told.updates, told.weights, told.mesh)
        kept = jnp.where(presence.present, presence.clients, 0).astype(gram.dtype)
        enough = num_present(kept) >= min_clients
        coefficients = jnp.where(presence.present & enough, rule(gram, kept).astype(gram.dtype), 0)
        if min_clients <= 1 and not partial:  # with nobody present all coefficients are 0
            info = RuleInfo(coefficients, presence.nonfinite, enough)
            return combine(rows, presence, coefficients, layered=layered, mesh=told.mesh), info
        defined = enough & (coefficients != 0).any() if partial else enough
        return combine_or_median(rows, presence, coefficients, defined, layered=layered, mesh=told.mesh)

    return from_round(answer)


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
    presence = Presence.of(updates, weights, nonfinite)
    if isinstance(updates, Mixture):
        rows = Mixture(updates.matrices, updates.parts, updates.sums, inner)
    else:
        rows = Mixture.kept(updates, presence.present.astype(inner.dtype), inner)
    return presence, gram, rows
