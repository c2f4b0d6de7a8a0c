"""Parts of a model: which leaves belong to one, taking it out, putting it back, training nothing else.

A tree without a part has `None` in its place, which is no leaf: what maps, sums or counts over such a tree never sees
the part. `equinox.partition` and `flax.nnx.split` do the same by other filters.
"""

from collections.abc import Callable, Sequence

import jax
import optax

from cedarjax.core.names import leaf_names, leaf_owners
from cedarjax.core.types import PyTree

Part = str | Sequence[str] | Callable[[str], bool]
"""The name of a layer, `"head"`; several; or a predicate on the names of leaves, `lambda name: "norm" in name`."""


def in_part(tree: PyTree, part: Part) -> PyTree:
    """Which leaves belong to a part.

    Args:
      tree: parameter tree.
      part: a layer, layers, or a predicate on names as `core.leaf_names` gives them.

    Returns:
      Tree of Python bools shaped like `tree`.

    Raises:
      ValueError: if a name owns no leaf, or the part is the whole tree or nothing.

    Example:
      >>> in_part({"body": {"kernel": 0}, "head": {"kernel": 0, "bias": 0}}, "head")
      {'body': {'kernel': False}, 'head': {'bias': True, 'kernel': True}}
    """
    names = leaf_names(tree)
    if callable(part):
        chosen = [bool(part(name)) for name in names]
    else:
        layers = (part,) if isinstance(part, str) else tuple(part)
        chosen = [owner is not None for owner in leaf_owners(tree, layers)]
    if all(chosen) or not any(chosen):
        which = "all" if chosen and all(chosen) else "none"
        raise ValueError(f"part must be some of the leaves and not others, got {part!r}, which is {which} of {names}.")
    return jax.tree.unflatten(jax.tree.structure(tree), chosen)


def partition(tree: PyTree, part: Part) -> tuple[PyTree, PyTree]:
    """Takes a part out of a tree.

    Args:
      tree: parameter tree, or any tree shaped like it.
      part: as in `in_part`.

    Returns:
      The part, and the rest; each with `None` where the other has leaves.

    Raises:
      ValueError: as in `in_part`.

    Example:
      >>> partition({"body": 1.0, "head": 2.0}, "head")
      ({'body': None, 'head': 2.0}, {'body': 1.0, 'head': None})
    """
    chosen = in_part(tree, part)
    taken = jax.tree.map(lambda c, x: x if c else None, chosen, tree)
    return taken, jax.tree.map(lambda c, x: None if c else x, chosen, tree)


def merge(one: PyTree, other: PyTree) -> PyTree:
    """Puts two parts together, `merge(*partition(tree, part)) == tree`.

    Args:
      one: tree with `None` where `other` has leaves.
      other: tree with `None` where `one` has leaves.

    Returns:
      The whole tree.

    Raises:
      ValueError: if both have a leaf at the same place.

    Example:
      >>> merge({"body": None, "head": 2.0}, {"body": 1.0, "head": None})
      {'body': 1.0, 'head': 2.0}
    """

    def pick(a: PyTree, b: PyTree) -> PyTree:
        if a is not None and b is not None:
            raise ValueError("one and other must not have a leaf at the same place.")
        return b if a is None else a

    return jax.tree.map(pick, one, other, is_leaf=lambda x: x is None)


def train_only(tx: optax.GradientTransformation, part: Part) -> optax.GradientTransformation:
    """An optimiser that trains a part and leaves the rest as it is.

    Gradients of the rest are not read, so the compiler does not compute them.

    Args:
      tx: optax optimiser.
      part: as in `in_part`.

    Returns:
      An optax transformation; its state is that of `tx` on the part.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = train_only(optax.sgd(1.0), "head")
      >>> params = {"body": jnp.ones(()), "head": jnp.ones(())}
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> print(updates["body"], updates["head"])
      0.0 -1.0
    """
    return optax.partition({True: tx, False: optax.set_to_zero()}, lambda tree: in_part(tree, part))


def freeze(tx: optax.GradientTransformation, part: Part) -> optax.GradientTransformation:
    """An optimiser that leaves a part as it is and trains the rest, the opposite of `train_only`.

    Args:
      tx: optax optimiser.
      part: as in `in_part`.

    Returns:
      An optax transformation.
    """
    return optax.partition({False: tx, True: optax.set_to_zero()}, lambda tree: in_part(tree, part))
