"""Mean losses over a batch `{"x", "y"}` in the contract of `cedarjax.core.LossFn`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cedarjax.core.dtypes import accumulator
from cedarjax.core.types import LossFn


def cross_entropy(apply: Callable[[Any, jax.Array], jax.Array]) -> LossFn:
    """Mean of `-log softmax(apply(params, x))[y]` over the batch.

    Args:
      apply: `apply(params, x [B, ...]) -> logits [B, K]`.

    Returns:
      `loss_fn(params, {"x": [B, ...], "y": [B] integers below K}, key) -> scalar`; the key is not used.

    Raises:
      TypeError: by the loss, if the labels are not integers.
      ValueError: by the loss, if the logits are not `[B, K]` for labels `[B]`.

    Example:
      >>> import jax.numpy as jnp
      >>> loss_fn = cross_entropy(lambda params, x: x @ params)
      >>> batch = {"x": jnp.ones((3, 2)), "y": jnp.array([0, 1, 2])}
      >>> round(float(loss_fn(jnp.zeros((2, 4)), batch, jax.random.key(0))), 4)
      1.3863
    """

    def loss_fn(params: Any, batch: Any, key: jax.Array, /) -> jax.Array:
        del key
        logits, labels = apply(params, batch["x"]), batch["y"]
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise TypeError(f'batch["y"] must hold integer labels, got dtype {labels.dtype}.')
        if logits.ndim != 2 or labels.shape != logits.shape[:1]:
            raise ValueError(f"apply must give logits [B, K] for labels [B], got {logits.shape} and {labels.shape}.")
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(accumulator(logits)), labels).mean()

    return loss_fn


def squared_error(apply: Callable[[Any, jax.Array], jax.Array]) -> LossFn:
    """Mean of `(apply(params, x) - y)^2` over the batch and, with several targets, over the targets.

    Args:
      apply: `apply(params, x [B, ...]) -> outputs [B, K]`, `[B, 1]` or `[B]` for one target.

    Returns:
      `loss_fn(params, {"x": [B, ...], "y": [B], [B, 1] or [B, K] floats}, key) -> scalar`; the key is not used.

    Raises:
      TypeError: by the loss, if the targets are not floats.
      ValueError: by the loss, if outputs and targets differ in rows or in targets.

    Example:
      >>> import jax.numpy as jnp
      >>> loss_fn = squared_error(lambda params, x: x @ params)
      >>> batch = {"x": jnp.ones((4, 2)), "y": jnp.array([0.0, 1.0, 2.0, 3.0])}
      >>> float(loss_fn(jnp.zeros((2, 1)), batch, jax.random.key(0)))
      3.5
    """

    def loss_fn(params: Any, batch: Any, key: jax.Array, /) -> jax.Array:
        del key
        outputs, targets = apply(params, batch["x"]), batch["y"]
        if not jnp.issubdtype(targets.dtype, jnp.floating):
            raise TypeError(f'batch["y"] must hold float targets, got dtype {targets.dtype}.')
        if outputs.size != targets.size or outputs.shape[0] != targets.shape[0]:
            raise ValueError(f"apply must give one output a target, got {outputs.shape} and {targets.shape}.")
        dtype = accumulator(outputs, targets)
        return jnp.square(outputs.astype(dtype) - targets.reshape(outputs.shape).astype(dtype)).mean()

    return loss_fn
