"""Clipping one client's upload, so that it can move the sum by no more than a known length.

Reference: Abadi et al., `Deep Learning with Differential Privacy <https://arxiv.org/abs/1607.00133>`_, 2016; of whole
clients, McMahan et al., `Learning Differentially Private Recurrent Language Models <https://arxiv.org/abs/1710.06963>`_,
2018.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core.dtypes import accumulator
from cedarjax.core.lowrank import dense
from cedarjax.core.types import LocalUpdate, Params, PyTree, Shared, Upload


class ClipInfo(NamedTuple):
    """What clipping tells of one upload. It is not private."""

    norm: jax.Array
    """Scalar, float32 or wider: the length before; 0 for an upload that is not finite."""
    clipped: jax.Array
    """bool scalar, whether it was longer than allowed."""
    nonfinite: jax.Array
    """bool scalar, whether it held NaN or Inf, so that zeros took its place."""


class ClippedInfo(NamedTuple):
    """Info of a local update whose upload is clipped."""

    local: PyTree
    """Info of the wrapped update."""
    clip: ClipInfo
    """What was clipped."""


def check_above_zero(name: str, value: jax.Array | float) -> None:
    """Raises unless a hyper-parameter that is a Python number is positive and finite.

    Args:
      name: of the argument.
      value: its value; what is traced is not looked at.

    Raises:
      ValueError: naming the argument and its value.
    """
    if isinstance(value, int | float) and not 0 < value < float("inf"):
        raise ValueError(f"{name} must be above 0 and finite, got {value}.")


def safe_scale(largest: jax.Array) -> jax.Array:
    """A power of two by which numbers can be multiplied so that their squares and sums neither overflow nor vanish.

    Args:
      largest: their greatest absolute value, finite, in float32 or float64.

    Returns:
      An array of the same shape: 1, unless the squares of such numbers are out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> print(safe_scale(jnp.array([2.0**120, 1.0, 2.0**-120])) * jnp.array([2.0**120, 1.0, 2.0**-120]))
      [1.048576e+06 1.000000e+00 9.536743e-07]
    """
    exponent = 100 if largest.dtype.itemsize == 4 else 800
    scale = jnp.where(largest > 2.0 ** (exponent // 2), 2.0**-exponent, 1).astype(largest.dtype)
    return jnp.where(largest < 2.0 ** -(exponent // 2), jnp.asarray(2.0**exponent, largest.dtype), scale)


def clip_wide(delta: PyTree, max_norm: jax.Array | float, order: int = 2) -> tuple[PyTree, ClipInfo]:
    """`clip_by_norm` before its result is rounded to the dtypes of the leaves.

    Args:
      delta: as in `clip_by_norm`.
      max_norm: as in `clip_by_norm`.
      order: as in `clip_by_norm`.

    Returns:
      As `clip_by_norm`, leaves in float32 or wider.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}.")
    leaves, structure = jax.tree.flatten(dense(delta))
    dtype = accumulator(*leaves)
    limit = jnp.asarray(max_norm, dtype)
    finite = jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()
    wide = [jnp.where(finite, x, jnp.zeros((), x.dtype)).astype(dtype) for x in leaves]
    scale = safe_scale(jax.lax.stop_gradient(jnp.stack([jnp.abs(x).max(initial=0) for x in wide]).max()))
    scaled = [x * scale for x in wide]
    if order == 2:
        total = jnp.stack([jnp.square(x).sum() for x in scaled]).sum()
        length = jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1)), 0)
    else:
        length = jnp.stack([jnp.abs(x).sum() for x in scaled]).sum()
    norm = length / scale
    is_long = norm > limit
    factor = limit / jnp.where(is_long, length, 1)
    clipped = [jnp.where(is_long, s * factor, x) for s, x in zip(scaled, wide, strict=True)]
    return jax.tree.unflatten(structure, clipped), ClipInfo(norm, is_long, ~finite)


def as_leaves_of(tree: PyTree, like: PyTree) -> PyTree:
    """The same tree in the dtypes of another.

    Args:
      tree: arrays.
      like: tree of the same structure.

    Returns:
      Arrays in the dtypes of `like`.
    """
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, dense(like))


def clip_by_norm(delta: PyTree, max_norm: jax.Array | float, *, order: int = 2) -> tuple[PyTree, ClipInfo]:
    """Shortens a tree to a length, `delta min(1, max_norm / |delta|)`.

    | `delta` | result |
    |---|---|
    | zeros | zeros, with a finite gradient |
    | no longer than `max_norm` | itself, bit for bit |
    | finite, its squares beyond the largest number | of length `max_norm` |
    | with a NaN or Inf | zeros, and `nonfinite` is set |

    The length is that of all leaves together and is found in at least float32. To rounding, no result is longer than
    `max_norm`; leaves of a narrow dtype are rounded to it at the end.

    Args:
      delta: tree of floats; a `LowRank` becomes an array.
      max_norm: greatest length, above 0 and finite; may be traced.
      order: 2 for the Euclidean length, 1 for the sum of absolute values.

    Returns:
      The tree in the dtypes of `delta`, and a `ClipInfo`.

    Raises:
      ValueError: if a `max_norm` that is a Python number or `order` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> clipped, info = clip_by_norm({"a": jnp.array([6.0, 0.0]), "b": jnp.array(8.0)}, 5.0)
      >>> print(clipped["a"], clipped["b"], info.norm, info.clipped)
      [3. 0.] 4.0 10.0 True
    """
    check_above_zero("max_norm", max_norm)
    clipped, info = clip_wide(delta, max_norm, order)
    return as_leaves_of(clipped, delta), info


def clip_upload(local_update: LocalUpdate, max_norm: jax.Array | float) -> LocalUpdate:
    """Wraps a local update so that a client uploads no more than a length.

    What `clip_by_norm` does, on the client. Layers that were left out are zeros and stay so; the mask is passed on as
    it is, and tells which layers were sent. `gaussian_mechanism` clips by itself: this is for what comes before it on
    the way, and for servers that do not clip. What wraps this wrapper may lengthen the upload again.

    Args:
      local_update: any local update.
      max_norm: greatest Euclidean length, above 0 and finite, in units of the upload; may be traced.

    Returns:
      A `LocalUpdate` with the states of the wrapped one and a `ClippedInfo`.

    Raises:
      ValueError: if a `max_norm` that is a Python number is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cedarjax.core import LocalUpdate, Upload
      >>> local = LocalUpdate(lambda params: (), lambda shared, state, data, key: (Upload(shared), state, ()))
      >>> upload, _, info = clip_upload(local, 1.0).update(jnp.array([3.0, 4.0]), (), None, jax.random.key(0))
      >>> print(upload.delta, info.clip.norm)
      [0.6 0.8] 5.0
    """
    check_above_zero("max_norm", max_norm)

    def update(shared: Shared, client_state: PyTree, data: PyTree, key: jax.Array) -> tuple[Upload, PyTree, PyTree]:
        upload, client_state, info = local_update.update(shared, client_state, data, key)
        clipped, told = clip_by_norm(upload.delta, max_norm)
        return upload._replace(delta=clipped), client_state, ClippedInfo(info, told)

    def model(shared: Shared, client_state: PyTree) -> Params:
        return local_update.model(shared, client_state)

    return LocalUpdate(local_update.init, update, local_update.share, model)
