"""The direction in which clients differ most, from their inner products."""

import jax
import jax.numpy as jnp
from jax import lax

_HIGHEST = lax.Precision.HIGHEST


def about(gram: jax.Array, coefficients: jax.Array) -> jax.Array:
    """Inner products about a combination of the clients.

    Args:
      gram: `[C, C]` inner products about any centre.
      coefficients: `[C]`, adding up to 1.

    Returns:
      `[C, C]`, `<x_i - m, x_j - m>` with `m = sum_k a_k x_k`.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([1.0, 3.0])
      >>> print(about(x[:, None] * x[None, :], jnp.array([0.5, 0.5])))
      [[ 1. -1.]
       [-1.  1.]]
    """
    moved = gram - jnp.matmul(coefficients, gram, precision=_HIGHEST)[None, :]
    return moved - jnp.matmul(moved, coefficients, precision=_HIGHEST)[:, None]


def top_eigenpair(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The greatest eigenvalue of a positive semidefinite matrix, and its eigenvector.

    By squaring the matrix until it is of rank one: `k` products of matrices are `2^k` steps of the power method. Two
    eigenvalues are told apart down to where rounding blurs them, as by `eigh`, which takes longer on CPUs that are busy
    and on accelerators.

    Args:
      matrix: `[C, C]`, symmetric.

    Returns:
      The eigenvalue, a scalar, and the eigenvector `[C]` of length 1; zeros for a matrix of zeros.

    Example:
      >>> import jax.numpy as jnp
      >>> value, vector = top_eigenpair(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
      >>> print(value.round(4), jnp.abs(vector).round(4))
      3.0 [0.7071 0.7071]
    """
    eps = jnp.finfo(matrix.dtype).eps
    max_squarings = jnp.finfo(matrix.dtype).nmant + 4

    def scaled(x: jax.Array) -> jax.Array:
        trace = jnp.trace(x)
        return x / jnp.where(trace > 0, trace, 1)

    def goes_on(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        _, purity, num_squarings = state
        return (purity < 1 - 8 * eps) & (num_squarings < max_squarings)

    def square(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        x, _, num_squarings = state
        squared = jnp.matmul(x, x, precision=_HIGHEST)
        # Of a matrix of trace 1 the squared one has trace 1 only if it is of rank one.
        return scaled(squared), jnp.trace(squared), num_squarings + 1

    start = scaled(matrix / jnp.maximum(jnp.abs(matrix).max(), jnp.finfo(matrix.dtype).tiny))
    x = lax.while_loop(goes_on, square, (start, jnp.zeros((), matrix.dtype), jnp.zeros((), jnp.int32)))[0]
    vector = x[jnp.argmax(jnp.diagonal(x))]
    length = jnp.sqrt(jnp.square(vector).sum())
    vector = vector / jnp.where(length > 0, length, 1)
    value = jnp.matmul(jnp.matmul(matrix, vector, precision=_HIGHEST), vector, precision=_HIGHEST)
    return jnp.maximum(value, 0), vector
