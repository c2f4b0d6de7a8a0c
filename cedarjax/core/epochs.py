"""Plain local training, which most clients' work has in common: epochs of an optimiser over shuffled batches."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cedarjax.core.batches import check_positive, num_batches, shuffled_epochs
from cedarjax.core.lowrank import Representation, dense, represented
from cedarjax.core.training import AdjustFn, displacement, train
from cedarjax.core.types import ClientData, LocalUpdate, LossFn, Params, PyTree, Shared, Upload

NumStepsFn = Callable[[ClientData, jax.Array], jax.Array]


class LocalInfo(NamedTuple):
    """What one client's training tells."""

    loss: jax.Array
    """Mean of the batch losses, each taken before its step."""
    num_steps: jax.Array
    """int32, optimiser steps done."""
    rank: PyTree = ()
    """int32 a parameter: rank of its update where that is held by factors, 0 where it is dense; `()` if all are dense
    because `representation` says so."""


class Epochs(NamedTuple):
    """How long a client trains."""

    batch_size: int
    """Examples per batch."""
    num_epochs: int = 1
    """Passes over the client's examples."""
    num_steps_fn: NumStepsFn | None = None
    """`(data, key) -> int32`: how many of its steps this client manages this round (a straggler fewer, never more);
    default: all of them."""

    def checked(self) -> "Epochs":
        """The same, or an error.

        Returns:
          Itself.

        Raises:
          ValueError: if a count is not positive.
        """
        check_positive(batch_size=self.batch_size, num_epochs=self.num_epochs)
        return self

    def max_steps(self, data: ClientData) -> int:
        """Static bound on the steps of one client.

        Args:
          data: the client's, of any size.

        Returns:
          Steps of a client that fills all `M` rows.
        """
        return num_batches(jax.tree.leaves(data.examples)[0].shape[0], self.batch_size, self.num_epochs)


def pull_towards(anchor: Params, strength: float | jax.Array) -> AdjustFn:
    """Adds the gradient of `strength / 2 * ||params - anchor||^2` to every gradient.

    Args:
      anchor: where the pull leads.
      strength: a Python number or a scalar, which may be traced.

    Returns:
      An `adjust_fn` for `train_epochs` and for what it is made of.

    Example:
      >>> print(pull_towards(1.0, 0.5)(jnp.float32(0.0), jnp.float32(3.0)))
      1.0
    """

    def adjust(grads: Params, params: Params) -> Params:
        return jax.tree.map(lambda g, p, a: g + jnp.asarray(strength, g.dtype) * (p - a), grads, params, anchor)

    return adjust


def train_epochs(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    params: Params,
    data: ClientData,
    key: jax.Array,
    epochs: Epochs,
    adjust_fn: AdjustFn | None = None,
) -> tuple[Params, LocalInfo]:
    """`theta <- theta + tx.update(grad loss(theta; batch))` over a client's shuffled epochs.

    A client does `ceil(num_epochs * num_examples / batch_size)` steps over its own examples, support and query alike,
    however many rows of padding follow them; see `core.batches` for a last batch that is not full.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      tx: optax optimiser; starts from `tx.init(params)`.
      params: where training starts.
      data: the client's examples.
      key: PRNG key: order of the examples, the loss, the number of steps.
      epochs: how long.
      adjust_fn: `(grads, params) -> grads`, applied before the optimiser sees the gradient.

    Returns:
      Parameters after the last step, and a `LocalInfo`.
    """
    length = jax.tree.leaves(data.examples)[0].shape[0]
    order_key, loss_key, steps_key = jax.random.split(key, 3)
    stream = shuffled_epochs(order_key, jnp.int32(0), data.num_examples, length=length, num_epochs=epochs.num_epochs)
    num_steps = num_batches(data.num_examples, epochs.batch_size, epochs.num_epochs)
    if epochs.num_steps_fn is not None:
        num_steps = jnp.clip(epochs.num_steps_fn(data, steps_key).astype(jnp.int32), 0, num_steps)
    params, loss = train(
        loss_fn,
        tx,
        params,
        data.examples,
        stream,
        loss_key,
        batch_size=epochs.batch_size,
        num_steps=num_steps,
        max_steps=epochs.max_steps(data),
        adjust_fn=adjust_fn,
    )
    return params, LocalInfo(loss, jnp.asarray(num_steps, jnp.int32))


def local_training(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    epochs: Epochs,
    *,
    pull: Callable[[Params], AdjustFn] | None = None,
    representation: Representation = "dense",
) -> LocalUpdate:
    """A client that trains for some epochs and uploads how far it came.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      tx: optax optimiser; runs from `tx.init` in every round.
      epochs: how long.
      pull: `shared -> adjust_fn`, for example `pull_towards`; see `train_epochs`.
      representation: see `core.lowrank`.

    Returns:
      A `LocalUpdate` over `ClientData` without client state, info `LocalInfo`.

    Raises:
      ValueError: if a count is not positive, the representation unknown, or `"lowrank"` with an optimiser that is not
        linear.
    """
    epochs = epochs.checked()

    def update(
        shared: Params, client_state: PyTree, data: ClientData, key: jax.Array
    ) -> tuple[Upload, PyTree, LocalInfo]:
        adjust_fn = None if pull is None else pull(shared)
        params, info = train_epochs(loss_fn, tx, shared, data, key, epochs, adjust_fn)
        return Upload(displacement(shared, params)), client_state, info

    def num_rows(data: ClientData) -> int:
        return epochs.batch_size * epochs.max_steps(data)

    return LocalUpdate(lambda params: (), represented(update, representation, tx, num_rows=num_rows))


def in_sequence(*local_updates: LocalUpdate) -> LocalUpdate:
    """Local updates one after another: each starts where the one before it ended.

    Args:
      *local_updates: at least one; each shares the model's parameters, uploads how far it came, and leaves no layer
        out.

    Returns:
      A `LocalUpdate` whose state and info are tuples of theirs; update `i` uses `fold_in(key, i)`.

    Raises:
      ValueError: without any update (here), or if one leaves layers out (when `update` is traced).

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> half = cj.local.sgd(lambda w, x, key: 0.5 * jnp.mean((w - x) ** 2), optax.sgd(0.5), batch_size=1)
      >>> data = cj.ClientData(jnp.array([4.0]), num_examples=jnp.int32(1), num_support=jnp.int32(1))
      >>> print(in_sequence(half, half).update(jnp.float32(0.0), ((), ()), data, jax.random.key(0))[0].delta)
      -3.0
    """
    if not local_updates:
        raise ValueError("local_updates must hold at least one update, got none.")

    def init(params: Params) -> tuple[PyTree, ...]:
        return tuple(local.init(params) for local in local_updates)

    def update(
        shared: Shared, client_state: tuple[PyTree, ...], data: PyTree, key: jax.Array
    ) -> tuple[Upload, tuple[PyTree, ...], tuple[PyTree, ...]]:
        params, states, infos = shared, [], []
        for i, (local, state) in enumerate(zip(local_updates, client_state, strict=True)):
            upload, state, info = local.update(params, state, data, jax.random.fold_in(key, i))
            if upload.mask is not None:
                raise ValueError("local_updates must not leave layers out: filter the upload of the whole sequence.")
            params = jax.tree.map(lambda p, d: p - d.astype(p.dtype), params, dense(upload.delta))
            states.append(state)
            infos.append(info)
        return Upload(displacement(shared, params)), tuple(states), tuple(infos)

    return LocalUpdate(init, update)
