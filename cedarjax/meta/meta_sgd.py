"""Meta-SGD: the initialisation and a rate for every parameter are learnt together.

Reference: Li, Zhou, Chen, Li, `Meta-SGD: Learning to Learn Quickly for Few-Shot Learning
<https://arxiv.org/abs/1707.09835>`_, 2017. The paper takes one inner step; more take the same rates again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cedarjax.core import ClientData, LocalUpdate, LossFn, Params, PyTree, Upload
from cedarjax.meta.inner import Mode, check_options, inner_loop, objectives


class MetaSgdParams(NamedTuple):
    """What the server learns and broadcasts."""

    params: Params
    """The initialisation."""
    rates: Params
    """Learning rates shaped like it. A server step may make some of them negative; that is part of the method."""


class MetaSgdInfo(NamedTuple):
    """What one client's meta-gradient tells."""

    loss: jax.Array
    """Query loss after the inner steps: the meta objective."""
    support_loss: jax.Array
    """Loss of the first inner step, before any adaptation."""


def elementwise_sgd(rates: Params) -> optax.GradientTransformation:
    """SGD with a rate for every parameter, `theta <- theta - rates * grads`.

    Args:
      rates: tree shaped like the parameters.

    Returns:
      An optax transformation without state; differentiable in the rates.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = elementwise_sgd({"w": jnp.array([0.1, 0.5])})
      >>> print(tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))[0]["w"])
      [-0.1 -0.5]
    """

    def init(params: Params) -> optax.EmptyState:
        return optax.EmptyState()

    def update(
        updates: Params, state: optax.EmptyState, params: Params | None = None
    ) -> tuple[Params, optax.EmptyState]:
        return jax.tree.map(lambda g, rate: -rate * g, updates, rates), state

    return optax.GradientTransformation(init, update)


def meta_sgd(
    loss_fn: LossFn,
    num_steps: int = 1,
    rate: float | jax.Array = 0.01,
    *,
    first_order: bool = False,
    mode: Mode = "reverse",
    remat: bool = True,
    batch_size: int | None = None,
    query_batch_size: int | None = None,
) -> LocalUpdate:
    """The gradient of the adapted loss in the initialisation and in the rates of the inner steps.

    `theta_{t+1} = theta_t - rates * grad loss(theta_t; support)`, and
    `delta = d/d (theta, rates) loss(theta_m; query)`. A device adapts by `adapt(loss_fn, elementwise_sgd(shared.rates),
    num_steps)` from `shared.params`.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      num_steps: inner steps.
      rate: what all rates are at first. A traced scalar is allowed.
      first_order: take `d theta_m / d theta` as the identity, and the inner gradients as constants for the rates.
      mode: as in `maml`.
      remat: as in `maml`.
      batch_size: support examples per inner step, as in `maml`; default: all of them, each step.
      query_batch_size: query examples in the outer loss; default: all of them.

    Returns:
      A `LocalUpdate` over `ClientData` without client state, info `MetaSgdInfo`; it shares a `MetaSgdParams`.

    Raises:
      ValueError: if a count is not positive or the mode unknown.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> loss_fn = lambda w, x, key: 0.5 * jnp.mean((w - x) ** 2)
      >>> data = cj.ClientData(jnp.array([1.0, 2.0]), num_examples=jnp.int32(2), num_support=jnp.int32(1))
      >>> local = cj.meta.meta_sgd(loss_fn, rate=0.5)
      >>> delta = local.update(local.share(jnp.float32(0.0)), (), data, jax.random.key(0))[0].delta
      >>> print(delta.params, delta.rates)  # (0.5 - 2) * (1 - 0.5), and (0.5 - 2) * 1
      -0.75 -1.5
    """
    check_options(num_steps=num_steps, mode=mode, batch_size=batch_size, query_batch_size=query_batch_size)

    def share(params: Params) -> MetaSgdParams:
        rates = jax.tree.map(lambda p: jnp.broadcast_to(jnp.asarray(rate, p.dtype), p.shape), params)
        return MetaSgdParams(params, rates)

    def update(
        shared: MetaSgdParams, client_state: PyTree, data: ClientData, key: jax.Array
    ) -> tuple[Upload, PyTree, MetaSgdInfo]:
        support, query_loss = objectives(
            loss_fn, data, key, num_steps=num_steps, batch_size=batch_size, query_batch_size=query_batch_size
        )

        def meta_loss(shared: MetaSgdParams) -> tuple[jax.Array, jax.Array]:
            tx = elementwise_sgd(shared.rates)
            params, before = inner_loop(
                support, tx, shared.params, num_steps, first_order=first_order, mode=mode, remat=remat
            )
            return query_loss(params), before

        (loss, before), delta = jax.value_and_grad(meta_loss, has_aux=True)(shared)
        return Upload(delta), client_state, MetaSgdInfo(loss, before)

    return LocalUpdate(lambda params: (), update, share, lambda shared, client_state: shared.params)
