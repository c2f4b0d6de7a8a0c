"""Bytes that a client really sends."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from cedarjax.core.names import layer_mask, layer_names
from cedarjax.core.types import Params, PyTree


def _leaf_bytes(leaf: jax.Array) -> int:
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize


def _counter_dtype(total: int) -> jnp.dtype:
    """int32 when it can hold `total`, else int64."""
    if total < 2**31:
        return jnp.dtype(jnp.int32)
    widest = jax.dtypes.canonicalize_dtype(jnp.int64)
    if widest != jnp.int64:
        raise ValueError(f"params must hold less than 2^31 bytes unless jax_enable_x64 is set, got {total}.")
    return widest


def payload_bytes(mask: PyTree | None, params: Params, *, num_layers: int | None = None) -> jax.Array:
    """Exact size of one client's upload.

    `sum_l mask_l * bytes_l + ceil(L / 8)`: the uploaded layers and one bit for each of the `L` judged layers, which
    tells the server which of them came. Without a mask everything is sent and no bit is needed.

    Args:
      mask: `None`; or `{layer name: 0 or 1}` for the judged layers, all other parameters being uploaded; or a tree of
        scalars shaped like `params`, as in `Upload.mask`. Anything above 0 counts as uploaded.
      params: parameter tree of arrays or `jax.ShapeDtypeStruct`.
      num_layers: `L`. Default: the number of names in the dict; for a tree the number of layers that hold parameters.

    Returns:
      int32 scalar, exact; int64 if `params` hold 2^31 bytes or more.

    Raises:
      ValueError: if a name owns no parameter, the mask has another structure than `params`, `num_layers` is negative
        or given without a mask, or the total does not fit into int32 while `jax_enable_x64` is off.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"a": {"kernel": jnp.ones((3, 2))}, "b": {"kernel": jnp.ones(5)}}
      >>> print(payload_bytes(None, params), payload_bytes({"a": 0}, params), payload_bytes({"a": 1, "b": 1}, params))
      44 21 45
    """
    sizes = [_leaf_bytes(leaf) for leaf in jax.tree.leaves(params)]
    if num_layers is not None and (mask is None or num_layers < 0):
        raise ValueError(f"num_layers must be at least 0 and come with a mask, got {num_layers}.")
    if mask is None:
        return jnp.asarray(sum(sizes), _counter_dtype(sum(sizes)))
    if jax.tree.structure(mask) == jax.tree.structure(params):
        count = len(layer_names(params)) if num_layers is None else num_layers
    elif isinstance(mask, Mapping):
        count = len(mask) if num_layers is None else num_layers
        mask = layer_mask(params, mask)
    else:
        raise ValueError(
            "mask must be None, a dict of layer names or a tree of scalars shaped like params, got the structure "
            f"{jax.tree.structure(mask)}."
        )
    bitmap = -(-count // 8)
    dtype = _counter_dtype(sum(sizes) + bitmap)
    total = jnp.asarray(bitmap, dtype)
    for uploaded, size in zip(jax.tree.leaves(mask), sizes, strict=True):
        total = total + jnp.where(jnp.asarray(uploaded) > 0, jnp.asarray(size, dtype), jnp.asarray(0, dtype))
    return total
