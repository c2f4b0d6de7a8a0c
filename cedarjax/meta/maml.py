"""MAML and first-order MAML as a client's work.

Reference: Finn, Abbeel, Levine, `Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks
<https://arxiv.org/abs/1703.03400>`_, 2017.

A client uploads its meta-gradient, so one round is one step of the server's optimiser on the mean over clients. Second
order needs the inner optimiser to be differentiable: `optax.sgd`, momentum, and Adam with `eps_root > 0` are; with
`eps_root=0` Adam's square root has an infinite slope wherever a gradient is exactly 0, and the meta-gradient is NaN.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cedarjax.core import (
    ClientData,
    LocalUpdate,
    LossFn,
    Params,
    PyTree,
    Representation,
    Upload,
    check_positive,
    mean_loss,
    represented,
    shuffled_epochs,
    take_batch,
)

StepLoss = Callable[[Params, jax.Array, jax.Array], jax.Array]


class MamlInfo(NamedTuple):
    """What one client's meta-gradient tells."""

    loss: jax.Array
    """Query loss after the inner steps: the meta objective."""
    support_loss: jax.Array
    """Loss of the first inner step, before any adaptation."""
    rank: PyTree = ()
    """int32 a parameter: rank of its update where that is held by factors, 0 where it is dense; `()` if all are dense
    because `representation` says so."""


def maml(
    loss_fn: LossFn,
    inner_tx: optax.GradientTransformation,
    num_steps: int,
    *,
    first_order: bool = False,
    remat: bool = True,
    batch_size: int | None = None,
    query_batch_size: int | None = None,
    representation: Representation = "dense",
) -> LocalUpdate:
    """The exact gradient of the adapted loss with respect to the initialisation.

    `delta = d/d theta loss(theta_m(theta); query)`, where `theta_0 = theta` and
    `theta_{t+1} = theta_t + inner_tx.update(grad loss(theta_t; support))`.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      inner_tx: optax optimiser of the inner steps; differentiable unless `first_order`.
      num_steps: inner steps `m`.
      first_order: take `d theta_m / d theta` as the identity.
      remat: recompute each inner step in the backward pass. Memory then grows by one copy of the parameters and the
        optimiser's state per inner step, and no longer by all activations.
      batch_size: support examples per inner step, from shuffled epochs over the support set; default: all of them, each
        step. The default takes the exact mean over a ragged set by `core.mean_loss`, which asks for a loss that is a
        mean over examples.
      query_batch_size: query examples in the outer loss; default: all of them.
      representation: `"dense"`; `"lowrank"` to hold every matrix that enters through products by its exact factors,
        for optimisers that are linear in the gradients (SGD, momentum, weight decay); or `"auto"`, which does so where
        the factors have fewer numbers. See `core.lowrank`.

    Returns:
      A `LocalUpdate` over `ClientData` without client state, info `MamlInfo`. Its delta is a gradient, so the server
      needs an optimiser with a learning rate. A client without support examples takes its inner steps with gradient 0.

    Raises:
      ValueError: if a count is not positive, the representation unknown, or `"lowrank"` with an optimiser that is not
        linear.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> loss_fn = lambda w, x, key: 0.5 * jnp.mean((w - x) ** 2)
      >>> data = cj.ClientData(jnp.array([1.0, 2.0]), num_examples=jnp.int32(2), num_support=jnp.int32(1))
      >>> local = cj.meta.maml(loss_fn, optax.sgd(0.5), 1)
      >>> print(local.update(jnp.float32(0.0), (), data, jax.random.key(0))[0].delta)  # (0.5 - 2) * (1 - 0.5)
      -0.75
    """
    check_positive(num_steps=num_steps)
    for name, size in {"batch_size": batch_size, "query_batch_size": query_batch_size}.items():
        if size is not None:
            check_positive(**{name: size})

    def update(
        shared: Params, client_state: PyTree, data: ClientData, key: jax.Array
    ) -> tuple[Upload, PyTree, MamlInfo]:
        length = jax.tree.leaves(data.examples)[0].shape[0]
        support_key, query_key, loss_key = jax.random.split(key, 3)
        num_query = data.num_examples - data.num_support
        rows = jnp.arange(length, dtype=jnp.int32)

        def objective(
            start: jax.Array, count: jax.Array, size: int | None, order_key: jax.Array, num_epochs: int
        ) -> StepLoss:
            """Loss at one step over rows `[start, start + count)`: batches of `size`, or all rows."""
            if size is None:
                mask = (rows >= start) & (rows < start + count)
                return lambda params, index, key: mean_loss(loss_fn, params, data.examples, mask, key)
            stream = shuffled_epochs(order_key, start, count, length=length, num_epochs=num_epochs)

            def batch_loss(params: Params, index: jax.Array, key: jax.Array) -> jax.Array:
                batch = take_batch(data.examples, stream, index, size)
                return jnp.where(count > 0, loss_fn(params, batch, key), 0.0)

            return batch_loss

        # Each step gets a batch of its own as long as the epochs last: one epoch has at least one batch.
        support_loss = objective(jnp.int32(0), data.num_support, batch_size, support_key, num_steps)
        query_loss = objective(data.num_support, num_query, query_batch_size, query_key, 1)

        def inner_step(carry: tuple[Params, PyTree], index: jax.Array) -> tuple[tuple[Params, PyTree], jax.Array]:
            params, opt_state = carry
            # Cut at the parameters and not at the gradients: the optimiser reads them too, for weight decay say.
            at = jax.lax.stop_gradient(params) if first_order else params
            loss, grads = jax.value_and_grad(support_loss)(at, index, jax.random.fold_in(loss_key, index))
            step_update, opt_state = inner_tx.update(grads, opt_state, at)
            return (optax.apply_updates(params, step_update), opt_state), loss

        def meta_loss(params: Params) -> tuple[jax.Array, jax.Array]:
            opt_state = inner_tx.init(params)
            if first_order:
                opt_state = jax.lax.stop_gradient(opt_state)
            step = jax.checkpoint(inner_step, prevent_cse=False) if remat and not first_order else inner_step
            (adapted, _), losses = jax.lax.scan(step, (params, opt_state), jnp.arange(num_steps, dtype=jnp.int32))
            return query_loss(adapted, jnp.int32(0), jax.random.fold_in(loss_key, num_steps)), losses[0]

        (loss, first), delta = jax.value_and_grad(meta_loss, has_aux=True)(shared)
        return Upload(delta), client_state, MamlInfo(loss, first)

    def num_rows(data: ClientData) -> int:
        length = jax.tree.leaves(data.examples)[0].shape[0]
        support, query = (length if size is None else size for size in (batch_size, query_batch_size))
        return query if first_order else 2 * num_steps * support + query

    held = represented(update, representation, inner_tx, num_rows=num_rows)
    return LocalUpdate(lambda params: (), held)
