"""Models of which a part is shared and a part stays on the client: one mechanism, and what is made of it.

References: Arivazhagan et al., `Federated Learning with Personalization Layers <https://arxiv.org/abs/1912.00818>`_,
2019 (FedPer); Collins et al., `Exploiting Shared Representations for Personalized Federated Learning
<https://arxiv.org/abs/2102.07078>`_, 2021 (FedRep); Liang et al., `Think Locally, Act Globally
<https://arxiv.org/abs/2001.01523>`_, 2020 (LG-FedAvg); Oh, Kim, Yun, `FedBABU <https://arxiv.org/abs/2106.06042>`_,
2022; Li et al., `FedBN <https://arxiv.org/abs/2102.07623>`_, 2021.

A part is named as in `core.in_part`: a layer, layers, or a predicate on the names of leaves.
"""

from typing import NamedTuple

import jax
import optax

from cedarjax.core import (
    Epochs,
    LocalUpdate,
    LossFn,
    NumStepsFn,
    Params,
    Part,
    PyTree,
    Shared,
    Upload,
    dense,
    freeze,
    in_sequence,
    local_training,
    merge,
    partition,
    train_only,
)


class SplitState(NamedTuple):
    """What a client of a split model keeps."""

    personal: Params
    """Its own part, with `None` where the shared part has leaves."""
    local: PyTree
    """State of the local update inside."""
    opt_state: PyTree
    """State of the optimiser that moves the personal part."""


def split(
    local_update: LocalUpdate, personal: Part, *, personal_tx: optax.GradientTransformation | None = None
) -> LocalUpdate:
    """Keeps a part of the model on the client, whatever the client does with the whole.

    The local update gets the whole model, the received part and the client's own. What it would upload of the shared
    part is uploaded; with the rest the client is its own server: `p <- p + personal_tx.update(delta)`. Nothing of the
    personal part is sent or averaged: the server's tree has `None` in its place.

    Layers of the shared part can be left out of the upload, by `layers.upload_filter` inside or outside. Inside, it
    must not judge layers of the personal part, which would not be trained when skipped, and its own count of bytes
    includes that part; outside, it sees the shared part alone, so that neither its features nor its scores may read the
    rest.

    Args:
      local_update: an update that shares the model's parameters.
      personal: the part that stays, see `core.in_part`; a client begins with that of the initial parameters.
      personal_tx: optax optimiser of the personal part; its state stays on the client. The default, `optax.sgd(1.0)`,
        keeps what training did. An update that uploads a gradient and not how far it came, as `meta.maml` does, needs
        one with a learning rate.

    Returns:
      A `LocalUpdate` with a `SplitState`; its `model` is the whole one.

    Raises:
      ValueError: if a name owns no parameter, the part is everything or nothing, or the update shares anything but the
        model's parameters (when `init`, `share` or `update` is traced).

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> loss_fn = lambda w, x, key: 0.5 * jnp.mean((w["body"] + w["head"] - x) ** 2)
      >>> local = split(cj.local.sgd(loss_fn, optax.sgd(0.25), batch_size=1), "head")
      >>> params = {"body": jnp.float32(0.0), "head": jnp.float32(0.0)}
      >>> data = cj.ClientData(jnp.array([4.0]), num_examples=jnp.int32(1), num_support=jnp.int32(1))
      >>> upload, state, _ = local.update(local.share(params), local.init(params), data, jax.random.key(0))
      >>> print(upload.delta, state.personal["head"])
      {'body': Array(-1., dtype=float32), 'head': None} 1.0
    """
    tx = optax.sgd(1.0) if personal_tx is None else personal_tx

    def init(params: Params) -> SplitState:
        own = partition(params, personal)[0]
        return SplitState(own, local_update.init(params), tx.init(own))

    def share(params: Params) -> Shared:
        if jax.tree.structure(shared := local_update.share(params)) != jax.tree.structure(params):
            raise ValueError(
                "local_update must share the model's parameters, got the structure "
                f"{jax.tree.structure(shared)} for parameters of the structure {jax.tree.structure(params)}."
            )
        return partition(params, personal)[1]

    def model(shared: Shared, state: SplitState) -> Params:
        return local_update.model(merge(shared, state.personal), state.local)

    def update(shared: Shared, state: SplitState, data: PyTree, key: jax.Array) -> tuple[Upload, SplitState, PyTree]:
        upload, inner, info = local_update.update(merge(shared, state.personal), state.local, data, key)
        moved, delta = partition(dense(upload.delta), personal)
        mask = None if upload.mask is None else partition(upload.mask, personal)[1]
        step, opt_state = tx.update(moved, state.opt_state, state.personal)
        return Upload(delta, mask), SplitState(optax.apply_updates(state.personal, step), inner, opt_state), info

    return LocalUpdate(init, update, share, model)


def fedper(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    personal: Part = "head",
    *,
    batch_size: int,
    num_epochs: int = 1,
    num_steps_fn: NumStepsFn | None = None,
) -> LocalUpdate:
    """FedPer: the whole model is trained, the body is shared, the head stays.

    Args:
      loss_fn: `(params, batch, key) -> scalar` of the whole model.
      tx: optax optimiser; runs from `tx.init` in every round.
      personal: the part that stays, see `core.in_part`.
      batch_size: examples per batch.
      num_epochs: passes over the client's examples.
      num_steps_fn: as in `core.Epochs`.

    Returns:
      A `LocalUpdate` with a `SplitState`, info `LocalInfo`.

    Raises:
      ValueError: if a count is not positive (here), and as in `split`.
    """
    return split(local_training(loss_fn, tx, Epochs(batch_size, num_epochs, num_steps_fn)), personal)


def lg_fedavg(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    personal: Part,
    *,
    batch_size: int,
    num_epochs: int = 1,
    num_steps_fn: NumStepsFn | None = None,
) -> LocalUpdate:
    """LG-FedAvg: the whole model is trained, the head is shared, the representation stays.

    Args:
      loss_fn: `(params, batch, key) -> scalar` of the whole model.
      tx: optax optimiser; runs from `tx.init` in every round.
      personal: the layers of the representation, see `core.in_part`.
      batch_size: examples per batch.
      num_epochs: passes over the client's examples.
      num_steps_fn: as in `core.Epochs`.

    Returns:
      A `LocalUpdate` with a `SplitState`, info `LocalInfo`.

    Raises:
      ValueError: as in `fedper`.
    """
    return fedper(loss_fn, tx, personal, batch_size=batch_size, num_epochs=num_epochs, num_steps_fn=num_steps_fn)


def fedbn(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    personal: Part = lambda name: "norm" in name,
    *,
    batch_size: int,
    num_epochs: int = 1,
    num_steps_fn: NumStepsFn | None = None,
) -> LocalUpdate:
    """FedBN: the parameters of normalisation layers stay.

    Statistics of batches are no parameters; what stays here are scales and offsets, of any kind of normalisation.

    Args:
      loss_fn: `(params, batch, key) -> scalar` of the whole model.
      tx: optax optimiser; runs from `tx.init` in every round.
      personal: the normalisation layers, see `core.in_part`; default: leaves with `norm` in their names.
      batch_size: examples per batch.
      num_epochs: passes over the client's examples.
      num_steps_fn: as in `core.Epochs`.

    Returns:
      A `LocalUpdate` with a `SplitState`, info `LocalInfo`.

    Raises:
      ValueError: as in `fedper`.
    """
    return fedper(loss_fn, tx, personal, batch_size=batch_size, num_epochs=num_epochs, num_steps_fn=num_steps_fn)


def fedbabu(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    head: Part = "head",
    *,
    batch_size: int,
    num_epochs: int = 1,
    num_steps_fn: NumStepsFn | None = None,
) -> LocalUpdate:
    """FedBABU: the body alone is trained and shared; the head stays what it was at first, on every client.

    A client that deploys the model fine-tunes it first, head included.

    Args:
      loss_fn: `(params, batch, key) -> scalar` of the whole model.
      tx: optax optimiser of the body; runs from `tx.init` in every round.
      head: the part that is never trained, see `core.in_part`.
      batch_size: examples per batch.
      num_epochs: passes over the client's examples.
      num_steps_fn: as in `core.Epochs`.

    Returns:
      A `LocalUpdate` with a `SplitState`, info `LocalInfo`.

    Raises:
      ValueError: as in `fedper`.
    """
    epochs = Epochs(batch_size, num_epochs, num_steps_fn)
    return split(local_training(loss_fn, freeze(tx, head), epochs), head)


def fedrep(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    personal: Part = "head",
    *,
    batch_size: int,
    num_epochs: int = 1,
    personal_tx: optax.GradientTransformation | None = None,
    personal_epochs: int = 1,
    num_steps_fn: NumStepsFn | None = None,
) -> LocalUpdate:
    """FedRep: first the head is trained below a frozen body, then the body below the new head; the body is shared.

    Args:
      loss_fn: `(params, batch, key) -> scalar` of the whole model.
      tx: optax optimiser of the body; runs from `tx.init` in every round.
      personal: the part that stays, see `core.in_part`.
      batch_size: examples per batch.
      num_epochs: passes over the client's examples for the body; the paper's choice is 1.
      personal_tx: optax optimiser of the head; default: `tx`.
      personal_epochs: passes over the client's examples for the head.
      num_steps_fn: as in `core.Epochs`, for each of the two.

    Returns:
      A `LocalUpdate` with a `SplitState`, info a pair of `LocalInfo`: of the head, of the body.

    Raises:
      ValueError: as in `fedper`.
    """
    head_tx = train_only(tx if personal_tx is None else personal_tx, personal)
    head = local_training(loss_fn, head_tx, Epochs(batch_size, personal_epochs, num_steps_fn))
    body = local_training(loss_fn, freeze(tx, personal), Epochs(batch_size, num_epochs, num_steps_fn))
    return split(in_sequence(head, body), personal)
