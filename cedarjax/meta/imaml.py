"""iMAML: the meta-gradient at the solution of a regularised inner problem, whatever steps led there.

Reference: Rajeswaran, Finn, Kakade, Levine, `Meta-Learning with Implicit Gradients <https://arxiv.org/abs/1909.04630>`_,
2019. The published code adds constants of its own to the identity and to `lam` when it solves the linear system; here
it is the paper's, with damping only if asked for.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.sparse.linalg import cg

from cedarjax.core import ClientData, LocalUpdate, LossFn, Params, PyTree, Upload, accumulator, check_positive
from cedarjax.meta.inner import check_options, inner_loop, objectives


class ImamlInfo(NamedTuple):
    """What one client's implicit meta-gradient tells."""

    loss: jax.Array
    """Query loss at the inner solution: the meta objective."""
    support_loss: jax.Array
    """Loss of the first inner step, before any adaptation."""
    inner_residual: jax.Array
    """Norm of the gradient of the inner problem at the solution; the formula asks for 0."""
    residual: jax.Array
    """Norm of what is left of the linear system, over that of its right-hand side."""


def imaml(
    loss_fn: LossFn,
    inner_tx: optax.GradientTransformation,
    num_steps: int,
    lam: float | jax.Array,
    *,
    cg_steps: int = 10,
    cg_tol: float = 1e-6,
    damping: float | jax.Array = 0.0,
    query_batch_size: int | None = None,
) -> LocalUpdate:
    """The implicit meta-gradient, in the memory of one inner step however many there are.

    The inner steps go from the received `w` towards `v* = argmin loss(v; support) + lam / 2 ||v - w||^2`. With `H` the
    Hessian of the support loss where they end, conjugate gradients solve::

        (I + H / lam + damping I) delta = grad loss(v; query)

    Each of their steps is one Hessian-vector product. They ask for a matrix that is positive definite: `lam` above the
    most negative curvature of the support loss, or damping.

    Args:
      loss_fn: `(params, batch, key) -> scalar`, a mean over examples, see `core.mean_loss`.
      inner_tx: any optax optimiser; nothing is differentiated through it.
      num_steps: inner steps, enough of them to come near the solution.
      lam: strength of the pull to `w`, positive. A traced scalar is allowed.
      cg_steps: most steps of conjugate gradients; the paper takes 5.
      cg_tol: they end when the residual is so small against the right-hand side.
      damping: added to the diagonal, at least 0. A traced scalar is allowed.
      query_batch_size: query examples in the outer loss; default: all of them. Inner steps take all support examples,
        since the implicit gradient belongs to one fixed inner problem.

    Returns:
      A `LocalUpdate` over `ClientData` without client state, info `ImamlInfo`. Its delta is a gradient, so the server
      needs an optimiser with a learning rate.

    Raises:
      ValueError: if a count, `lam` or `cg_tol` is not positive, or `damping` is negative.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> loss_fn = lambda w, x, key: 0.5 * jnp.mean((w - x) ** 2)
      >>> data = cj.ClientData(jnp.array([4.0, 8.0]), num_examples=jnp.int32(2), num_support=jnp.int32(1))
      >>> local = cj.meta.imaml(loss_fn, optax.sgd(0.5), 1, lam=1.0)
      >>> print(local.update(jnp.float32(0.0), (), data, jax.random.key(0))[0].delta)  # (2 - 8) / (1 + 1)
      -3.0
    """
    check_options(num_steps=num_steps, query_batch_size=query_batch_size)
    check_positive(cg_steps=cg_steps)
    for name, value in {"lam": lam, "cg_tol": cg_tol}.items():
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")
    if isinstance(damping, int | float) and not damping >= 0:
        raise ValueError(f"damping must be at least 0, got {damping}.")

    def update(
        shared: Params, client_state: PyTree, data: ClientData, key: jax.Array
    ) -> tuple[Upload, PyTree, ImamlInfo]:
        support, query_loss = objectives(loss_fn, data, key, num_steps=num_steps, query_batch_size=query_batch_size)

        def pulled(grads: Params, params: Params) -> Params:
            return jax.tree.map(lambda g, p, s: g + jnp.asarray(lam, g.dtype) * (p - s), grads, params, shared)

        def gradient(params: Params) -> Params:
            return support.value_and_grad(params, jnp.int32(0))[1]

        params, before = inner_loop(support, inner_tx, shared, num_steps, adjust_fn=pulled)
        loss, target = jax.value_and_grad(query_loss)(params)
        wide = _widened(target)

        def matrix(vector: Params) -> Params:
            tangent = jax.tree.map(lambda x, p: x.astype(p.dtype), vector, params)
            curved = jax.jvp(gradient, (params,), (tangent,))[1]

            def combined(x: jax.Array, h: jax.Array) -> jax.Array:
                return (1 + jnp.asarray(damping, x.dtype)) * x + h.astype(x.dtype) / jnp.asarray(lam, x.dtype)

            return jax.tree.map(combined, vector, curved)

        solution, _ = cg(matrix, wide, tol=cg_tol, maxiter=cg_steps)
        left = optax.tree.sub(wide, matrix(solution))
        size = optax.tree.norm(wide)
        residual = optax.tree.norm(left) / jnp.where(size > 0, size, jnp.ones_like(size))
        inner_residual = optax.tree.norm(_widened(pulled(gradient(params), params)))
        delta = jax.tree.map(lambda x, p: x.astype(p.dtype), solution, shared)
        return Upload(delta), client_state, ImamlInfo(loss, before, inner_residual, residual)

    return LocalUpdate(lambda params: (), update)


def _widened(tree: PyTree) -> PyTree:
    """A tree in the dtype in which inner products are taken."""
    return jax.tree.map(lambda x: x.astype(accumulator(*jax.tree.leaves(tree))), tree)
