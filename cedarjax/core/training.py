"""What every client's training is made of: a step of an optimiser, and a number of steps over a stream of batches."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from cedarjax.core.batches import Stream, take_batch
from cedarjax.core.steps import masked_scan
from cedarjax.core.types import LossFn, Params, PyTree

AdjustFn = Callable[[Params, Params], Params]


def optimiser_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    params: Params,
    opt_state: PyTree,
    batch: PyTree,
    key: jax.Array,
    adjust_fn: AdjustFn | None = None,
) -> tuple[Params, PyTree, jax.Array]:
    """`theta <- theta + tx.update(grad loss(theta; batch))`.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      tx: optax optimiser.
      params: parameters before the step.
      opt_state: its state.
      batch: leaves `[B, ...]`.
      key: PRNG key of the loss.
      adjust_fn: `(grads, params) -> grads`, applied before the optimiser sees the gradient.

    Returns:
      Parameters and state after the step, and the loss before it.
    """
    loss, grads = jax.value_and_grad(loss_fn)(params, batch, key)
    grads = grads if adjust_fn is None else adjust_fn(grads, params)
    step, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, step), opt_state, loss


def train(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    params: Params,
    examples: PyTree,
    stream: Stream,
    key: jax.Array,
    *,
    batch_size: int,
    num_steps: jax.Array | int,
    max_steps: int,
    adjust_fn: AdjustFn | None = None,
) -> tuple[Params, jax.Array]:
    """Steps of a fresh optimiser over the batches of a stream.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      tx: optax optimiser.
      params: where training starts.
      examples: leaves `[M, ...]`.
      stream: order of the rows, from `shuffled_epochs`.
      key: PRNG key; step `t` uses `fold_in(key, t)`.
      batch_size: examples per batch.
      num_steps: steps to do, an int32 scalar or a Python int.
      max_steps: static bound on them.
      adjust_fn: as in `optimiser_step`.

    Returns:
      Parameters after the last step, and the mean of the batch losses, each taken before its step.
    """

    def step(carry: tuple[Params, PyTree], index: jax.Array) -> tuple[tuple[Params, PyTree], jax.Array]:
        batch = take_batch(examples, stream, index, batch_size)
        *carry_after, loss = optimiser_step(loss_fn, tx, *carry, batch, jax.random.fold_in(key, index), adjust_fn)
        return tuple(carry_after), loss

    (params, _), loss = masked_scan(step, (params, tx.init(params)), num_steps, max_steps)
    return params, loss


def displacement(before: Params, after: Params) -> Params:
    """Pseudo-gradient of a client that moved, `before - after`.

    Args:
      before: parameters that were received.
      after: parameters after training.

    Returns:
      Tree shaped like the parameters.
    """
    return jax.tree.map(jnp.subtract, before, after)
