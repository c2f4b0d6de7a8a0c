"""Sums and inner products over clients of low-rank updates, from their factors.

All functions take a `LowRank` with a client axis: `left [C, R, m]`, `right [C, R, n]`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from cedarjax.core.lowrank.node import LowRank

_HIGHEST = lax.Precision.HIGHEST
_BLOCK = 2**22  # numbers of the dense updates that are built at once where they are cheaper than the factors


def combination(coefficients: jax.Array, x: LowRank, dtype: jnp.dtype) -> jax.Array:
    """`sum_i c_i left_i^T right_i` as one product over all rows of all clients.

    Args:
      coefficients: `[C]`.
      x: updates.
      dtype: of the accumulation.

    Returns:
      `[m, n]` in that dtype.
    """
    right = x.right * coefficients.astype(x.right.dtype)[:, None, None]
    left, right = (factor.reshape(-1, factor.shape[-1]) for factor in (x.left, right))
    return lax.dot_general(left, right, (((0,), (0,)), ((), ())), precision=_HIGHEST, preferred_element_type=dtype)


def products(x: LowRank, dtype: jnp.dtype) -> jax.Array:
    """Inner products between all pairs of clients.

    `<left_i^T right_i, left_j^T right_j> = sum_rs (left_i left_j^T)_rs (right_i right_j^T)_rs` takes `C^2 R^2 (m + n)`
    multiplications; where the dense updates take fewer, `C^2 m n`, they are built for a few rows of the matrix at once.

    Args:
      x: updates.
      dtype: of the accumulation.

    Returns:
      `[C, C]` in that dtype.
    """
    count, rank, rows = x.left.shape
    columns = x.right.shape[-1]
    if rank * rank * (rows + columns) <= rows * columns:
        return _factor_products(x, dtype)
    width = max(1, min(rows, _BLOCK // (count * columns)))
    padded = -(-rows // width) * width
    left = jnp.pad(x.left, ((0, 0), (0, 0), (0, padded - rows)))

    def add_block(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        part = lax.dynamic_slice_in_dim(left, start, width, axis=2)
        block = lax.dot_general(part, x.right, (((1,), (1,)), ((0,), (0,))), precision=_HIGHEST)
        flat = block.reshape(count, -1)
        return total + jnp.matmul(flat, flat.T, precision=_HIGHEST, preferred_element_type=dtype), None

    starts = jnp.arange(0, padded, width, dtype=jnp.int32)
    return lax.scan(add_block, jnp.zeros((count, count), dtype), starts)[0]


def _factor_products(x: LowRank, dtype: jnp.dtype) -> jax.Array:
    count, rank, _ = x.left.shape

    def with_all(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        """`[C]` products of one client, factors `[R, m]` and `[R, n]`, with all."""
        both = [
            lax.dot_general(mine, theirs, (((1,), (2,)), ((), ())), precision=_HIGHEST, preferred_element_type=dtype)
            for mine, theirs in zip(one, (x.left, x.right), strict=True)
        ]  # [R, C, R] each
        return jnp.sum(both[0] * both[1], axis=(0, 2))

    batch_size = max(1, _BLOCK // (count * rank * rank))
    return lax.map(with_all, (x.left, x.right), batch_size=min(batch_size, count))


def sq_norms(x: LowRank, dtype: jnp.dtype) -> jax.Array:
    """Squared Frobenius norm of each client's update.

    Args:
      x: updates.
      dtype: of the accumulation.

    Returns:
      `[C]` in that dtype, at least 0.
    """
    both = [
        jnp.einsum("crk,csk->crs", f, f, precision=_HIGHEST, preferred_element_type=dtype) for f in (x.left, x.right)
    ]
    return jnp.maximum(jnp.sum(both[0] * both[1], axis=(1, 2)), 0)
