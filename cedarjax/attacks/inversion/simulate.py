"""What a client would upload for given data, as a differentiable map: what an attacker turns around.

The simulation is `simulate_fn(batch, key) -> upload` with `batch = {"x": [B, ...], "y": [B] or [B, K]}`. Any map of
this face can be inverted by `match`; here are a gradient, and what a `LocalUpdate` does, through all of its steps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cedarjax.core.dtypes import accumulator
from cedarjax.core.lowrank import dense
from cedarjax.core.types import ClientData, LocalUpdate, LossFn, Params, PyTree, Shared

SimulateFn = Callable[[PyTree, jax.Array], PyTree]
"""`simulate_fn(batch, key) -> upload`."""


def soft_cross_entropy(apply: Callable[[Any, jax.Array], jax.Array]) -> LossFn:
    """Mean cross entropy that takes labels, or probabilities, which can be optimised.

    Args:
      apply: `apply(params, x [B, ...]) -> logits [B, K]`.

    Returns:
      `loss_fn(params, {"x": [B, ...], "y": [B] integers or [B, K] probabilities}, key) -> scalar`; of integers the same
      as with `nn.cross_entropy`.

    Raises:
      ValueError: by the loss, if labels and logits do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> loss_fn = soft_cross_entropy(lambda params, x: x @ params)
      >>> batch = {"x": jnp.ones((1, 2)), "y": jnp.array([[0.5, 0.5, 0.0, 0.0]])}
      >>> round(float(loss_fn(jnp.zeros((2, 4)), batch, jax.random.key(0))), 4)
      1.3863
    """

    def loss_fn(params: Any, batch: Any, key: jax.Array, /) -> jax.Array:
        del key
        logits, labels = apply(params, batch["x"]), batch["y"]
        logits = logits.astype(accumulator(logits))
        if jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape == logits.shape[:1]:
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        if labels.shape != logits.shape:
            raise ValueError(f'batch["y"] must be [B] integers or fit logits {logits.shape}, got {labels.shape}.')
        return -(labels.astype(logits.dtype) * jax.nn.log_softmax(logits)).sum(axis=1).mean()

    return loss_fn


def gradient_of(loss_fn: LossFn, params: Params) -> SimulateFn:
    """A client that uploads the gradient of its batch.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      params: what the server broadcast.

    Returns:
      `simulate_fn(batch, key) -> gradient`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> simulate_fn = gradient_of(lambda w, batch, key: jnp.sum(w * batch["x"] ** 2), jnp.ones(()))
      >>> print(simulate_fn({"x": jnp.array([1.0, 2.0])}, jax.random.key(0)))
      5.0
    """
    return lambda batch, key: jax.grad(loss_fn)(params, batch, key)


def update_of(
    local_update: LocalUpdate, shared: Shared, client_state: PyTree | None = None, *, num_support: int | None = None
) -> SimulateFn:
    """A client that trains: the delta of any local update, differentiated through all of its steps.

    The `key` that the simulation is given draws the batches' order. An attacker who passes the client's own knows the
    order, which is more than most do; with any other key it guesses.

    Args:
      local_update: what the client does.
      shared: what the server broadcast.
      client_state: what the client keeps; default: that of a client's first round, for updates whose `shared` is the
        parameter tree.
      num_support: rows of the support set; default: all.

    Returns:
      `simulate_fn(batch, key) -> delta`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cedarjax.core import LocalUpdate, Upload
      >>> mean = lambda w, state, data, key: (Upload(w - data.examples["x"].mean()), state, ())
      >>> simulate_fn = update_of(LocalUpdate(lambda w: (), mean), jnp.ones(()))
      >>> print(simulate_fn({"x": jnp.array([2.0, 4.0])}, jax.random.key(0)))
      -2.0
    """
    state = local_update.init(shared) if client_state is None else client_state

    def simulate(batch: PyTree, key: jax.Array) -> PyTree:
        rows = jax.tree.leaves(batch)[0].shape[0]
        support = rows if num_support is None else num_support
        data = ClientData(batch, jnp.asarray(rows, jnp.int32), jnp.asarray(support, jnp.int32))
        return dense(local_update.update(shared, state, data, key)[0].delta)

    return simulate
