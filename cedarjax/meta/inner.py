"""What meta-gradients share: a client's support and query objectives, and the inner steps that adapt to the support."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from cedarjax.core import (
    ClientData,
    LossFn,
    Params,
    Part,
    PyTree,
    check_positive,
    mean_loss,
    merge,
    mixed_value_and_grad,
    partition,
    shuffled_epochs,
    take_batch,
    take_rows,
)

Mode: TypeAlias = Literal["reverse", "mixed"]
"""How inner steps are differentiated: reverse over reverse mode, or `core.mixed_value_and_grad`."""

BLOCK_SIZE = 1024
"""Rows that are worked on at once where a loss is taken over all rows."""


class Objective(NamedTuple):
    """A loss that is a sum over blocks of rows: derivatives take the memory of one block."""

    block_loss: Callable[[Params, jax.Array, jax.Array], jax.Array]
    """`(params, step, block) -> scalar`, step and block int32 scalars."""
    num_blocks: int = 1
    """Blocks, more than one if there are more than `BLOCK_SIZE` rows."""

    def value(self, params: Params, step: jax.Array) -> jax.Array:
        """The loss.

        Args:
          params: parameters.
          step: int32 scalar.

        Returns:
          Scalar.
        """
        return _total(lambda block: self.block_loss(params, step, block), self.num_blocks)

    def value_and_grad(
        self, params: Params, step: jax.Array, *, rest: Params | None = None, mode: Mode = "reverse"
    ) -> tuple[jax.Array, Params]:
        """Loss and gradient.

        Args:
          params: parameters, or the part of them in which the gradient is taken.
          step: int32 scalar.
          rest: the other parameters, see `core.merge`.
          mode: how the gradient is to be differentiated.

        Returns:
          The loss and its gradient.
        """
        transform = mixed_value_and_grad if mode == "mixed" else jax.value_and_grad

        def loss(part: Params, block: jax.Array) -> jax.Array:
            return self.block_loss(part if rest is None else merge(part, rest), step, block)

        return _total(lambda block: transform(loss)(params, block), self.num_blocks)


def _total(fun: Callable[[jax.Array], PyTree], num_blocks: int) -> PyTree:
    """`fun(0) + ... + fun(num_blocks - 1)`, each computed again in the backward pass."""
    if num_blocks == 1:
        return fun(jnp.int32(0))

    def add(total: PyTree, block: jax.Array) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, jax.checkpoint(fun, prevent_cse=False)(block)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fun, jnp.int32(0)))
    return jax.lax.scan(add, zeros, jnp.arange(num_blocks, dtype=jnp.int32))[0]


def check_options(*, num_steps: int, mode: str = "reverse", **sizes: int | None) -> None:
    """Raises unless counts are positive and the mode is known.

    Args:
      num_steps: inner steps.
      mode: `"reverse"` or `"mixed"`.
      **sizes: numbers of rows by name; `None` stands for all.

    Raises:
      ValueError: naming the argument and its value.
    """
    check_positive(num_steps=num_steps, **{name: size for name, size in sizes.items() if size is not None})
    if mode not in ("reverse", "mixed"):
        raise ValueError(f'mode must be "reverse" or "mixed", got {mode!r}.')


def objectives(
    loss_fn: LossFn,
    data: ClientData,
    key: jax.Array,
    *,
    num_steps: int,
    batch_size: int | None = None,
    query_batch_size: int | None = None,
) -> tuple[Objective, Callable[[Params], jax.Array]]:
    """The loss of each inner step on the support set, and the loss on the query set.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      data: one client's examples.
      key: PRNG key: order of the rows, the losses.
      num_steps: inner steps, for whose batches there are shuffled epochs enough.
      batch_size: support examples per step; `None`: all, by `core.mean_loss`.
      query_batch_size: query examples; `None`: all.

    Returns:
      The support objective, and `query_loss(params)`; both are 0 over an empty set.
    """
    length = jax.tree.leaves(data.examples)[0].shape[0]
    support_key, query_key, loss_key = jax.random.split(key, 3)

    def objective(start: jax.Array, count: jax.Array, size: int | None, order_key: jax.Array, epochs: int) -> Objective:
        if size is None:
            return _over_all_rows(loss_fn, data.examples, start, count, loss_key)
        stream = shuffled_epochs(order_key, start, count, length=length, num_epochs=epochs)

        def batch_loss(params: Params, step: jax.Array, block: jax.Array) -> jax.Array:
            batch = take_batch(data.examples, stream, step % epochs, size)
            loss = loss_fn(params, batch, jax.random.fold_in(loss_key, step))
            return jnp.where(count > 0, loss, jnp.zeros((), loss.dtype))

        return Objective(batch_loss)

    # Each step gets a batch of its own as long as the epochs last: one epoch has at least one batch.
    support = objective(jnp.int32(0), data.num_support, batch_size, support_key, num_steps)
    query = objective(data.num_support, data.num_examples - data.num_support, query_batch_size, query_key, 1)
    return support, lambda params: query.value(params, jnp.int32(num_steps))


def _over_all_rows(
    loss_fn: LossFn, examples: PyTree, start: jax.Array, count: jax.Array, loss_key: jax.Array
) -> Objective:
    """Exact mean over rows `[start, start + count)`."""
    length = jax.tree.leaves(examples)[0].shape[0]
    rows = jnp.arange(min(length, BLOCK_SIZE), dtype=jnp.int32)

    def block_loss(params: Params, step: jax.Array, block: jax.Array) -> jax.Array:
        key = jax.random.fold_in(loss_key, step)
        if length <= BLOCK_SIZE:
            return mean_loss(loss_fn, params, examples, (rows >= start) & (rows < start + count), key)
        at = block * BLOCK_SIZE + rows
        mask = (at >= start) & (at < start + count)
        # In a block without a row that counts, the first block's stand in: they are finite.
        at = jnp.minimum(jnp.where(mask.any(), at, rows), length - 1)
        loss = mean_loss(loss_fn, params, take_rows(examples, at), mask, jax.random.fold_in(key, block))
        return loss * (mask.sum().astype(loss.dtype) / jnp.maximum(count, 1).astype(loss.dtype))

    return Objective(block_loss, -(-length // BLOCK_SIZE))


def inner_loop(
    support: Objective,
    inner_tx: optax.GradientTransformation,
    params: Params,
    num_steps: int,
    *,
    first_order: bool = False,
    mode: Mode = "reverse",
    adapted: Part | None = None,
    remat: bool = True,
    adjust_fn: Callable[[Params, Params], Params] | None = None,
) -> tuple[Params, jax.Array]:
    """`theta_{t+1} = theta_t + inner_tx.update(grad loss(theta_t))`, to be differentiated in `theta_0`.

    Args:
      support: the loss.
      inner_tx: optax optimiser; runs from `inner_tx.init`.
      params: where the steps start.
      num_steps: steps.
      first_order: take the derivative of the result in the start as the identity.
      mode: how the gradient of a step is differentiated.
      adapted: the part that is stepped; default: everything. No step keeps a copy of the rest.
      remat: compute each step again in the backward pass.
      adjust_fn: `(grads, params) -> grads`, applied before the optimiser sees the gradient.

    Returns:
      Parameters after the last step; and the loss before the first, which is not differentiated.
    """
    part, rest = (params, None) if adapted is None else partition(params, adapted)
    # Cut at the parameters and not at the gradients: the optimiser reads them too, for weight decay say.
    cut: Callable[[PyTree], PyTree] = jax.lax.stop_gradient if first_order else lambda tree: tree

    def step(carry: tuple[Params, PyTree], index: jax.Array) -> tuple[tuple[Params, PyTree], jax.Array]:
        part, opt_state = carry
        at = cut(part)
        loss, grads = support.value_and_grad(at, index, rest=cut(rest), mode=mode)
        grads = grads if adjust_fn is None else adjust_fn(grads, at)
        update, opt_state = inner_tx.update(grads, opt_state, at)
        return (optax.apply_updates(part, update), opt_state), jax.lax.stop_gradient(loss)

    body = jax.checkpoint(step, prevent_cse=False) if remat and not first_order else step
    carry = (part, cut(inner_tx.init(part)))
    (part, _), losses = jax.lax.scan(body, carry, jnp.arange(num_steps, dtype=jnp.int32))
    return (part if rest is None else merge(part, rest)), losses[0]
