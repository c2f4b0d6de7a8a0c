"""Sliding windows as strided slices: what convolution and pooling have in common."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax import lax


class Windows(NamedTuple):
    """Where windows lie on the spatial axes of an array `[B, *spatial, F]`; one entry a spatial dimension."""

    size: tuple[int, ...]
    """Places of a window."""
    strides: tuple[int, ...]
    """From one window to the next."""
    dilation: tuple[int, ...]
    """From one place of a window to the next."""
    pads: tuple[tuple[int, int], ...]
    """Padding below and above, negative to crop."""
    out: tuple[int, ...]
    """Number of windows, at least 0."""

    def positions(self) -> list[tuple[int, ...]]:
        """All places of a window, the last axis fastest."""
        return list(itertools.product(*map(range, self.size)))


def lay_windows(
    spatial: Sequence[int],
    size: Sequence[int],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    dilation: Sequence[int] | None = None,
) -> Windows:
    """Lays windows on spatial axes as XLA does.

    Args:
      spatial: sizes of the spatial axes.
      size: places of a window, one number a spatial dimension.
      strides: one stride a spatial dimension.
      padding: `"SAME"`, `"SAME_LOWER"`, `"VALID"`, or `(low, high)` a spatial dimension.
      dilation: one step between places a spatial dimension; 1 by default.

    Returns:
      The windows; none along an axis that is too short for one.

    Example:
      >>> lay_windows((7,), (3,), (2,), "SAME").out
      (4,)
    """
    dilation = (1,) * len(size) if dilation is None else tuple(dilation)
    extent = tuple((places - 1) * step + 1 for places, step in zip(size, dilation, strict=True))
    pads = lax.padtype_to_pads(spatial, extent, strides, padding) if isinstance(padding, str) else padding
    out = tuple(
        max(0, (length + low + high - width) // stride + 1)
        for length, (low, high), width, stride in zip(spatial, pads, extent, strides, strict=True)
    )
    return Windows(tuple(size), tuple(strides), dilation, tuple((low, high) for low, high in pads), out)


def pad(x: jax.Array, pads: Sequence[tuple[int, int]], fill: float = 0.0) -> jax.Array:
    """Pads the spatial axes of `x [B, *spatial, F]` with `fill`, or crops them."""
    return lax.pad(x, x.dtype.type(fill), [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)])


def places(padded: jax.Array, windows: Windows) -> list[jax.Array]:
    """What lies at each place of the windows.

    Args:
      padded: `[B, *spatial, F]`, padded already.
      windows: where they lie.

    Returns:
      `prod(size)` arrays `[B, *out, F]` in the order of `windows.positions()`.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.arange(5.0).reshape(1, 5, 1)
      >>> [place.ravel().tolist() for place in places(x, lay_windows((5,), (2,), (2,), "VALID"))]
      [[0.0, 2.0], [1.0, 3.0]]
    """
    slices = []
    for position in windows.positions():
        start = [index * step for index, step in zip(position, windows.dilation, strict=True)]
        stop = [
            first + (count - 1) * stride + 1
            for first, count, stride in zip(start, windows.out, windows.strides, strict=True)
        ]
        slices.append(
            lax.slice(padded, (0, *start, 0), (padded.shape[0], *stop, padded.shape[-1]), (1, *windows.strides, 1))
        )
    return slices
