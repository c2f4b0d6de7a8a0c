"""Convolution as matmuls, a drop-in for `jax.lax.conv_general_dilated`.

`vmap` over the weights of a convolution, one set a client, becomes a grouped convolution, and inside a `scan` over
local steps a convolution misses XLA:CPU's fast path; both are many times slower than the same arithmetic as shifted
slices, concatenated along the features, times the kernel as a matrix (Chellapilla, Puri and Simard, `High Performance
Convolutional Neural Networks for Document Processing <https://inria.hal.science/inria-00112631>`_, 2006). In that
form `vmap` gives a batched matmul. Three shapes of it:

- features in one group: one matmul. With few input features two neighbouring outputs are found at once, from the
  window that holds both, so that the matrices are fat enough for a matmul to be fast;
- several groups: the same, batched over groups;
- depthwise (one feature a group): a sum of slices times weights, no matmul at all.

Measured on one CPU core in float32, batches of 10, milliseconds of a gradient with respect to input and weights, `lax`
against this file (`python -m bench conv`), under `vmap` with a set of weights a client, and in a loop with one set of
weights: kernel `3x3x1x16` on 28 x 28, 3.2 against 0.14 and 2.0 against 0.13; `3x3x16x32` on 14 x 14, 2.1 against 0.56
and 16 against 0.42; depthwise `3x3` on 14 x 14 x 32, 6.7 against 0.48 and 21 against 1.2. Where `lax` wins, with an
unbatched `3x3x16x32` in straight-line code, it is by 1.2 times (forwards alone, by 1.9). Nothing at the time of tracing
tells that case from the others, so there is no switch. On GPUs nothing was measured.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cedarjax.core.dtypes import accumulator
from cedarjax.nn.windows import Windows, lay_windows, pad, places

MAX_PAIRED_FEATURES = 8
"""Input features up to which two outputs are found at once; from 16 on it costs more than it saves."""


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
) -> jax.Array:
    """Convolves by matmuls where that is possible, by `lax` otherwise.

    By matmuls: one or two spatial dimensions, any strides, padding, kernel dilation, layout and feature groups. Batch
    groups, input dilation, three and more spatial dimensions, an explicit output sharding and empty outputs go to
    `jax.lax.conv_general_dilated`.

    Args:
      lhs: input; `[B, *spatial, I]` when `dimension_numbers` say so, by default `[B, I, *spatial]`.
      rhs: kernel; `[*window, I / groups, O]` when `dimension_numbers` say so, by default `[O, I / groups, *window]`.
      window_strides: one stride a spatial dimension.
      padding: `"SAME"`, `"SAME_LOWER"`, `"VALID"`, or `(low, high)` a spatial dimension, negative to crop.
      lhs_dilation: input dilation a spatial dimension.
      rhs_dilation: kernel dilation a spatial dimension.
      dimension_numbers: as for `jax.lax.conv_general_dilated`.
      feature_group_count: number of feature groups.
      batch_group_count: number of batch groups.
      precision: precision of the matmuls; a depthwise convolution always multiplies and adds in at least float32.
      preferred_element_type: dtype to accumulate in and return.
      out_sharding: sharding of the result.

    Returns:
      What `jax.lax.conv_general_dilated` returns, to rounding; differentiable to any order, forwards and backwards.
      The patches hold `prod(window) / prod(window_strides)` times the input's memory; depthwise there are none.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = nnx.Conv(3, 8, (5,), conv_general_dilated=conv_general_dilated, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 100, 3))).shape
      (2, 100, 8)
    """
    num_spatial = lhs.ndim - 2
    supported = (
        num_spatial in (1, 2)
        and batch_group_count == 1
        and out_sharding is None
        and (lhs_dilation is None or all(dilation == 1 for dilation in lhs_dilation))
        and lhs.dtype == rhs.dtype
        and jnp.issubdtype(lhs.dtype, jnp.floating)
    )
    if supported:
        numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        x = lax.transpose(lhs, _channels_last(numbers.lhs_spec))
        out_features, in_features, *window_axes = numbers.rhs_spec
        kernel = lax.transpose(rhs, (*window_axes, in_features, out_features))
        windows = lay_windows(x.shape[1:-1], kernel.shape[:-2], window_strides, padding, rhs_dilation)
        fits = x.shape[-1] == feature_group_count * kernel.shape[-2] and kernel.shape[-1] % feature_group_count == 0
        if fits and min(*x.shape, *windows.out, *kernel.shape) > 0:
            out = _by_groups(x, kernel, windows, feature_group_count, precision, preferred_element_type)
            return lax.transpose(out, _inverse(_channels_last(numbers.out_spec)))
    sharding = {} if out_sharding is None else {"out_sharding": out_sharding}
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
        **sharding,
    )


def _by_groups(
    x: jax.Array, kernel: jax.Array, windows: Windows, num_groups: int, precision: Any, preferred: Any
) -> jax.Array:
    """Convolves `x [B, *spatial, groups * I]` with `kernel [*window, I, groups * O]`, group by group."""
    if num_groups > 1 and kernel.shape[-2] == 1:
        return _depthwise(x, kernel, windows, preferred)
    one_group = functools.partial(_one_group, windows=windows, precision=precision, preferred=preferred)
    if num_groups == 1:
        return one_group(x, kernel)
    grouped = jax.vmap(one_group, in_axes=-2, out_axes=-2)(
        x.reshape(*x.shape[:-1], num_groups, -1), kernel.reshape(*kernel.shape[:-1], num_groups, -1)
    )
    return grouped.reshape(*grouped.shape[:-2], -1)


def _one_group(x: jax.Array, kernel: jax.Array, *, windows: Windows, precision: Any, preferred: Any) -> jax.Array:
    """Outputs `[B, *out, O]` as one matmul of patches and kernel."""
    *window, in_features, out_features = kernel.shape
    stride = windows.strides[-1]
    is_paired = in_features <= MAX_PAIRED_FEATURES and windows.dilation[-1] == 1 and window[-1] > stride
    num_paired = 2 if is_paired and windows.out[-1] > 1 else 1
    if num_paired > 1:
        kernel = _paired(kernel, stride)
    patches = _patches(x, windows, num_paired)
    rows, depth, width = patches.shape[:-1], patches.shape[-1], num_paired * out_features
    left, right = patches.reshape(-1, depth), kernel.reshape(depth, width)
    contracted = 0
    if depth > width and num_paired == 1:
        # XLA:CPU finds the kernel's gradient in the order in which the kernel lies here, and fastest with rows that are
        # longer than columns.
        axis = kernel.ndim - 1
        right, contracted = lax.transpose(kernel, (axis, *range(axis))).reshape(width, depth), 1
    flat = lax.dot_general(
        left, right, (((1,), (contracted,)), ((), ())), precision=precision, preferred_element_type=preferred
    )
    out = flat.reshape(*rows[:-1], rows[-1] * num_paired, out_features)
    return lax.slice_in_dim(out, 0, windows.out[-1], axis=out.ndim - 2)


def _paired(kernel: jax.Array, stride: int) -> jax.Array:
    """Kernel `[*window, I, 2, O]` of two neighbouring outputs, on the window that holds both of theirs."""
    zeros = [(0, 0, 0)] * kernel.ndim
    both = []
    for shift in ((0, stride, 0), (stride, 0, 0)):
        zeros[-3] = shift
        both.append(lax.pad(kernel, kernel.dtype.type(0), zeros))
    return jnp.stack(both, axis=-2)


def _patches(x: jax.Array, windows: Windows, num_paired: int) -> jax.Array:
    """Windows `[B, *out, prod(window) * I]` of `x [B, *spatial, I]`, position in the window outermost.

    With `num_paired` the windows of that many outputs along the last axis are joined. That axis is cut into blocks as
    long as the step from one window to the next, so that the places of a window that share a block are one slice.
    """
    step = num_paired * windows.strides[-1]
    count = -(-windows.out[-1] // num_paired)
    length = windows.size[-1] + (num_paired - 1) * windows.strides[-1]
    runs = [divmod(place * windows.dilation[-1], step) for place in range(length)]
    if windows.dilation[-1] == 1:
        pieces = [(block, 0, min(step, length - block * step)) for block in range(runs[-1][0] + 1)]
    else:
        pieces = [(block, first, 1) for block, first in runs]
    num_blocks = count + pieces[-1][0]
    low = windows.pads[-1][0]
    blocks = pad(x, (*windows.pads[:-1], (low, num_blocks * step - x.shape[-2] - low)))
    blocks = blocks.reshape(*blocks.shape[:-2], num_blocks, step * x.shape[-1])
    rows = windows._replace(
        size=(*windows.size[:-1], 1), strides=(*windows.strides[:-1], 1), out=(*windows.out[:-1], count)
    )
    found = []
    for block, first, width in pieces:
        part = lax.slice_in_dim(blocks, block, block + count, axis=x.ndim - 2)
        part = lax.slice_in_dim(part, first * x.shape[-1], (first + width) * x.shape[-1], axis=x.ndim - 1)
        found.append(places(part, rows))
    joined = [piece for row in zip(*found, strict=True) for piece in row]
    return lax.concatenate(joined, x.ndim - 1) if len(joined) > 1 else joined[0]


def _depthwise(x: jax.Array, kernel: jax.Array, windows: Windows, preferred: Any) -> jax.Array:
    """Outputs `[B, *out, I * M]` of `kernel [*window, 1, I * M]`: places of the windows times weights, summed."""
    wide = accumulator(x)
    slices = places(pad(x, windows.pads).astype(wide), windows)
    weights = kernel.astype(wide).reshape(len(slices), *(1,) * (x.ndim - 1), x.shape[-1], -1)
    outputs = [
        functools.reduce(operator.add, [place * weights[index, ..., m] for index, place in enumerate(slices)])
        for m in range(weights.shape[-1])
    ]
    joined = jnp.stack(outputs, axis=-1)
    return joined.reshape(*joined.shape[:-2], -1).astype(x.dtype if preferred is None else preferred)


def _channels_last(spec: Sequence[int]) -> tuple[int, ...]:
    """Permutation that brings an array of layout `spec` (batch, feature, *spatial) to batch, *spatial, feature."""
    batch, feature, *spatial = spec
    return (batch, *spatial, feature)


def _inverse(permutation: Sequence[int]) -> tuple[int, ...]:
    """Permutation that undoes `permutation`."""
    return tuple(sorted(range(len(permutation)), key=lambda axis: permutation[axis]))
