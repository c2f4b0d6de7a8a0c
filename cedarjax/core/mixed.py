"""Mixed-mode derivatives: gradients whose own derivative is a forward-over-reverse Hessian-vector product.

Reference: Kemaev, Calian, Zintgraf, Farquhar, van Hasselt, `Scalable Meta-Learning via Mixed-Mode Differentiation
<https://arxiv.org/abs/2505.00793>`_, 2025 (MixFlow-MG).

To differentiate through a step of gradient descent, reverse over reverse mode keeps what the gradient's own forward and
backward pass computed and walks through all of it backwards. But all that the backward pass asks for is the product of
a vector with second derivatives of a scalar, and those do not depend on the order. So the gradient is pushed forward
along the vector instead, and nothing but the arguments is kept.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as jex

from cedarjax.core.types import Params, PyTree


def mixed_value_and_grad(fun: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, Params]]:
    """`jax.value_and_grad(fun)`, with another way to the same second derivatives.

    With `v` the cotangent of the gradient and `a` any other argument::

        params_bar = d/de grad_params fun(params + e v, a) = H v
        a_bar      = d/de grad_a      fun(params + e v, a)

    plus the cotangent of the value times the gradient. Whatever `fun` takes or closes over is differentiated, if
    something that is differentiated reaches it; what is not, data and keys, costs nothing.

    Args:
      fun: `(params, *args) -> scalar`, twice differentiable.

    Returns:
      `(params, *args) -> (value, gradient)` for reverse mode, under jit, vmap, scan and `jax.checkpoint`. Reverse mode
      may be taken again, but forward mode over it is an error, as for any `jax.custom_vjp`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> step = lambda w: w - 0.1 * mixed_value_and_grad(lambda w: w**4)(w)[1]
      >>> print(jax.grad(step)(jnp.float32(1.0)))  # 1 - 0.1 * 12
      -0.20000005
    """

    def value_and_grad(params: Params, *args: PyTree) -> tuple[jax.Array, Params]:
        # Tracing turns what `fun` closes over into arguments: a rule for derivatives must not close over it.
        closed, _ = jax.make_jaxpr(fun, return_shape=True)(params, *args)
        leaves, structure = jax.tree.flatten(params)

        def value(*leaves: jax.Array) -> jax.Array:
            consts, given = leaves[: len(closed.consts)], leaves[len(closed.consts) :]
            (result,) = jex.jaxpr_as_fun(jex.ClosedJaxpr(closed.jaxpr, list(consts)))(*given)
            return result

        start = len(closed.consts)
        places = tuple(range(start, start + len(leaves)))
        result, gradient = _value_and_gradient(value, places)(*closed.consts, *leaves, *jax.tree.leaves(args))
        return result, jax.tree.unflatten(structure, gradient)

    return value_and_grad


def _value_and_gradient(value: Callable[..., jax.Array], places: tuple[int, ...]) -> Callable[..., Any]:
    """`value` of leaves and its gradient in those at `places`."""

    @jax.custom_vjp
    def value_and_gradient(*leaves: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return jax.value_and_grad(value, places)(*leaves)

    def forward(*primals: Any) -> tuple[Any, Any]:
        leaves = tuple(primal.value for primal in primals)
        # Which leaves matter is known here only. A residual must be an array, so it goes along as structure.
        marks = tuple(() if primal.perturbed else None for primal in primals)
        return value_and_gradient(*leaves), (leaves, marks)

    def backward(residuals: Any, cotangents: Any) -> tuple[jax.Array | None, ...]:
        leaves, marks = residuals
        value_bar, gradient_bar = cotangents
        wanted = tuple(i for i, mark in enumerate(marks) if mark is not None)

        def gradients(*params: jax.Array) -> tuple[jax.Array, ...]:
            return jax.grad(value, wanted)(*_replaced(leaves, places, params))

        params = tuple(leaves[i] for i in places)
        along = tuple(jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in gradient_bar)
        first, second = jax.jvp(gradients, params, along)
        if not isinstance(value_bar, SymbolicZero):
            second = tuple(value_bar.astype(g.dtype) * g + h for g, h in zip(first, second, strict=True))
        return _replaced((None,) * len(leaves), wanted, second)

    value_and_gradient.defvjp(forward, backward, symbolic_zeros=True)
    return value_and_gradient


def _replaced(values: Sequence[Any], places: Sequence[int], new: Sequence[Any]) -> tuple[Any, ...]:
    at = dict(zip(places, new, strict=True))
    return tuple(at.get(i, x) for i, x in enumerate(values))
