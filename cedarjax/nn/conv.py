"""Convolution as one matmul, a drop-in for `jax.lax.conv_general_dilated`.

`vmap` over the weights of a convolution, one set a client, becomes a grouped convolution, and inside a `scan` over
local steps a convolution misses XLA:CPU's fast path; both are many times slower than the same arithmetic as shifted
slices, concatenated along the features, times the kernel as a matrix (Chellapilla, Puri and Simard, `High Performance
Convolutional Neural Networks for Document Processing <https://inria.hal.science/inria-00112631>`_, 2006). In that
form `vmap` gives a batched matmul.

Measured on 2 CPU cores in float32, gradients of weights and input, `lax` against this file: a step of `CNN1D`
(`first_stride=1`) with batch 10 inside a scan, 13.9 against 1.1 ms, and 0.8 ms by either outside it; a second-order
step inside a scan, 82 against 4.6 ms; input `[32, 14, 14, 32]`, kernel `3x3x32x64`, 3.7 against 2.2 ms, and with 10
clients 268 against 61 ms. Where `lax` wins, an unbatched 1-D convolution outside a scan, it is by at most a quarter.
One matmul a kernel position instead of the concatenation gains nothing.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax


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
    """Convolves as one matmul where that is possible, by `lax` otherwise.

    One matmul: one or two spatial dimensions, any strides, padding, kernel dilation and layout. Groups, input
    dilation, three and more spatial dimensions, an explicit output sharding and empty outputs go to
    `jax.lax.conv_general_dilated`.

    Args:
      lhs: input; `[B, *spatial, I]` when `dimension_numbers` say so, by default `[B, I, *spatial]`.
      rhs: kernel; `[*window, I, O]` when `dimension_numbers` say so, by default `[O, I, *window]`.
      window_strides: one stride a spatial dimension.
      padding: `"SAME"`, `"SAME_LOWER"`, `"VALID"`, or `(low, high)` a spatial dimension, negative to crop.
      lhs_dilation: input dilation a spatial dimension.
      rhs_dilation: kernel dilation a spatial dimension.
      dimension_numbers: as for `jax.lax.conv_general_dilated`.
      feature_group_count: number of feature groups.
      batch_group_count: number of batch groups.
      precision: precision of the matmul.
      preferred_element_type: dtype to accumulate in and return.
      out_sharding: sharding of the result.

    Returns:
      What `jax.lax.conv_general_dilated` returns, to rounding; differentiable to any order, forwards and backwards.
      The patches hold `prod(window) / prod(window_strides)` times the input's memory.

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
        and feature_group_count == 1
        and batch_group_count == 1
        and out_sharding is None
        and (lhs_dilation is None or all(dilation == 1 for dilation in lhs_dilation))
        and lhs.dtype == rhs.dtype
    )
    if supported:
        numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        patches = _patches(
            lax.transpose(lhs, _channels_last(numbers.lhs_spec)),
            window=tuple(rhs.shape[axis] for axis in numbers.rhs_spec[2:]),
            strides=tuple(window_strides),
            padding=padding,
            dilation=(1,) * num_spatial if rhs_dilation is None else tuple(rhs_dilation),
        )
        out_features, in_features, *window_axes = numbers.rhs_spec
        kernel = lax.transpose(rhs, (*window_axes, in_features, out_features))
        depth = math.prod(kernel.shape[:-1])
        if math.prod(patches.shape) > 0 and patches.shape[-1] == depth:
            flat = lax.dot_general(
                patches.reshape(-1, depth),
                kernel.reshape(depth, -1),
                (((1,), (0,)), ((), ())),
                precision=precision,
                preferred_element_type=preferred_element_type,
            )
            out = flat.reshape(*patches.shape[:-1], kernel.shape[-1])
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


def _patches(
    x: jax.Array,
    *,
    window: tuple[int, ...],
    strides: tuple[int, ...],
    padding: str | Sequence[tuple[int, int]],
    dilation: tuple[int, ...],
) -> jax.Array:
    """Windows `[B, *out, prod(window) * I]` of `x [B, *spatial, I]`, position in the window outermost; or empty."""
    spatial = x.shape[1:-1]
    extent = tuple((size - 1) * step + 1 for size, step in zip(window, dilation, strict=True))
    pads = lax.padtype_to_pads(spatial, extent, strides, padding) if isinstance(padding, str) else list(padding)
    padded = lax.pad(x, x.dtype.type(0), [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)])
    out = tuple(
        max(0, (size - width) // stride + 1)
        for size, width, stride in zip(padded.shape[1:-1], extent, strides, strict=True)
    )
    if math.prod(out) == 0:
        return padded[:0]
    pieces = []
    for position in itertools.product(*map(range, window)):
        start = [index * step for index, step in zip(position, dilation, strict=True)]
        stop = [first + (size - 1) * stride + 1 for first, size, stride in zip(start, out, strides, strict=True)]
        pieces.append(
            lax.slice(padded, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *strides, 1)),
        )
    return lax.concatenate(pieces, x.ndim - 1) if len(pieces) > 1 else pieces[0]


def _channels_last(spec: Sequence[int]) -> tuple[int, ...]:
    """Permutation that brings an array of layout `spec` (batch, feature, *spatial) to batch, *spatial, feature."""
    batch, feature, *spatial = spec
    return (batch, *spatial, feature)


def _inverse(permutation: Sequence[int]) -> tuple[int, ...]:
    """Permutation that undoes `permutation`."""
    return tuple(sorted(range(len(permutation)), key=lambda axis: permutation[axis]))
