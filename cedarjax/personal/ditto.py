"""Ditto: a model of its own for each client, held near the shared one.

Reference: Li, Hu, Beirami, Smith, `Ditto: Fair and Robust Federated Learning Through Personalization
<https://arxiv.org/abs/2012.04221>`_, 2021.
"""

from typing import NamedTuple

import jax
import optax

from cedarjax.core import (
    ClientData,
    Epochs,
    LocalInfo,
    LocalUpdate,
    LossFn,
    NumStepsFn,
    Params,
    PyTree,
    Shared,
    Upload,
    pull_towards,
    train_epochs,
)

_PERSONAL_STREAM = 0x64697474  # keeps the draws of the personal model apart from those of the wrapped update


class DittoState(NamedTuple):
    """What a client keeps."""

    personal: Params
    """Its own model, `v`."""
    local: PyTree
    """State of the local update that trains the shared model."""


class DittoInfo(NamedTuple):
    """What one client's round tells."""

    local: PyTree
    """Info of the local update that trains the shared model."""
    personal: LocalInfo
    """Training of its own model; the loss is without the pull."""


def ditto(
    local_update: LocalUpdate,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    lam: float | jax.Array,
    *,
    batch_size: int,
    num_epochs: int = 1,
    num_steps_fn: NumStepsFn | None = None,
) -> LocalUpdate:
    """Beside the shared model a client trains its own, pulled towards the one that it received.

    `v <- v - eta (grad F(v) + lam (v - w))`, where `w` is what the client would deploy of the received model without
    Ditto. The shared model is that of `local_update` alone, bit for bit: nothing personal flows into it, which is why a
    robust rule on the server protects both.

    Args:
      local_update: how the shared model is trained, `local.sgd` in the paper.
      loss_fn: `(params, batch, key) -> scalar`, of the personal model.
      tx: optax optimiser of the personal model; sees the gradient with the pull, runs from `tx.init` in every round.
      lam: strength of the pull, at least 0; 0 is training alone. A traced scalar is allowed.
      batch_size: examples per batch of the personal model.
      num_epochs: passes of the personal model over the client's examples.
      num_steps_fn: as in `core.Epochs`, for the personal model.

    Returns:
      A `LocalUpdate` over `ClientData` with a `DittoState` and a `DittoInfo`. Its `model` is the personal one, which
      begins as the initial parameters and stays as it is while the client is absent.

    Raises:
      ValueError: if `lam` is negative or a count is not positive.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> loss_fn = lambda w, x, key: 0.5 * jnp.mean((w - x) ** 2)
      >>> local = cj.local.sgd(loss_fn, optax.sgd(0.5), batch_size=1)
      >>> own = ditto(local, loss_fn, optax.sgd(0.25), lam=1.0, batch_size=1, num_epochs=40)
      >>> data = cj.ClientData(jnp.array([4.0]), num_examples=jnp.int32(1), num_support=jnp.int32(1))
      >>> upload, state, _ = own.update(jnp.float32(0.0), own.init(jnp.float32(0.0)), data, jax.random.key(0))
      >>> print(upload.delta, f"{state.personal:.3f}")  # half way to 4; and the minimum of the loss with its pull to 0
      -2.0 2.000
    """
    if isinstance(lam, int | float) and lam < 0:
        raise ValueError(f"lam must be at least 0, got {lam}.")
    epochs = Epochs(batch_size, num_epochs, num_steps_fn).checked()

    def init(params: Params) -> DittoState:
        return DittoState(params, local_update.init(params))

    def update(
        shared: Shared, state: DittoState, data: ClientData, key: jax.Array
    ) -> tuple[Upload, DittoState, DittoInfo]:
        received = local_update.model(shared, state.local)
        upload, local, local_info = local_update.update(shared, state.local, data, key)
        own_key = jax.random.fold_in(key, _PERSONAL_STREAM)
        personal, info = train_epochs(loss_fn, tx, state.personal, data, own_key, epochs, pull_towards(received, lam))
        return upload, DittoState(personal, local), DittoInfo(local_info, info)

    return LocalUpdate(init, update, local_update.share, lambda shared, state: state.personal)
