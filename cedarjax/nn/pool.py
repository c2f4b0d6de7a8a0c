"""Max pooling whose gradient is a comparison, not XLA's select-and-scatter.

The maximum is taken over shifted slices. Its derivative is the slice at the place that holds it, and that place is
found once a window, for all derivatives to read.

Measured on one CPU core in float32, milliseconds of a gradient for one of 10 clients vmapped, flax's pooling against
this file (`python -m bench conv`): window 2 x 2 on `[10, 28, 28, 16]`, 2.8 against 0.08; window 3 x 3 with strides 2
on `[10, 27, 27, 16]`, 1.8 against 0.11. In a loop, 0.90 against 0.22 and 1.4 against 0.44. Average pooling needs
nothing of the kind: flax's took 0.18 ms of a gradient, a reshape and a mean 0.17.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from cedarjax.nn.windows import Windows, lay_windows, pad, places

MAX_PLACES = 16
"""Places of a window that are compared at once; larger windows are pooled axis by axis."""
MAX_SLICES = 64
"""Slices of all axes above which pooling is left to XLA, for the size of the program."""


def max_pool(
    x: jax.Array,
    window: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: str | Sequence[tuple[int, int]] = "VALID",
) -> jax.Array:
    """Largest value of every window.

    As `flax.nnx.max_pool`, values and gradients, except that windows do not overlap unless `strides` say so. Of tied
    values the first in the window gets the gradient, the last axis counting fastest. Differentiable to any order,
    forwards and backwards.

    Args:
      x: `[B, *spatial, F]`.
      window: size of the window, one number a spatial dimension.
      strides: one stride a spatial dimension; the window's size by default.
      padding: `"VALID"`, `"SAME"`, `"SAME_LOWER"`, or `(low, high)` a spatial dimension, at least 0 and below the
        window's size; no window finds its maximum in the padding.

    Returns:
      `[B, *out, F]`, without padding `out = (spatial - window) // strides + 1`: rows that fill no whole window are left
      out.

    Raises:
      ValueError: if `window`, `strides` or `padding` has not one entry a spatial dimension or is out of range, or the
        window is larger than the padded input.

    Example:
      >>> max_pool(jnp.arange(5.0).reshape(1, 5, 1), (2,)).ravel().tolist()
      [1.0, 3.0]
      >>> max_pool(jnp.arange(5.0).reshape(1, 5, 1), (3,), (2,), "SAME").ravel().tolist()
      [1.0, 3.0, 4.0]
    """
    windows = _checked(x, tuple(window), tuple(window if strides is None else strides), padding)
    if sum(windows.size) > MAX_SLICES:
        return nnx.max_pool(x, window_shape=windows.size, strides=windows.strides, padding=windows.pads)
    lowest = -math.inf if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.iinfo(x.dtype).min
    padded = pad(x, windows.pads, lowest) if any(map(any, windows.pads)) else x
    windows = windows._replace(pads=((0, 0),) * len(windows.size))
    if math.prod(windows.size) <= MAX_PLACES:
        return _largest(padded, windows)
    for axis in reversed(range(len(windows.size))):
        padded = _largest(padded, _along(windows, axis, padded.shape[1:-1]))
    return padded


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _largest(x: jax.Array, windows: Windows) -> jax.Array:
    """Largest value of every window, without padding."""
    return functools.reduce(jnp.maximum, places(x, windows))


@_largest.defjvp
def _largest_jvp(
    windows: Windows, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The tangent at the first place that holds the maximum; the last place, if a NaN is the maximum."""
    (x,), (dx,) = primals, tangents
    out = _largest(x, windows)
    first = _first_place(lax.stop_gradient(x), lax.stop_gradient(out), windows)
    slices = enumerate(places(dx, windows))
    chosen = [jnp.where(first == place, tangent, jnp.zeros_like(tangent)) for place, tangent in slices]
    return out, functools.reduce(jnp.add, chosen) / _one(first)


def _first_place(x: jax.Array, out: jax.Array, windows: Windows) -> jax.Array:
    """Number of the first place of each window whose value is `out`, as a float of the same dtype."""
    *others, _ = places(x, windows)
    found = jnp.full_like(out, len(others))
    for place, values in reversed(list(enumerate(others))):
        found = jnp.where(values == out, jnp.full_like(out, place), found)
    return found / _one(found)


def _one(x: jax.Array) -> jax.Array:
    """Ones that the compiler does not know to be ones.

    XLA:CPU repeats cheap producers in every consumer, here whole windows of comparisons at each place, and for the
    gradient all that it is summed from. It holds a division to be dear, computes it once and keeps the result.
    """
    return jnp.where(x == x, jnp.ones_like(x), x)


def _along(windows: Windows, axis: int, spatial: Sequence[int]) -> Windows:
    """The windows along one axis, of size 1 along the others."""
    ones = [1] * len(spatial)
    size, strides = list(ones), list(ones)
    size[axis], strides[axis] = windows.size[axis], windows.strides[axis]
    return lay_windows(spatial, size, strides, "VALID")


def _checked(
    x: jax.Array, window: tuple[int, ...], strides: tuple[int, ...], padding: str | Sequence[tuple[int, int]]
) -> Windows:
    """The windows, if they make sense."""
    spatial = x.shape[1:-1]
    if len(window) != len(spatial):
        raise ValueError(f"window must have {len(spatial)} sizes for an input of shape {x.shape}, got {window}.")
    if any(size < 1 for size in window):
        raise ValueError(f"window must satisfy 1 <= window <= padded spatial sizes of {spatial}, got {window}.")
    if len(strides) != len(spatial) or any(stride < 1 for stride in strides):
        raise ValueError(f"strides must be {len(spatial)} numbers of at least 1, got {strides}.")
    if not isinstance(padding, str):
        padding = tuple((low, high) for low, high in padding)
        if len(padding) != len(spatial):
            raise ValueError(f"padding must have {len(spatial)} pairs for an input of shape {x.shape}, got {padding}.")
        if any(not 0 <= width < size for pair, size in zip(padding, window, strict=True) for width in pair):
            raise ValueError(f"padding must satisfy 0 <= padding < window {window}, got {padding}.")
    windows = lay_windows(spatial, window, strides, padding)
    if min(windows.out, default=1) < 1:
        raise ValueError(f"window must satisfy 1 <= window <= padded spatial sizes of {spatial}, got {window}.")
    return windows
