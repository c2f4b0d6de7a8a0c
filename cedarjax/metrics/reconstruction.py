"""How alike reconstructed and true images are: errors, PSNR, SSIM, labels, and which row is which.

Reference: Wang, Bovik, Sheikh, Simoncelli, `Image Quality Assessment: From Error Visibility to Structural Similarity
<https://doi.org/10.1109/TIP.2003.819861>`_, 2004, with the settings of the paper: a Gaussian window of 11 x 11 pixels
and deviation 1.5, `K1 = 0.01`, `K2 = 0.03`, population moments, and only windows that lie within the image; channels
are averaged. The order of a batch cannot be told from its gradient, so rows are matched before they are compared.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core.dtypes import accumulator

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


class Reconstruction(NamedTuple):
    """How alike a batch of reconstructions is to the truth, in the order of the true rows."""

    mse: jax.Array
    """`[B]` mean squared error; Inf where a reconstruction is not finite."""
    psnr: jax.Array
    """`[B]` decibels."""
    ssim: jax.Array
    """`[B]` in [-1, 1], 1 for equal images; 0 where a reconstruction is not finite."""
    order: jax.Array
    """`[B]` int32: row `order[i]` of the reconstructions belongs to true row `i`."""


def _check(x: jax.Array, target: jax.Array, least: int = 1) -> tuple[jax.Array, jax.Array]:
    x, target = jnp.asarray(x), jnp.asarray(target)
    if x.shape != target.shape or x.ndim < least or 0 in x.shape:
        raise ValueError(f"x and target must have one shape of {least} axes or more, got {x.shape} and {target.shape}.")
    dtype = accumulator(x, target)
    return x.astype(dtype), target.astype(dtype)


def _check_range(data_range: float | jax.Array) -> None:
    if isinstance(data_range, int | float) and not 0 < data_range < math.inf:
        raise ValueError(f"data_range must be above 0 and finite, got {data_range}.")


def _squared_errors(x: jax.Array, target: jax.Array) -> jax.Array:
    """`[B]`, Inf where not finite."""
    errors = jnp.square(x - target).reshape(x.shape[0], -1).mean(axis=1)
    return jnp.where(jnp.isfinite(errors), errors, jnp.asarray(jnp.inf, errors.dtype))


def psnr(x: jax.Array, target: jax.Array, *, data_range: float | jax.Array = 1.0) -> jax.Array:
    """Peak signal-to-noise ratio `10 log10(data_range^2 / mse)` of each row.

    Args:
      x: `[B, ...]` reconstructions.
      target: `[B, ...]` the truth.
      data_range: largest minus least possible value.

    Returns:
      `[B]` decibels; Inf for equal rows, -Inf where a reconstruction is not finite.

    Raises:
      ValueError: for other shapes or a range that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> print(psnr(jnp.full((1, 4), 0.6), jnp.full((1, 4), 0.5)).round(2))
      [20.]
    """
    x, target = _check(x, target)
    _check_range(data_range)
    errors = _squared_errors(x, target)
    return 10 * (2 * jnp.log10(jnp.asarray(data_range, errors.dtype)) - jnp.log10(errors))


def _band(length: int, dtype: jnp.dtype) -> jax.Array:
    """`[length - 10, length]`, the window at every place."""
    centre = (WINDOW - 1) // 2
    weights = [math.exp(-((place - centre) ** 2) / (2 * SIGMA**2)) for place in range(WINDOW)]
    taps = jnp.asarray([weight / sum(weights) for weight in weights], dtype)
    offset = jnp.arange(length)[None, :] - jnp.arange(length - WINDOW + 1)[:, None]
    inside = (offset >= 0) & (offset < WINDOW)
    return jnp.where(inside, taps[jnp.clip(offset, 0, WINDOW - 1)], jnp.zeros((), dtype))


def ssim(x: jax.Array, target: jax.Array, *, data_range: float | jax.Array = 1.0) -> jax.Array:
    """Mean structural similarity of each image.

    `(2 m_x m_y + c1) (2 s_xy + c2) / ((m_x^2 + m_y^2 + c1) (s_x^2 + s_y^2 + c2))`, of means, variances and covariance
    under the window, with `c = (K data_range)^2`, averaged over windows and channels.

    Args:
      x: `[B, H, W, F]` reconstructions.
      target: `[B, H, W, F]` the truth.
      data_range: largest minus least possible value.

    Returns:
      `[B]` in [-1, 1]; 1 for equal images, 0 where a reconstruction is not finite.

    Raises:
      ValueError: for other shapes, sides below 11 or a range that is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> image = jax.random.uniform(jax.random.key(0), (1, 16, 16, 1))
      >>> print(ssim(image, image).round(3), ssim(1 - image, image)[0] < 0)
      [1.] True
    """
    x, target = _check(x, target, 4)
    if x.ndim != 4 or min(x.shape[1:3]) < WINDOW:
        raise ValueError(f"x must be [B, H, W, F] with H, W >= {WINDOW}, got the shape {x.shape}.")
    _check_range(data_range)
    down, across = _band(x.shape[1], x.dtype), _band(x.shape[2], x.dtype)

    def smooth(image: jax.Array) -> jax.Array:
        return jnp.einsum("ih,bhwf,jw->bijf", down, image, across, precision=jax.lax.Precision.HIGHEST)

    # About a common offset, so that variances do not cancel.
    offset = target.mean(axis=(1, 2), keepdims=True)
    u, v = x - offset, target - offset
    mean_u, mean_v = smooth(u), smooth(v)
    var_u, var_v = smooth(u * u) - mean_u**2, smooth(v * v) - mean_v**2
    covariance = smooth(u * v) - mean_u * mean_v
    size = jnp.asarray(data_range, x.dtype)
    c1, c2 = (K1 * size) ** 2, (K2 * size) ** 2
    mean_x, mean_y = mean_u + offset, mean_v + offset
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    scores = (alike / ((mean_x**2 + mean_y**2 + c1) * (var_u + var_v + c2))).mean(axis=(1, 2, 3))
    return jnp.where(jnp.isfinite(scores), scores, jnp.zeros((), scores.dtype))


def match_rows(x: jax.Array, target: jax.Array) -> jax.Array:
    """Which reconstruction belongs to which true row: the one-to-one assignment of least total squared error.

    Shortest augmenting paths (Jonker and Volgenant, `A shortest augmenting path algorithm for dense and sparse linear
    assignment problems <https://doi.org/10.1007/BF02278710>`_, 1987), `O(B^3)`.

    Args:
      x: `[B, ...]` reconstructions.
      target: `[B, ...]` the truth.

    Returns:
      `[B]` int32 permutation: `x[order]` lies row by row on `target`. Rows that are not finite cost more than all
      others together.

    Raises:
      ValueError: for other shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> print(match_rows(jnp.array([[3.0], [1.0], [2.0]]), jnp.array([[1.1], [2.1], [3.1]])))
      [1 2 0]
    """
    x, target = _check(x, target)
    rows = x.shape[0]
    cost = jax.vmap(lambda y: _squared_errors(x, jnp.broadcast_to(y[None], x.shape)))(target)
    finite = jnp.isfinite(cost)
    worst = jnp.where(finite, cost, jnp.zeros((), cost.dtype)).sum()
    return _assignment(jnp.where(finite, cost, 1 + rows * worst))


def _assignment(cost: jax.Array) -> jax.Array:
    """`[B]` int32, the column of every row in an assignment of least total cost `[B, B]`."""
    size, dtype = cost.shape[0], cost.dtype
    infinity = jnp.asarray(jnp.inf, dtype)
    # Column `size` is the root of the path: it holds the row that is being placed.
    free = jnp.asarray(size, jnp.int32)

    def place(carry: tuple[jax.Array, jax.Array, jax.Array], row: jax.Array) -> tuple[tuple, None]:
        by_row, by_column, holder = carry
        holder = holder.at[size].set(row)

        def grow(state: tuple) -> tuple:
            by_row, by_column, nearest, before, done, column = state
            done = done.at[column].set(True)
            here = holder[column]
            reduced = cost[here] - by_row[here] - by_column[:size]
            nearer = ~done[:size] & (reduced < nearest)
            nearest = jnp.where(nearer, reduced, nearest)
            before = jnp.where(nearer, column, before)
            open_ = jnp.where(done[:size], infinity, nearest)
            step = open_.min()
            moved = jnp.zeros(size + 1, dtype).at[jnp.where(done, holder, size)].add(jnp.where(done, step, 0))
            by_row = by_row + moved[:size]
            by_column = jnp.where(done, by_column - step, by_column)
            nearest = jnp.where(done[:size], nearest, nearest - step)
            return by_row, by_column, nearest, before, done, jnp.argmin(open_).astype(jnp.int32)

        def back(state: tuple) -> tuple:
            holder, column = state
            previous = before[column]
            return holder.at[column].set(holder[previous]), previous

        state = (
            by_row,
            by_column,
            jnp.full(size, jnp.inf, dtype),
            jnp.full(size, size, jnp.int32),
            jnp.zeros(size + 1, bool),
            free,
        )
        by_row, by_column, _, before, _, column = jax.lax.while_loop(lambda s: holder[s[-1]] < size, grow, state)
        holder, _ = jax.lax.while_loop(lambda s: s[1] != size, back, (holder, column))
        return (by_row, by_column, holder), None

    start = jnp.zeros(size, dtype), jnp.zeros(size + 1, dtype), jnp.full(size + 1, size, jnp.int32)
    (_, _, holder), _ = jax.lax.scan(place, start, jnp.arange(size, dtype=jnp.int32))
    return jnp.zeros(size, jnp.int32).at[holder[:size]].set(jnp.arange(size, dtype=jnp.int32))


def label_accuracy(labels: jax.Array, targets: jax.Array) -> jax.Array:
    """Share of the true labels that were found, whatever the order: `sum_k min(n_k, m_k) / B`.

    Args:
      labels: `[B]` integers.
      targets: `[B]` integers, the truth.

    Returns:
      float32 scalar.

    Raises:
      TypeError: for labels that are no integers.
      ValueError: for other shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> print(label_accuracy(jnp.array([1, 2, 2, 0]), jnp.array([2, 1, 1, 0])))
      0.75
    """
    labels, targets = jnp.asarray(labels), jnp.asarray(targets)
    for name, value in (("labels", labels), ("targets", targets)):
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise TypeError(f"{name} must be integers, got {value.dtype}.")
    if labels.ndim != 1 or labels.shape != targets.shape or labels.size == 0:
        raise ValueError(f"labels and targets must be [B], got {labels.shape} and {targets.shape}.")
    # The nth time that a label comes up is found if it is at least n times among the true ones.
    labels = labels.astype(targets.dtype)
    earlier = jnp.tril(labels[:, None] == labels[None, :]).sum(axis=1)
    found = earlier <= (labels[:, None] == targets[None, :]).sum(axis=1)
    return found.mean(dtype=jnp.float32)


def reconstruction(x: jax.Array, target: jax.Array, *, data_range: float | jax.Array = 1.0) -> Reconstruction:
    """Compares images with the true ones that they are nearest to, one to one.

    Args:
      x: `[B, H, W, F]` reconstructions, in any order.
      target: `[B, H, W, F]` the truth.
      data_range: largest minus least possible value.

    Returns:
      A `Reconstruction`.

    Raises:
      ValueError: for other shapes, sides below 11 or a range that is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> images = jax.random.uniform(jax.random.key(0), (3, 12, 12, 1))
      >>> scores = reconstruction(images[::-1] + 0.1, images)
      >>> print(scores.order, scores.psnr.round(1))
      [2 1 0] [20. 20. 20.]
    """
    order = match_rows(x, target)
    matched = jnp.asarray(x)[order]
    a, b = _check(matched, target)
    scores = ssim(matched, target, data_range=data_range)
    return Reconstruction(_squared_errors(a, b), psnr(matched, target, data_range=data_range), scores, order)
