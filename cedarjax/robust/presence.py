"""Which rows of the updates a rule may read: absent and non-finite clients out, leaf by leaf."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core.lowrank import is_low_rank
from cedarjax.core.mixture import Mixture
from cedarjax.core.trees import finite_rows, num_clients, sq_norms, tree_structure
from cedarjax.core.types import PyTree
from cedarjax.robust.layers import layered_sq_norms

_ROOM = 64.0


class Presence(NamedTuple):
    """The clients as a rule sees them."""

    weights: PyTree
    """Tree of `[C]` leaves shaped like the updates, 0 for an absent or non-finite client and for a layer left out."""
    present: jax.Array
    """`[C]` bool, clients that uploaded at least one leaf, all of it finite."""
    nonfinite: jax.Array
    """`[C]` bool, clients that uploaded a number that is not finite."""

    @property
    def clients(self) -> jax.Array:
        """`[C]` weight of each client: the largest among its layers, 0 for an absent one."""
        leaves = jax.tree.leaves(self.weights)
        return leaves[0] if all(x is leaves[0] for x in leaves) else jnp.stack(leaves).max(axis=0)


def by_layer(updates: PyTree, weights: PyTree | None) -> bool:
    """Whether weights are given for each layer, and not one for each client.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture`.
      weights: `None`, `[C]`, or a tree of `[C]` leaves shaped like `updates`.

    Returns:
      A Python bool.

    Raises:
      ValueError: if they are neither.
    """
    if weights is None:
        return False
    structure = tree_structure(updates)
    if jax.tree.structure(weights) == structure and not jax.tree_util.treedef_is_leaf(structure):
        return True
    if jax.tree.structure(weights) != jax.tree.structure(0):
        raise ValueError(
            f"weights must be one [C] vector or a tree of [C] vectors shaped like the updates, got the structure "
            f"{jax.tree.structure(weights)} for updates of the structure {structure}."
        )
    return False


def claimed_weights(updates: PyTree, weights: PyTree | None) -> PyTree:
    """The weights as they are given, checked against the updates.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture`.
      weights: `None` for equal weights, `[C]`, or a tree of `[C]` leaves shaped like `updates`; 0 = absent.

    Returns:
      `[C]`, or a tree of `[C]` leaves.

    Raises:
      ValueError: if the client axes or the structures disagree.
    """
    count = num_clients(updates)
    by_layer(updates, weights)
    if weights is None:
        return jnp.ones(count, jnp.float32)
    for leaf in jax.tree.leaves(weights):
        if jnp.shape(leaf) != (count,):
            raise ValueError(
                f"weights must be [C] with C = {count}, the client axis of updates, got the shape {jnp.shape(leaf)}."
            )
    return weights


def read_presence(updates: PyTree, weights: PyTree | None, *, squared: bool = False) -> Presence:
    """Reads the weights of a round and removes clients whose upload is not finite.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture`.
      weights: `None` for equal weights, `[C]`, or a tree of `[C]` leaves shaped like `updates`; 0 = absent.
      squared: whether lengths will be squared, so that an upload is not finite either if its squared length is not.

    Returns:
      A `Presence`. What an absent client or a left-out layer holds is never read.

    Raises:
      ValueError: if the client axes or the structures disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> presence = read_presence({"a": jnp.array([1.0, jnp.nan, jnp.nan])}, jnp.array([2.0, 1.0, 0.0]))
      >>> print(presence.weights, presence.nonfinite)
      {'a': Array([2., 0., 0.], dtype=float32)} [False  True False]
    """
    layered = by_layer(updates, weights)
    weights = claimed_weights(updates, weights)
    if squared:
        sent = jnp.stack([leaf > 0 for leaf in jax.tree.leaves(weights)]).any(axis=0)
        bad = sent & ~finite_lengths(updates, layered_sq_norms(updates, weights) if layered else None)
    elif layered:
        uploaded = [leaf > 0 for leaf in jax.tree.leaves(weights)]
        tree = updates.parts[0] if isinstance(updates, Mixture) else updates
        leaves = jax.tree.leaves(tree, is_leaf=is_low_rank)
        every = finite_rows(updates) if isinstance(updates, Mixture) else None
        finite = [finite_rows(leaf) if every is None else every for leaf in leaves]
        sent = jnp.stack(uploaded).any(axis=0)
        bad = jnp.stack([u & ~f for u, f in zip(uploaded, finite, strict=True)]).any(axis=0)
    else:
        sent = weights > 0
        bad = sent & ~finite_rows(updates)
    kept = jax.tree.map(lambda w: jnp.where(bad | ~(w > 0), jnp.zeros_like(w), w), weights)
    if not layered:
        structure = tree_structure(updates)
        kept = jax.tree.unflatten(structure, [kept] * structure.num_leaves)
    return Presence(kept, sent & ~bad, bad)


def finite_lengths(updates: PyTree, squares: jax.Array | None = None) -> jax.Array:
    """Which clients sent finite numbers whose squares add up to a finite one, with room for sums over clients.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture`.
      squares: their squared lengths, if they are known.

    Returns:
      `[C]` bool.

    Example:
      >>> import jax.numpy as jnp
      >>> print(finite_lengths({"a": jnp.array([1.0, jnp.inf, 1e30])}))
      [ True False False]
    """
    if isinstance(updates, Mixture):
        return finite_rows(updates)
    squares = sq_norms(updates) if squares is None else squares
    return squares < jnp.finfo(squares.dtype).max / _ROOM  # False for NaN
