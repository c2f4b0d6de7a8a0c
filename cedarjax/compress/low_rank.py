"""One step of a power iteration: the low-rank approximation that PowerSGD sends.

Reference: Vogels et al., `PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization
<https://arxiv.org/abs/1905.13727>`_, 2019. Beyond the paper: columns that depend on others, a matrix of zeros among
them, give zeros in place of noise, and the direction that they started from is kept for the next step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core.dtypes import accumulator

_HIGHEST = jax.lax.Precision.HIGHEST


class Factors(NamedTuple):
    """A matrix `left right^T` of rank `r` at most."""

    left: jax.Array
    """`[m, r]`, orthonormal columns, or zeros where the matrix has a smaller rank."""
    right: jax.Array
    """`[n, r]`."""

    def product(self) -> jax.Array:
        """The matrix, `[m, n]`."""
        dtype = accumulator(self.left)
        left, right = self.left.astype(dtype), self.right.astype(dtype)
        return jnp.matmul(left, right.T, precision=_HIGHEST)


def unit_columns(x: jax.Array) -> jax.Array:
    """Columns of length 1; those of zeros stay so, and those that are not finite become NaN.

    Args:
      x: `[m, r]`.

    Returns:
      `[m, r]`.
    """
    largest = jnp.abs(x).max(axis=0, keepdims=True)
    x = x / jnp.where(largest == 0, jnp.ones_like(largest), largest)  # the squares of what is left do not overflow
    length = jnp.sqrt(jnp.square(x).sum(axis=0, keepdims=True))
    return x / jnp.where(length == 0, jnp.ones_like(length), length)


def orthogonalise(x: jax.Array) -> jax.Array:
    """Orthonormal columns with the span of the given ones, by the Gram-Schmidt process, done twice for rounding.

    Args:
      x: `[m, r]`, float32 or wider.

    Returns:
      `[m, r]`; a column that depends on those before it, to 100 times the rounding of its dtype, gives zeros.

    Example:
      >>> import jax.numpy as jnp
      >>> orthogonalise(jnp.array([[3.0, 6.0, 1.0], [4.0, 8.0, 0.0]])).round(3)
      Array([[ 0.6,  0. ,  0.8],
             [ 0.8,  0. , -0.6]], dtype=float32)
    """
    tolerance = 100 * float(jnp.finfo(x.dtype).eps)
    x = unit_columns(x)

    def place(j: jax.Array, done: jax.Array) -> jax.Array:
        column = jax.lax.dynamic_slice_in_dim(x, j, 1, axis=1)
        for _ in range(2):
            along = jnp.matmul(done.T, column, precision=_HIGHEST)
            column = column - jnp.matmul(done, along, precision=_HIGHEST)
        length = jnp.sqrt(jnp.square(column).sum())
        dependent = length <= tolerance  # False for NaN
        column = jnp.where(dependent, jnp.zeros_like(column), column / jnp.where(dependent, 1, length))
        return jax.lax.dynamic_update_slice_in_dim(done, column, j, axis=1)

    return jax.lax.fori_loop(0, x.shape[1], place, jnp.zeros_like(x))


def power_step(matrix: jax.Array, start: jax.Array) -> tuple[Factors, jax.Array]:
    """One step of a power iteration, `P = orth(M Q)` and `Q' = M^T P`, so that `P Q'^T = P P^T M`.

    The approximation is the matrix projected on the columns of `P`: never farther from it than 0 is, and the matrix
    itself if its rank is `r` at most and `Q` is in general position.

    Args:
      matrix: `[m, n]`.
      start: `[n, r]`, in float32 or wider; lengths of its columns do not matter.

    Returns:
      The factors, in the dtype of the matrix, and the start of the next step: `Q'` with columns of length 1, where they
      are neither zeros nor NaN, else those of `Q`.

    Example:
      >>> import jax.numpy as jnp
      >>> matrix = jnp.array([[1.0, 2.0], [2.0, 4.0], [0.0, 0.0]])
      >>> factors, start = power_step(matrix, jnp.array([[1.0], [0.0]]))
      >>> print(factors.product().round(4).tolist())
      [[1.0, 2.0], [2.0, 4.0], [0.0, 0.0]]
    """
    wide = matrix.astype(start.dtype)
    left = orthogonalise(jnp.matmul(wide, start, precision=_HIGHEST)).astype(matrix.dtype)
    right = jnp.matmul(wide.T, left.astype(start.dtype), precision=_HIGHEST)
    columns = unit_columns(right)
    usable = (jnp.square(columns).sum(axis=0, keepdims=True) > 0.5) & jnp.isfinite(columns).all(axis=0, keepdims=True)
    return Factors(left, right.astype(matrix.dtype)), jnp.where(usable, columns, start)


def matrix_shape(shape: Sequence[int], rank: int) -> tuple[int, int] | None:
    """The matrix that a leaf is taken for: its last axis, and all others.

    Args:
      shape: shape of the leaf.
      rank: rank of the approximation.

    Returns:
      `(m, n)`; or `None` if the leaf is a scalar or a vector, or its factors would be no smaller than itself.

    Example:
      >>> print(matrix_shape((3, 3, 16, 32), 2), matrix_shape((32,), 2), matrix_shape((4, 3), 2))
      (144, 32) None None
    """
    if len(shape) < 2:
        return None
    n = shape[-1]
    m = 1
    for size in shape[:-1]:
        m *= size
    return (m, n) if rank * (m + n) < m * n else None


def first_start(shape: Sequence[int], rank: int, seed: int, index: int, dtype: jnp.dtype) -> jax.Array | None:
    """The matrix `Q` that the first step of a leaf starts from, standard normal.

    Args:
      shape: shape of the leaf.
      rank: `r`.
      seed: seed that all clients share.
      index: place of the leaf in its tree.
      dtype: dtype of the leaf.

    Returns:
      `[n, r]`, in float32 or wider; `None` if the leaf is sent as it is.
    """
    matrix = matrix_shape(shape, rank)
    if matrix is None:
        return None
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), index)
    return jax.random.normal(key, (matrix[1], rank), accumulator(jnp.zeros((), dtype)))
