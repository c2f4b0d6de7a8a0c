"""Names of leaves and layers, read from the key path of the parameter tree.

A leaf is named by the components of its path, `"block1/conv/kernel"`; a layer is the path of the module that holds
leaves, `"block1/conv"`, or any path above it, `"block1"`. The names are the same whether the parameters are nested
dicts, flax linen variables or a flax nnx state. A layer owns a leaf when its path is a component-wise prefix of the
leaf's: `"block1"` does not own `"block10/kernel"`.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from cedarjax.core.types import Params, PyTree

_SEPARATOR = "/"


def _components(path: tuple) -> tuple[str, ...]:
    parts = []
    for key in path:
        match key:
            case jax.tree_util.DictKey(key=name) | jax.tree_util.FlattenedIndexKey(key=name):
                parts.extend(str(name).split(_SEPARATOR))  # haiku's keys hold whole paths
            case jax.tree_util.SequenceKey(idx=index):
                parts.append(str(index))
            case jax.tree_util.GetAttrKey(name=name):
                parts.append(name)
            case _:
                parts.append(str(key))
    # A flax nnx variable is a node with one child, `.value`; it is not a component of the name.
    if len(path) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey) and parts[-1] == "value":
        parts.pop()
    return tuple(parts)


def _paths(tree: PyTree) -> list[tuple[str, ...]]:
    return [_components(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def leaf_names(tree: PyTree) -> list[str]:
    """Names of the leaves, in the order of `jax.tree.leaves`.

    Args:
      tree: any tree.

    Returns:
      One `"a/b/c"` string per leaf.

    Example:
      >>> leaf_names({"head": {"kernel": 0, "bias": 0}, "blocks": [{"kernel": 0}]})
      ['blocks/0/kernel', 'head/bias', 'head/kernel']
    """
    return [_SEPARATOR.join(path) for path in _paths(tree)]


def layer_names(params: Params) -> tuple[str, ...]:
    """Names of the modules that hold leaves, in the order of `jax.tree.leaves`.

    Args:
      params: parameter tree; a leaf at the top of the tree is a layer of its own.

    Returns:
      The distinct parents of the leaves.

    Example:
      >>> layer_names({"block1": {"conv": {"kernel": 0}, "norm": {"scale": 0}}, "head": {"bias": 0, "kernel": 0}})
      ('block1/conv', 'block1/norm', 'head')
    """
    parents = (_SEPARATOR.join(path[:-1] or path) for path in _paths(params))
    return tuple(dict.fromkeys(parents))


def leaf_owners(params: PyTree, names: Sequence[str]) -> list[int | None]:
    """For each leaf, which of the named layers owns it.

    Args:
      params: parameter tree.
      names: layers.

    Returns:
      An index into `names`, or None, for each leaf in the order of `jax.tree.leaves`.

    Raises:
      ValueError: if a name owns no leaf, or two names share one.

    Example:
      >>> leaf_owners({"a": {"kernel": 1, "bias": 2}, "b": 3}, ["b"])
      [None, None, 0]
    """
    paths = _paths(params)
    prefixes = [tuple(name.split(_SEPARATOR)) for name in names]
    owners: list[int | None] = []
    for path in paths:
        owning = [i for i, prefix in enumerate(prefixes) if path[: len(prefix)] == prefix]
        if len(owning) > 1:
            raise ValueError(f"layers must not overlap, got {[names[i] for i in owning]}, which share a leaf.")
        owners.append(owning[0] if owning else None)
    for i, name in enumerate(names):
        if i not in owners:
            raise ValueError(f"layer {name!r} owns no parameter; the layers are {layer_names(params)}.")
    return owners


def layer_mask(params: Params, values: Mapping[str, jax.Array]) -> PyTree:
    """Spreads one scalar per layer over the leaves that it owns; leaves of no named layer get 1.

    Args:
      params: parameter tree.
      values: layer name to scalar, usually in {0, 1}.

    Returns:
      Tree of float32 scalars shaped like `params`.

    Raises:
      ValueError: if a name owns no leaf, or two names share one.

    Example:
      >>> layer_mask({"a": {"kernel": 0.0}, "b": {"kernel": 0.0}}, {"a": 0})
      {'a': {'kernel': Array(0., dtype=float32)}, 'b': {'kernel': Array(1., dtype=float32)}}
    """
    names = list(values)
    scalars = [jnp.asarray(values[name], jnp.float32) for name in names]
    one = jnp.ones((), jnp.float32)
    leaves = [one if owner is None else scalars[owner] for owner in leaf_owners(params, names)]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def layer_leaves(tree: PyTree, names: Sequence[str]) -> list[list[jax.Array]]:
    """Leaves of each named layer, in the order of `jax.tree.leaves`.

    Args:
      tree: parameter tree, or any tree shaped like it.
      names: layers.

    Returns:
      One list per name.

    Raises:
      ValueError: if a name owns no leaf, or two names share one.

    Example:
      >>> layer_leaves({"a": {"kernel": 1, "bias": 2}, "b": 3}, ["a"])
      [[2, 1]]
    """
    owned: list[list[jax.Array]] = [[] for _ in names]
    for leaf, owner in zip(jax.tree.leaves(tree), leaf_owners(tree, names), strict=True):
        if owner is not None:
            owned[owner].append(leaf)
    return owned


def layer_bytes(params: Params, names: Sequence[str]) -> tuple[int, ...]:
    """Bytes of each named layer.

    Args:
      params: parameter tree of arrays or `jax.ShapeDtypeStruct`.
      names: layers to measure.

    Returns:
      One Python int per name, exact.

    Raises:
      ValueError: if a name owns no leaf, or two names share one.

    Example:
      >>> import jax.numpy as jnp
      >>> layer_bytes({"a": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "b": jnp.ones(5)}, ["a", "b"])
      (32, 20)
    """
    return tuple(
        sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)
        for leaves in layer_leaves(params, names)
    )
