"""Distances and combinations where clients left layers out."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cedarjax.core.inner import centered_gram, products
from cedarjax.core.lowrank import is_low_rank
from cedarjax.core.trees import sq_norms
from cedarjax.core.types import PyTree


def layered_gram(updates: PyTree, weights: PyTree, *, mesh: Mesh | None = None) -> jax.Array:
    """Inner products whose distances are those over the layers that both clients uploaded, scaled to all parameters.

    `d_ij = D / sum_l u_il u_jl D_l * sum_l u_il u_jl |x_il - x_jl|^2`, and of clients that have no layer in common the
    largest distance of all. The result is `-J d J / 2` with the centring matrix `J` of the present clients.

    Args:
      updates: tree with leaves `[C, ...]`.
      weights: tree of `[C]` leaves shaped like the updates; 0 = not uploaded.
      mesh: mesh over which the client axis lies.

    Returns:
      `[C, C]`, float32 or wider; rows and columns of clients that uploaded nothing are 0.

    Example:
      >>> import jax.numpy as jnp
      >>> updates = {"a": jnp.array([[0.0], [3.0]]), "b": jnp.array([[0.0], [9.0]])}
      >>> weights = {"a": jnp.array([1.0, 1.0]), "b": jnp.array([1.0, 0.0])}
      >>> gram = layered_gram(updates, weights)
      >>> print(gram[0, 0] + gram[1, 1] - 2 * gram[0, 1])
      18.0
    """
    leaves = jax.tree.leaves(updates, is_leaf=is_low_rank)
    uploads = [w > 0 for w in jax.tree.leaves(weights)]
    total = common = None
    for x, uploaded in zip(leaves, uploads, strict=True):
        gram = centered_gram(x, uploaded, mesh=mesh)
        squares = jnp.diagonal(gram)
        both = uploaded[:, None] & uploaded[None, :]
        distances = jnp.where(both, jnp.maximum(squares[:, None] + squares[None, :] - gram - gram.T, 0), 0)
        size = jnp.where(both, jnp.asarray(x.size // x.shape[0], gram.dtype), 0)
        total = distances if total is None else total + distances.astype(total.dtype)
        common = size if common is None else common + size.astype(common.dtype)
    assert total is not None and common is not None
    num_params = sum(x.size // x.shape[0] for x in leaves)
    scaled = total * (num_params / jnp.where(common > 0, common, 1))
    present = jnp.stack(uploads).any(axis=0)
    both = present[:, None] & present[None, :]
    scaled = jnp.where(both, jnp.where(common > 0, scaled, scaled.max()), 0)
    scaled = jnp.where(jnp.eye(present.size, dtype=bool), 0, scaled)
    mean = present.astype(scaled.dtype) / jnp.maximum(present.sum(dtype=jnp.int32), 1).astype(scaled.dtype)
    centring = jnp.where(present[:, None], jnp.eye(present.size, dtype=scaled.dtype) - mean[None, :], 0)
    return -products(centring, scaled) / 2


def layered_sq_norms(updates: PyTree, weights: PyTree) -> jax.Array:
    """Squared lengths over the layers that each client uploaded, scaled to all parameters.

    `|x_i|^2 = D / sum_l u_il D_l * sum_l u_il |x_il|^2`.

    Args:
      updates: tree with leaves `[C, ...]`.
      weights: tree of `[C]` leaves shaped like the updates; 0 = not uploaded.

    Returns:
      `[C]`, float32 or wider; 0 for clients that uploaded nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> updates = {"a": jnp.array([[3.0], [4.0]]), "b": jnp.array([[1.0], [jnp.nan]])}
      >>> print(layered_sq_norms(updates, {"a": jnp.array([1.0, 1.0]), "b": jnp.array([1.0, 0.0])}))
      [10. 32.]
    """
    leaves = jax.tree.leaves(updates, is_leaf=is_low_rank)
    uploads = [w > 0 for w in jax.tree.leaves(weights)]
    sizes = [x.size // x.shape[0] for x in leaves]
    squares = [jnp.where(u, sq_norms(x), 0) for u, x in zip(uploads, leaves, strict=True)]
    total = functools.reduce(jnp.add, squares)
    sent = sum(jnp.where(u, jnp.asarray(size, total.dtype), 0) for u, size in zip(uploads, sizes, strict=True))
    return jnp.where(sent > 0, total * (sum(sizes) / jnp.where(sent > 0, sent, 1)), 0)


def renormalised(coefficients: jax.Array, weights: PyTree) -> PyTree:
    """Coefficients for each layer, shared among the clients that uploaded it.

    `c_il = c_i u_il sum_j c_j / sum_j c_j u_jl`, and 0 where the clients that uploaded a layer have no share.

    Args:
      coefficients: `[C]`.
      weights: tree of `[C]` leaves; 0 = not uploaded.

    Returns:
      Tree of `[C]` leaves.

    Example:
      >>> import jax.numpy as jnp
      >>> print(renormalised(jnp.array([0.25, 0.75]), {"a": jnp.array([1.0, 0.0])}))
      {'a': Array([1., 0.], dtype=float32)}
    """

    def of_layer(w: jax.Array) -> jax.Array:
        kept = jnp.where(w > 0, coefficients, 0)
        share = kept.sum()
        return jnp.where(share == 0, 0, kept * (coefficients.sum() / jnp.where(share == 0, 1, share)))

    return jax.tree.map(of_layer, weights)
