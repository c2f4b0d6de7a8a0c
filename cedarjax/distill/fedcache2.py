"""FedCache 2.0: clients cache a few distilled samples, and each device draws those that suit its own classes.

Reference: Pan, Sun, Wu, Wang, Liu, Gao, Wang, `FedCache 2.0: Federated Edge Learning with Knowledge Caching and Dataset
Distillation <https://arxiv.org/abs/2405.13378>`_, 2024; the parts, and where its published code does otherwise, are in
`distill.prototypes`.

What is cached are samples, not logits: they say more of a client's data than anything else here. All clients read the
cache of the round before, and write their own slots of it at the end.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cedarjax.core import (
    ClientData,
    Epochs,
    FederatedAlgorithm,
    MapFn,
    NumStepsFn,
    Params,
    PyTree,
    ServerState,
    check_positive,
    cohort_map,
    take_rows,
)
from cedarjax.distill.blocks import in_blocks
from cedarjax.distill.clients import ClientModel, Group, client_rows, descend, init_clients, logits_of, split_groups
from cedarjax.distill.losses import label_loss
from cedarjax.distill.prototypes import device_centric, distil_prototypes, init_prototypes, sample_prototypes


class PrototypeCache(NamedTuple):
    """What the server holds; slot `s` of a client is of class `s // num_per_class`."""

    x: jax.Array
    """`[N, S, ...]`, the prototypes of every client."""
    written: jax.Array
    """`[N, S]` bool, which slots hold one."""


class FedCache2Info(NamedTuple):
    """What a round tells, `[C]` each."""

    loss: jax.Array
    """Mean of the batch losses on own and drawn samples, each taken before its step."""
    num_steps: jax.Array
    """int32, optimiser steps done."""
    krr_loss: jax.Array
    """Loss of the prototypes before their last step; 0 without any step."""
    num_sent: jax.Array
    """int32, prototypes uploaded."""
    num_received: jax.Array
    """int32, prototypes drawn from the cache."""


def fedcache2(
    groups: Group | PyTree,
    *,
    num_clients: int,
    num_classes: int,
    shape: Sequence[int],
    num_per_class: int = 1,
    num_drawn: int,
    proto_tx: optax.GradientTransformation,
    proto_steps: int,
    tau: float | jax.Array = 0.5,
    ridge: float | jax.Array = 1e-3,
    batch_size: int,
    num_epochs: int = 1,
    num_steps_fn: NumStepsFn | None = None,
    map_fn: MapFn | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> FederatedAlgorithm:
    """Personal models that exchange distilled samples.

    In a round a client draws prototypes of other clients, class `k` in proportion to `normalise((1 - tau) p_k + tau)`;
    trains on its own samples and these together; and moves its own prototypes, which begin as samples of its own, down
    the loss of a kernel ridge regression from them to its samples, by the features of its trained model. The state's
    `params` are a `PrototypeCache`, the client states are `ClientModel`s, and examples are a dict with `"x"` and `"y"`.

    Args:
      groups: a `Group` with a `features_fn`, or a nest of them, as in `fedcache`.
      num_clients: `N`; client ids are below it, over all groups.
      num_classes: `K`.
      shape: of one sample.
      num_per_class: prototypes of each class and client, so that `S = K num_per_class`.
      num_drawn: prototypes that a client draws in a round.
      proto_tx: optax optimiser of the prototypes, fresh in every round.
      proto_steps: its steps in a round, at least 0.
      tau: of `device_centric`; a traced scalar is allowed.
      ridge: of `krr_predict`, above 0; a traced scalar is allowed.
      batch_size: samples per batch.
      num_epochs: passes over own and drawn samples.
      num_steps_fn: as in `core.Epochs`; the data that it sees hold both.
      map_fn: layout of the client axis, from `cohort_map`; default: one vmap.
      dtype: of the prototypes.

    Returns:
      A `FederatedAlgorithm` with info `FedCache2Info`. Clients of weight 0 change nothing, whatever their data hold,
      and prototypes that are not finite are not written. The parameters that its `init` takes are not read.

    Raises:
      ValueError: if an argument is out of range or a group has no `features_fn` (here), or examples or logits are not
        of the right shape (when `step` is traced).
      TypeError: if `groups` is neither.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, optax
      >>> import cedarjax as cj
      >>> from cedarjax import distill
      >>> x, y = np.eye(4, 3, dtype=np.float32), np.array([0, 1, 0, 1])
      >>> dataset = cj.data.federated_dataset({"x": x, "y": y}, client_id=[0, 0, 1, 1])
      >>> group = distill.Group(lambda params, x, key: x @ params, optax.sgd(0.1), lambda params, x, key: x)
      >>> algorithm = fedcache2(
      ...     group,
      ...     num_clients=2,
      ...     num_classes=2,
      ...     shape=(3,),
      ...     num_drawn=2,
      ...     proto_tx=optax.sgd(0.1),
      ...     proto_steps=1,
      ...     batch_size=2,
      ... )
      >>> state = cj.init_run(algorithm, dataset, jnp.zeros((3, 2)))
      >>> state, history, _ = cj.run_rounds(algorithm, dataset, state, jax.random.key(0), num_rounds=2)
      >>> history.info.num_sent.tolist(), history.info.num_received.tolist()
      ([[2, 2], [2, 2]], [[0, 0], [2, 2]])
    """
    leaves, structure = split_groups(groups)
    check_positive(num_clients=num_clients, num_classes=num_classes, num_per_class=num_per_class, num_drawn=num_drawn)
    device_centric(jnp.ones(1), tau)
    if proto_steps < 0:
        raise ValueError(f"proto_steps must be at least 0, got {proto_steps}.")
    if isinstance(ridge, int | float) and not ridge > 0:
        raise ValueError(f"ridge must be above 0, got {ridge}.")
    if any(group.features_fn is None for group in leaves):
        raise ValueError("groups must have a features_fn each, got None.")
    epochs = Epochs(batch_size, num_epochs, num_steps_fn).checked()
    layout = cohort_map() if map_fn is None else map_fn
    shape, num_slots = tuple(shape), num_classes * num_per_class

    def slot_labels() -> jax.Array:
        return jnp.repeat(jnp.arange(num_classes, dtype=jnp.int32), num_per_class)

    def train(
        group: Group, cache: PrototypeCache, *one: PyTree
    ) -> tuple[ClientModel, FedCache2Info, jax.Array, jax.Array]:
        model, data, key, present, client_id = one
        draw_key, train_key, init_key, feature_key = jax.random.split(key, 4)
        own = {"x": data.examples["x"].astype(dtype), "y": data.examples["y"].astype(jnp.int32)}
        length = own["y"].shape[0]
        mask = jnp.arange(length, dtype=jnp.int32) < data.num_examples
        classes = jnp.arange(num_classes, dtype=jnp.int32)
        member = mask[:, None] & (own["y"][:, None] == classes[None])
        shares = member.sum(axis=0).astype(jnp.float32) / jnp.maximum(data.num_examples, 1).astype(jnp.float32)

        others = cache.written & (jnp.arange(num_clients, dtype=jnp.int32) != client_id)[:, None] & present
        labels = jnp.tile(slot_labels(), num_clients)
        index, drawn = sample_prototypes(draw_key, device_centric(shares, tau), labels, others.reshape(-1), num_drawn)
        received = {"x": cache.x.reshape(-1, *shape)[index], "y": labels[index]}
        # The client's rows, then what it drew, with no padding between them.
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), own, received)
        rows = jnp.arange(length + num_drawn, dtype=jnp.int32)
        rows = jnp.where(rows < data.num_examples, rows, rows - data.num_examples + length)
        count = data.num_examples + drawn.sum(dtype=jnp.int32)
        joined = ClientData(take_rows(both, jnp.minimum(rows, length + num_drawn - 1)), count, count)

        def loss(params: Params, examples: PyTree, knowledge: PyTree, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = logits_of(group, params, examples["x"], key, num_classes)
            return label_loss(logits, examples["y"]), logits

        model, _, told = descend(loss, group.tx, model, joined, train_key, epochs, present)

        def features_of(x: jax.Array) -> jax.Array:
            assert group.features_fn is not None
            return group.features_fn(model.params, x, feature_key)

        begun, there = init_prototypes(
            init_key, own["x"], own["y"], mask, num_classes=num_classes, num_per_class=num_per_class
        )
        held = cache.written.at[client_id].get(mode="clip")
        wide = (num_slots, *(1,) * len(shape))
        begun = jnp.where(held.reshape(wide), cache.x.at[client_id].get(mode="clip"), begun)
        there = (there | held) & present
        one_hot = jax.nn.one_hot(own["y"], num_classes, dtype=jnp.float32)
        x = jnp.where(mask.reshape(-1, *(1,) * len(shape)), own["x"], jnp.zeros_like(own["x"]))
        protos, losses = distil_prototypes(
            features_of,
            proto_tx,
            begun,
            jax.nn.one_hot(slot_labels(), num_classes, dtype=jnp.float32),
            there,
            jax.lax.stop_gradient(in_blocks(features_of, x, max(batch_size, num_slots))),
            one_hot,
            mask,
            ridge=ridge,
            num_steps=proto_steps,
        )
        finite = jnp.isfinite(protos.reshape(num_slots, -1)).all(axis=1)
        sent = there & finite
        last = losses[-1] if proto_steps else jnp.zeros((), jnp.float32)
        last = jnp.where(present, last, jnp.zeros_like(last))
        info = FedCache2Info(
            told.loss, told.num_steps, last, sent.sum(dtype=jnp.int32), (drawn & present).sum(dtype=jnp.int32)
        )
        return model, info, protos, sent

    def init(params: PyTree) -> ServerState:
        del params
        empty = jnp.zeros((num_clients, num_slots, *shape), dtype), jnp.zeros((num_clients, num_slots), bool)
        return ServerState(PrototypeCache(*empty), (), jnp.zeros((), jnp.int32))

    def step(state: ServerState, cohort: PyTree, key: jax.Array) -> tuple[ServerState, PyTree, PyTree]:
        cohorts = structure.flatten_up_to(cohort)
        cache, results = state.params, []
        for group, one in zip(leaves, cohorts, strict=True):
            if one.data.examples["x"].shape[2:] != shape:
                raise ValueError(f"cohort.data.examples['x'] must be [C, M, *shape] with shape {shape}.")
            clients, data, keys, present, _ = client_rows(one, key, ("x", "y"))
            model, info, protos, sent = layout(
                lambda shared, *one, group=group: train(group, shared, *one),
                state.params,
                clients,
                data,
                keys,
                present,
                one.client_id,
            )
            at = jnp.where(present, one.client_id, num_clients)
            kept = cache.x.at[at].get(mode="clip")
            wide = sent.reshape(*sent.shape, *(1,) * len(shape))
            written = cache.written.at[at].get(mode="clip") | sent
            cache = PrototypeCache(
                cache.x.at[at].set(jnp.where(wide, protos, kept), mode="drop"),
                cache.written.at[at].set(written, mode="drop"),
            )
            results.append((model, info))
        models, infos = (structure.unflatten(list(part)) for part in zip(*results, strict=True))
        return ServerState(cache, state.opt_state, state.round + 1), models, infos

    def model(shared: PyTree, client_state: PyTree) -> PyTree:
        return structure.unflatten([one.params for one in structure.flatten_up_to(client_state)])

    return FederatedAlgorithm(init, step, lambda params: init_clients(groups, params), model)
