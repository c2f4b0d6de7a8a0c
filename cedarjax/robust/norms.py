"""How long the updates are, about the origin and not about their bulk, for rules that are not indifferent to it."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cedarjax.core.axis import by_layer, claimed_weights
from cedarjax.core.inner import products, with_inner
from cedarjax.core.lowrank import dense
from cedarjax.core.mixture import Mixture
from cedarjax.core.trees import sq_norms
from cedarjax.core.types import PyTree
from cedarjax.robust.gram import read_gram
from cedarjax.robust.layers import layered_sq_norms
from cedarjax.robust.presence import Presence, finite_lengths, read_presence


def sq_norms_of(rows: Mixture) -> jax.Array:
    """Squared lengths of rows whose inner products are known.

    Args:
      rows: a `Mixture` of `K` rows that `core.with_inner` made.

    Returns:
      `[K]`, at least 0.

    Example:
      >>> import jax.numpy as jnp
      >>> rows = with_inner({"a": jnp.array([[3.0, 4.0], [1.0, 0.0]])}, jnp.array([True, True]))
      >>> print(sq_norms_of(rows))
      [25.  1.]
    """
    assert rows.inner is not None
    return jnp.maximum(jnp.diagonal(products(rows.coordinates.astype(rows.inner.dtype), rows.inner)), 0)


def gram_and_norms(
    updates: PyTree, weights: PyTree | None, mesh: Mesh | None = None
) -> tuple[Presence, jax.Array, jax.Array, PyTree, bool]:
    """Who is there, their inner products about a common centre, their squared lengths, in one pass over the updates.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture`.
      weights: `None` for equal weights, `[C]`, or a tree of `[C]` leaves shaped like `updates`; 0 = absent.
      mesh: mesh over which the client axis lies.

    Returns:
      A `Presence`; `[C, C]`; `[C]`; the rows to combine; and whether layers are masked, in which case distances and
      lengths are those over the uploaded layers, scaled to all parameters.

    Raises:
      ValueError: if the client axes or the structures disagree.
    """
    presence, gram, rows, layered = read_gram(updates, weights, mesh)
    squares = layered_sq_norms(rows, presence.weights) if layered else sq_norms_of(rows)
    return presence, gram, squares, rows, layered


def read_norms(
    updates: PyTree, weights: PyTree | None, mesh: Mesh | None = None
) -> tuple[Presence, jax.Array, PyTree, bool]:
    """Who is there and their squared lengths, which tell by themselves whether the rows are finite.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture`.
      weights: `None` for equal weights, `[C]`, or a tree of `[C]` leaves shaped like `updates`; 0 = absent.
      mesh: mesh over which the client axis lies.

    Returns:
      A `Presence`; `[C]`, 0 for absent clients; the rows to combine; and whether layers are masked, in which case
      lengths are those over the uploaded layers, scaled to all parameters.

    Raises:
      ValueError: if the client axes or the structures disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> presence, squares, _, _ = read_norms({"a": jnp.array([[3.0, 4.0], [jnp.nan, 0.0]])}, None)
      >>> print(squares, presence.nonfinite)
      [25.  0.] [False  True]
    """
    if by_layer(updates, weights):
        updates = dense(updates)
        presence = read_presence(updates, weights, squared=True)
        squares = layered_sq_norms(updates, presence.weights)
        return presence, jnp.where(presence.present, squares, 0), updates, True
    claimed = claimed_weights(updates, weights)
    if isinstance(updates, Mixture):
        updates = with_inner(updates, claimed > 0, mesh=mesh)
        squares = sq_norms_of(updates)
    else:
        squares = sq_norms(updates)
    presence = Presence.of(updates, claimed, (claimed > 0) & ~finite_lengths(updates, squares))
    return presence, jnp.where(presence.present, squares, 0), updates, False
