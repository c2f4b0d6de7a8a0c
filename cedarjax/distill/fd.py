"""FD, federated distillation: clients exchange the mean logits of each class, and learn from those of the others.

Reference: Jeong, Oh, Kim, Park, Bennis, Kim, `Communication-Efficient On-Device Machine Learning: Federated
Distillation and Augmentation under Non-IID Private Data <https://arxiv.org/abs/1811.11479>`_, 2018, without its
augmentation. There, outputs are normalised before they are averaged, and the regulariser is a cross entropy; here
logits are averaged and the loss is that of `distill.losses`, as in FedCache, so that the two differ in whose knowledge
a sample gets and in nothing else.

The server keeps sums, so that a client's own part can be taken out of them exactly: what it holds grows with the
classes and not with the clients. A class that nobody of a round holds keeps what was known of it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core import (
    Epochs,
    FederatedAlgorithm,
    MapFn,
    NumStepsFn,
    Params,
    PyTree,
    ServerState,
    accumulator,
    check_positive,
    cohort_map,
)
from cedarjax.distill.clients import (
    Batch,
    ClientModel,
    Group,
    client_rows,
    descend,
    init_client,
    is_group,
    logits_of,
    split_groups,
)
from cedarjax.distill.losses import check_strengths, knowledge_loss
from cedarjax.distill.poison import PoisonFn, poison_logits


class FDKnowledge(NamedTuple):
    """What the server knows of each class."""

    sums: jax.Array
    """`[K, K]`, row `k` the sum of the clients' mean logits of class `k`."""
    counts: jax.Array
    """`[K]`, how many clients that sum is over."""
    stamp: jax.Array
    """`[K]` int32, the round in which it was made; -1 for a class that nobody has held."""


class FDClient(NamedTuple):
    """What a client keeps between rounds."""

    model: ClientModel
    """Its model and the state of its optimiser."""
    means: jax.Array
    """`[K, K]`, the mean logits of each class as it uploaded them last."""
    stamp: jax.Array
    """`[K]` int32, in which round; -1 for a class that it never uploaded."""


class FDInfo(NamedTuple):
    """What a round tells, `[C]` each."""

    loss: jax.Array
    """Mean of the batch losses, distillation included, each taken before its step."""
    num_steps: jax.Array
    """int32, optimiser steps done."""
    num_rows: jax.Array
    """int32, samples that these steps counted."""
    num_held: jax.Array
    """int32, classes of which a mean was uploaded: what `fd_bytes` wants to know."""


def class_sums(logits: jax.Array, labels: jax.Array, num_classes: int, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of the logits of each class, and how many there are.

    Args:
      logits: `[B, K]`; a row that is not finite counts for nothing.
      labels: `[B]` integers; one outside `[0, K)` counts for no class.
      num_classes: `K`.
      mask: `[B]` bool, the rows that count.

    Returns:
      `[K, K]` and `[K]`, of at least float32.

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.array([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]])
      >>> sums, counts = class_sums(logits, jnp.array([1, 1, 0]), 2, jnp.array([True, True, False]))
      >>> sums.tolist(), counts.tolist()
      ([[0.0, 0.0], [4.0, 6.0]], [0.0, 2.0])
    """
    dtype = accumulator(logits)
    mask = mask & jnp.isfinite(logits).all(axis=1)
    member = labels.astype(jnp.int32)[None, :] == jnp.arange(num_classes, dtype=jnp.int32)[:, None]
    member = (member & mask[None, :]).astype(dtype)
    logits = jnp.where(mask[:, None], logits, jnp.zeros_like(logits)).astype(dtype)
    return jnp.matmul(member, logits, precision=jax.lax.Precision.HIGHEST), member.sum(axis=1)


def leave_one_out(knowledge: FDKnowledge, means: jax.Array, stamp: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The teacher of each class for one client: the mean over the others that held the class.

    `(sum_j F_jk - F_ik) / (n_k - 1)` where the client is one of the `n_k`, `sum_j F_jk / n_k` where it is not.

    Args:
      knowledge: the server's.
      means: `[K, K]`, what the client uploaded last.
      stamp: `[K]` int32, in which round.

    Returns:
      `[K, K]`, zeros where nobody else held the class; and `[K]` bool, whether somebody did.

    Example:
      >>> import jax.numpy as jnp
      >>> knowledge = FDKnowledge(jnp.array([[4.0, 2.0], [1.0, 1.0]]), jnp.array([2.0, 1.0]), jnp.array([3, 3]))
      >>> teacher, has = leave_one_out(knowledge, jnp.array([[1.0, 2.0], [1.0, 1.0]]), jnp.array([3, 3]))
      >>> teacher.tolist(), has.tolist()
      ([[3.0, 0.0], [0.0, 0.0]], [True, False])
    """
    own = (stamp == knowledge.stamp) & (stamp >= 0)
    others = knowledge.counts - own.astype(knowledge.counts.dtype)
    has = others > 0
    sums = knowledge.sums - jnp.where(own[:, None], means, jnp.zeros_like(means))
    return jnp.where(has[:, None], sums / jnp.maximum(others, 1)[:, None], jnp.zeros_like(sums)), has


def fd(
    groups: Group | PyTree,
    *,
    num_classes: int,
    alpha: float | jax.Array = 1.0,
    temperature: float | jax.Array = 1.0,
    batch_size: int,
    num_epochs: int = 1,
    num_steps_fn: NumStepsFn | None = None,
    poison_fn: PoisonFn | None = None,
    map_fn: MapFn | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> FederatedAlgorithm:
    """Personal models that exchange one mean of logits a class.

    A client's step is on the mean of `CE(z, y) + alpha tau^2 KL(softmax(T_y / tau) || softmax(z / tau))`, where `T_y`
    is the mean over the other clients of what they uploaded of class `y` in the round before; without the second term
    where nobody did. It uploads the mean, class by class, of the logits that its losses were taken from. Clients count
    equally, whatever their weights. The state's `params` are an `FDKnowledge`, the client states are `FDClient`s, and
    examples are a dict with `"x"` and `"y"`.

    Args:
      groups: a `Group`, or a nest of them, as in `fedcache`.
      num_classes: `K`.
      alpha: weight of the distillation, at least 0; a traced scalar is allowed.
      temperature: `tau`, above 0; a traced scalar is allowed.
      batch_size: samples per batch.
      num_epochs: passes over a client's samples in a round.
      num_steps_fn: as in `core.Epochs`.
      poison_fn: what malicious clients upload in place of their means, as in `fedcache`.
      map_fn: layout of the client axis, from `cohort_map`; default: one vmap.
      dtype: of what is exchanged.

    Returns:
      A `FederatedAlgorithm` with info `FDInfo`. Clients of weight 0 change nothing, whatever their data hold. The
      parameters that its `init` takes are not read.

    Raises:
      ValueError: if an argument is out of range (here), or examples, logits or flags of malicious clients are not there
        or not of the right shape (when `step` is traced).
      TypeError: if `groups` is neither.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, optax
      >>> import cedarjax as cj
      >>> from cedarjax import distill
      >>> x, y = np.eye(4, 3, dtype=np.float32), np.array([0, 1, 0, 1])
      >>> dataset = cj.data.federated_dataset({"x": x, "y": y}, client_id=[0, 0, 1, 1])
      >>> group = distill.Group(lambda params, x, key: x @ params, optax.sgd(0.1))
      >>> algorithm = fd(group, num_classes=2, batch_size=2)
      >>> state = cj.init_run(algorithm, dataset, jnp.zeros((3, 2)))
      >>> state, history, _ = cj.run_rounds(algorithm, dataset, state, jax.random.key(0), num_rounds=2)
      >>> history.info.num_held.tolist(), state.server.params.counts.tolist()
      ([[2, 2], [2, 2]], [2.0, 2.0])
    """
    leaves, structure = split_groups(groups)
    check_strengths(alpha, temperature)
    check_positive(num_classes=num_classes)
    epochs = Epochs(batch_size, num_epochs, num_steps_fn).checked()
    layout = cohort_map() if map_fn is None else map_fn

    def train(group: Group, shared: tuple[FDKnowledge, jax.Array], *one: PyTree) -> tuple[FDClient, FDInfo]:
        state, data, key, present, malicious = one
        knowledge, now = shared
        teacher, has = leave_one_out(knowledge, state.means, state.stamp)

        def read(store: PyTree, examples: PyTree) -> tuple[jax.Array, jax.Array]:
            labels = examples["y"]
            return teacher.at[labels].get(mode="clip"), has.at[labels].get(mode="clip")

        def keep(store: PyTree, batch: Batch, knowledge: PyTree, logits: jax.Array) -> PyTree:
            new = class_sums(logits, batch.examples["y"], num_classes, batch.counted)
            return jax.tree.map(lambda total, x: total + x.astype(total.dtype), store, new)

        def loss(params: Params, examples: PyTree, knowledge: PyTree, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = logits_of(group, params, examples["x"], key, num_classes)
            return knowledge_loss(logits, examples["y"], *knowledge, alpha=alpha, temperature=temperature), logits

        nothing = jnp.zeros((num_classes, num_classes), dtype), jnp.zeros(num_classes, dtype)
        model, (sums, counts), told = descend(
            loss, group.tx, state.model, data, key, epochs, present, store=nothing, read_fn=read, write_fn=keep
        )
        means = sums / jnp.maximum(counts, 1)[:, None]
        if poison_fn is not None:
            means = poison_logits(means, malicious, poison_fn)
        held = (counts > 0) & jnp.isfinite(means).all(axis=1)
        client = FDClient(
            model, jnp.where(held[:, None], means, state.means), jnp.where(held, now, state.stamp).astype(jnp.int32)
        )
        return client, FDInfo(*told, held.sum(dtype=jnp.int32))

    def init(params: PyTree) -> ServerState:
        del params
        shape = (num_classes, num_classes)
        known = FDKnowledge(
            jnp.zeros(shape, dtype), jnp.zeros(num_classes, dtype), jnp.full(num_classes, -1, jnp.int32)
        )
        return ServerState(known, (), jnp.zeros((), jnp.int32))

    def init_one(group: Group, params: Params) -> FDClient:
        means = jnp.zeros((num_classes, num_classes), dtype)
        return FDClient(init_client(group, params), means, jnp.full(num_classes, -1, jnp.int32))

    def step(state: ServerState, cohort: PyTree, key: jax.Array) -> tuple[ServerState, PyTree, PyTree]:
        cohorts = structure.flatten_up_to(cohort)
        if poison_fn is not None and any(one.byzantine is None for one in cohorts):
            raise ValueError("cohort.byzantine must be given, [C] bool, with a poison_fn; got None.")
        known, now = state.params, state.round
        sums, counts = jnp.zeros_like(known.sums), jnp.zeros_like(known.counts)
        results = []
        for group, one in zip(leaves, cohorts, strict=True):
            clients, info = layout(
                lambda shared, *one, group=group: train(group, shared, *one),
                (known, now),
                *client_rows(one, key, ("x", "y")),
            )
            # An absent client did no step and stamped nothing.
            fresh = (clients.stamp == now) & (one.weights > 0)[:, None]
            uploads = jnp.where(fresh[:, :, None], clients.means, jnp.zeros_like(clients.means))
            ones = jnp.ones(fresh.shape[0], sums.dtype)
            sums = sums + jnp.tensordot(ones, uploads, axes=1, precision=jax.lax.Precision.HIGHEST)
            counts = counts + fresh.astype(counts.dtype).sum(axis=0)
            results.append((clients, info))
        held = counts > 0
        known = FDKnowledge(
            jnp.where(held[:, None], sums, known.sums),
            jnp.where(held, counts, known.counts),
            jnp.where(held, now, known.stamp),
        )
        clients, infos = (structure.unflatten(list(part)) for part in zip(*results, strict=True))
        return ServerState(known, state.opt_state, now + 1), clients, infos

    def model(shared: PyTree, client_state: PyTree) -> PyTree:
        return structure.unflatten([one.model.params for one in structure.flatten_up_to(client_state)])

    return FederatedAlgorithm(
        init, step, lambda params: jax.tree.map(init_one, groups, params, is_leaf=is_group), model
    )
