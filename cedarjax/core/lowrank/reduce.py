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
    """`sum_i c_i left_i^T right_i` as one product a pair of factors, over the rows of all clients.

    Args:
      coefficients: `[C]`.
      x: updates.
      dtype: of the accumulation.

    Returns:
      `[m, n]` in that dtype.
    """
    weights = coefficients.astype(dtype)[:, None, None]
    total = None
    for left, right in zip(x.lefts, x.rights, strict=True):
        weighted = (right.astype(dtype) * weights).astype(right.dtype)
        left, right = (factor.reshape(-1, factor.shape[-1]) for factor in (left, weighted))
        part = lax.dot_general(left, right, (((0,), (0,)), ((), ())), precision=_HIGHEST, preferred_element_type=dtype)
        total = part if total is None else total + part
    assert total is not None
    return total


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
    left, right = x.left, x.right
    count, rank, rows = left.shape
    columns = right.shape[-1]
    if rank * rank * (rows + columns) <= rows * columns:
        return _factor_products(left, right, dtype)
    width = max(1, min(rows, _BLOCK // (count * columns)))
    padded = -(-rows // width) * width
    left = jnp.pad(left, ((0, 0), (0, 0), (0, padded - rows)))

    def add_block(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        part = lax.dynamic_slice_in_dim(left, start, width, axis=2)
        block = lax.dot_general(part, right, (((1,), (1,)), ((0,), (0,))), precision=_HIGHEST)
        flat = block.reshape(count, -1)
        return total + jnp.matmul(flat, flat.T, precision=_HIGHEST, preferred_element_type=dtype), None

    starts = jnp.arange(0, padded, width, dtype=jnp.int32)
    return lax.scan(add_block, jnp.zeros((count, count), dtype), starts)[0]


def _factor_products(left: jax.Array, right: jax.Array, dtype: jnp.dtype) -> jax.Array:
    count, rank, _ = left.shape

    def with_all(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        """`[C]` products of one client, factors `[R, m]` and `[R, n]`, with all."""
        both = [
            lax.dot_general(mine, theirs, (((1,), (2,)), ((), ())), precision=_HIGHEST, preferred_element_type=dtype)
            for mine, theirs in zip(one, (left, right), strict=True)
        ]  # [R, C, R] each
        return jnp.sum(both[0] * both[1], axis=(0, 2))

    batch_size = max(1, _BLOCK // (count * rank * rank))
    return lax.map(with_all, (left, right), batch_size=min(batch_size, count))


def finite_rows(x: LowRank, dtype: jnp.dtype) -> jax.Array:
    """Which clients' matrices are finite.

    Args:
      x: updates.
      dtype: of the bound below, that of the matrix or wider.

    Returns:
      `[C]` bool: whether `sum_r |left_r|_1 |right_r|_1` is, which no number of the matrix exceeds. Factors can be
      finite where their product is not.
    """
    bound = jnp.zeros(x.shape[0], dtype)
    for factors in zip(x.lefts, x.rights, strict=True):
        left, right = (jnp.abs(factor).astype(dtype).sum(axis=-1) for factor in factors)
        bound = bound + (left * right).sum(axis=-1)
    return jnp.isfinite(bound)


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
