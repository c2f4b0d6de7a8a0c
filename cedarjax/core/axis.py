"""The client axis of a tree of updates: how long it is, and what weights along it look like."""

import jax
import jax.numpy as jnp

from cedarjax.core.lowrank.node import is_low_rank
from cedarjax.core.mixture import Mixture
from cedarjax.core.names import leaf_names
from cedarjax.core.types import PyTree


def tree_structure(updates: PyTree) -> jax.tree_util.PyTreeDef:
    """Structure of one client's update, with a leaf for every `LowRank`.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture` of such.

    Returns:
      The structure.
    """
    return jax.tree.structure(updates.parts[0] if isinstance(updates, Mixture) else updates, is_leaf=is_low_rank)


def num_clients(updates: PyTree) -> int:
    """Length of the client axis that all leaves share.

    Args:
      updates: tree with leaves `[C, ...]`.

    Returns:
      `C`, a Python int.

    Raises:
      ValueError: if there is no leaf, a leaf is a scalar, or two leaves disagree; the message names the leaf.
    """
    if isinstance(updates, Mixture):
        return updates.num_rows
    leaves = jax.tree.leaves(updates)
    if not leaves:
        raise ValueError("updates must have at least one leaf, got an empty tree.")
    expected = leaves[0].shape[0] if jnp.ndim(leaves[0]) else -1
    for name, leaf in zip(leaf_names(updates), leaves, strict=True):
        if jnp.ndim(leaf) == 0:
            raise ValueError(f"updates must have a client axis on every leaf, got a scalar at {name!r}.")
        if leaf.shape[0] != expected:
            raise ValueError(
                f"updates must agree on the client axis, got {leaf.shape[0]} at {name!r}, expected {expected}."
            )
    return expected


def as_rows(updates: PyTree) -> PyTree:
    """The same updates, every leaf a matrix with one row a client.

    What both a product and a branch of `lax.cond` read is best read as a matrix by both: XLA:CPU stores the updates of
    a round twice where one reads `[C, a, b]` and the other `[C, a * b]`.

    Args:
      updates: tree with leaves `[C, ...]`, or a `Mixture`.

    Returns:
      Tree with leaves `[C, d]`; a `LowRank` leaf and a `Mixture` stay as they are.

    Raises:
      ValueError: as in `num_clients`.

    Example:
      >>> import jax.numpy as jnp
      >>> rows = as_rows({"a": jnp.zeros((3, 2, 5)), "b": jnp.zeros(3)})
      >>> rows["a"].shape, rows["b"].shape
      ((3, 10), (3, 1))
    """
    count = num_clients(updates)
    if isinstance(updates, Mixture):
        return updates
    return jax.tree.map(lambda x: x if is_low_rank(x) else x.reshape(count, -1), updates, is_leaf=is_low_rank)


def as_update(combined: PyTree, updates: PyTree) -> PyTree:
    """A combination of `as_rows(updates)` in the shape of one client's update.

    Args:
      combined: tree with leaves `[d]`.
      updates: tree with leaves `[C, ...]`, or a `Mixture`.

    Returns:
      Tree with leaves `[...]`.
    """
    if isinstance(updates, Mixture):
        return combined
    return jax.tree.map(
        lambda x, rows: x if is_low_rank(rows) else x.reshape(rows.shape[1:]), combined, updates, is_leaf=is_low_rank
    )


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


def per_leaf(values: PyTree, updates: PyTree) -> PyTree:
    """One `[C]` vector for each leaf: the values themselves, or the same vector everywhere.

    Args:
      values: `[C]`, or a tree of `[C]` leaves shaped like `updates`.
      updates: tree with leaves `[C, ...]`, or a `Mixture`.

    Returns:
      Tree shaped like one client's update.

    Raises:
      ValueError: if they are neither.
    """
    if by_layer(updates, values):
        return values
    structure = tree_structure(updates)
    return jax.tree.unflatten(structure, [values] * structure.num_leaves)
