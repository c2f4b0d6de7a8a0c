"""FedCache: clients with models of their own learn from the cached logits of related samples of other clients.

Reference: Wu, Sun, Wang, Liu, Xu, Wang, Jiang, Gao, Lu, `FedCache: A Knowledge Cache-driven Federated Learning
Architecture for Personalized Edge Intelligence <https://arxiv.org/abs/2308.07816>`_, 2024. Where its published code
does otherwise (the temperature, the gradient of what is cached, samples that nobody has written, the tail of an epoch)
is said in `distill.losses`, `distill.cache` and `distill.clients`.

Two orders of update, whose results differ:

- `sequential`, as published: clients take turns, in the order of the cohort, group after group. A client reads what
  those before it wrote in this round, and what it wrote itself in earlier batches. A scan over clients.
- `synchronous`: all clients read the cache of the round before, and all write at the end. Clients are independent, so
  they are vmapped, chunked or sharded by `cohort_map`.

Clients that do not take part change neither the cache nor themselves, and the cache keeps what they wrote: any subset
may take part in a round.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core import (
    ClientData,
    Epochs,
    FederatedAlgorithm,
    MapFn,
    NumStepsFn,
    Params,
    PyTree,
    ServerState,
    cohort_map,
)
from cedarjax.distill.cache import KnowledgeCache, ReduceFn, fetch, mean_logits, write
from cedarjax.distill.clients import (
    Batch,
    ClientModel,
    Group,
    client_rows,
    descend,
    init_clients,
    logits_of,
    split_groups,
)
from cedarjax.distill.losses import check_strengths, knowledge_loss
from cedarjax.distill.poison import PoisonFn, poison_logits

ORDERS = ("sequential", "synchronous")


class FedCacheInfo(NamedTuple):
    """What a round tells, `[C]` each."""

    loss: jax.Array
    """Mean of the batch losses, distillation included, each taken before its step."""
    num_steps: jax.Array
    """int32, optimiser steps done."""
    num_rows: jax.Array
    """int32, samples whose logits were written and fetched: what `fedcache_bytes` wants to know."""
    num_taught: jax.Array
    """int32, how many of them found a teacher."""


class Store(NamedTuple):
    """What a client writes to while it trains."""

    logits: jax.Array
    """`[n, K]`, of all samples or of the client's own."""
    written: jax.Array
    """`[n]` bool."""
    num_taught: jax.Array
    """int32 scalar, samples that found a teacher so far."""


def fedcache(
    groups: Group | PyTree,
    cache: KnowledgeCache,
    *,
    order: str = "sequential",
    alpha: float | jax.Array = 1.5,
    temperature: float | jax.Array = 3.0,
    batch_size: int = 8,
    num_epochs: int = 1,
    num_steps_fn: NumStepsFn | None = None,
    reduce_fn: ReduceFn = mean_logits,
    poison_fn: PoisonFn | None = None,
    map_fn: MapFn | None = None,
) -> FederatedAlgorithm:
    """Personal models that exchange logits through a cache.

    A client's step on a batch: `z = apply_fn(params, x)`; `zbar = fetch(cache, index)`; a step of its optimiser on the
    mean of `CE(z, y) + alpha tau^2 KL(softmax(zbar / tau) || softmax(z / tau))`, without the second term where nothing
    related has been written; and `z`, as it was before the step, goes into the cache.

    The state's `params` are the `KnowledgeCache`, the client states are `ClientModel`s. Examples are a dict with `"x"`,
    `"y"` and `"index"`, the global sample index, which `with_index` adds to a federation.

    Args:
      groups: a `Group`, or a nest of them that share the cache. For a nest, `step` takes a nest of cohorts, one a group
        (in a dict the groups stand in the order of the sorted names), with client ids that differ between groups, and
        `init_client` a nest of parameters.
      cache: where a run begins, from `init_cache`.
      order: `"sequential"` or `"synchronous"`, see above.
      alpha: weight of the distillation, at least 0; a traced scalar is allowed.
      temperature: `tau`, above 0; a traced scalar is allowed.
      batch_size: samples per batch.
      num_epochs: passes over a client's samples in a round.
      num_steps_fn: as in `core.Epochs`.
      reduce_fn: how related logits become one teacher: `mean_logits`, `median_logits`, `trimmed_logits(1)`.
      poison_fn: what malicious clients, those in `cohort.byzantine`, write in place of their logits:
        `permuted_logits`, `peaked_logits(height)`.
      map_fn: layout of the client axis, from `cohort_map`, in the synchronous order; default: one vmap.

    Returns:
      A `FederatedAlgorithm` with info `FedCacheInfo`. Clients of weight 0 change nothing, whatever their data hold. The
      parameters that its `init` takes are not read.

    Raises:
      ValueError: if an argument is out of range, a `map_fn` comes with the sequential order (here), or examples,
        logits or flags of malicious clients are not there or not of the right shape (when `step` is traced).
      TypeError: if `groups` is neither.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, optax
      >>> import cedarjax as cj
      >>> from cedarjax import distill
      >>> x, y = np.eye(4, 3, dtype=np.float32), np.array([0, 1, 0, 1])
      >>> dataset = distill.with_index(cj.data.federated_dataset({"x": x, "y": y}, client_id=[0, 0, 1, 1]))
      >>> relations = distill.build_relations(dataset.examples["x"], dataset.examples["y"], num_related=1)
      >>> group = distill.Group(lambda params, x, key: x @ params, optax.sgd(0.1))
      >>> algorithm = fedcache(group, distill.init_cache(relations, 2), batch_size=2)
      >>> state = cj.init_run(algorithm, dataset, jnp.zeros((3, 2)))
      >>> state, history, _ = cj.run_rounds(algorithm, dataset, state, jax.random.key(0), num_rounds=2)
      >>> history.info.num_taught.tolist(), bool(state.server.params.written.all())
      ([[0, 2], [2, 2]], True)
    """
    leaves, structure = split_groups(groups)
    check_strengths(alpha, temperature)
    epochs = Epochs(batch_size, num_epochs, num_steps_fn).checked()
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}.")
    if order == "sequential" and map_fn is not None:
        raise ValueError("map_fn must be None in the sequential order, whose clients take turns; got a map_fn.")
    layout = cohort_map() if map_fn is None else map_fn

    def train(
        group: Group,
        shared: KnowledgeCache | None,
        store: Store,
        relations: KnowledgeCache,
        client: tuple[PyTree, ...],
    ) -> tuple[ClientModel, Store, FedCacheInfo]:
        """One client: reads `shared`, or what it writes to if there is none; writes at its rows or at its indices."""
        model, data, key, present, malicious = client

        def current(store: Store) -> KnowledgeCache:
            return relations._replace(logits=store.logits, written=store.written)

        def read(store: Store, examples: PyTree) -> tuple[jax.Array, jax.Array]:
            return fetch(current(store) if shared is None else shared, examples["index"], reduce_fn=reduce_fn)

        def keep(store: Store, batch: Batch, knowledge: PyTree, logits: jax.Array) -> Store:
            sent = logits if poison_fn is None else poison_logits(logits, malicious, poison_fn)
            at = batch.examples["index"] if shared is None else batch.rows
            after = write(current(store), at, sent, batch.counted)
            taught = store.num_taught + (knowledge[1] & batch.counted).sum(dtype=jnp.int32)
            return Store(after.logits, after.written, taught)

        def loss(params: Params, examples: PyTree, knowledge: PyTree, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = logits_of(group, params, examples["x"], key, relations.logits.shape[1])
            return knowledge_loss(logits, examples["y"], *knowledge, alpha=alpha, temperature=temperature), logits

        store = store._replace(num_taught=jnp.zeros((), jnp.int32))
        model, store, told = descend(
            loss, group.tx, model, data, key, epochs, present, store=store, read_fn=read, write_fn=keep
        )
        return model, store, FedCacheInfo(*told, store.num_taught)

    def in_turn(
        cache: KnowledgeCache, clients: Sequence[tuple[PyTree, ...]]
    ) -> tuple[KnowledgeCache, list[tuple[PyTree, FedCacheInfo]]]:
        def turns(group: Group, cache: KnowledgeCache, clients: tuple[PyTree, ...]) -> tuple[Store, tuple]:
            def turn(store: Store, one: tuple[PyTree, ...]) -> tuple[Store, tuple]:
                model, store, info = train(group, None, store, cache, one)
                return store, (model, info)

            return jax.lax.scan(turn, Store(cache.logits, cache.written, jnp.zeros((), jnp.int32)), clients)

        results = []
        for group, of_group in zip(leaves, clients, strict=True):
            store, result = turns(group, cache, of_group)
            cache = cache._replace(logits=store.logits, written=store.written)
            results.append(result)
        return cache, results

    def at_once(
        cache: KnowledgeCache, clients: Sequence[tuple[PyTree, ...]]
    ) -> tuple[KnowledgeCache, list[tuple[PyTree, FedCacheInfo]]]:
        def one_client(group: Group, shared: KnowledgeCache, *one: PyTree) -> tuple:
            data: ClientData = one[1]
            size = data.examples["index"].shape[0], shared.logits.shape[1]
            own = Store(jnp.zeros(size, shared.logits.dtype), jnp.zeros(size[0], bool), jnp.zeros((), jnp.int32))
            model, own, info = train(group, shared, own, shared, one)
            return model, info, own.logits, own.written

        results, after = [], cache
        for group, client in zip(leaves, clients, strict=True):
            model, info, logits, written = layout(
                lambda shared, *one, group=group: one_client(group, shared, *one), cache, *client
            )
            index = client[1].examples["index"]
            after = write(after, index.reshape(-1), logits.reshape(-1, logits.shape[-1]), written.reshape(-1))
            results.append((model, info))
        return after, results

    def init(params: PyTree) -> ServerState:
        del params
        return ServerState(jax.tree.map(lambda x: jnp.array(x, copy=True), cache), (), jnp.zeros((), jnp.int32))

    def step(state: ServerState, cohort: PyTree, key: jax.Array) -> tuple[ServerState, PyTree, PyTree]:
        cohorts = structure.flatten_up_to(cohort)
        if poison_fn is not None and any(one.byzantine is None for one in cohorts):
            raise ValueError("cohort.byzantine must be given, [C] bool, with a poison_fn; got None.")
        clients = [client_rows(one, key, ("x", "y", "index")) for one in cohorts]
        knowledge, results = (in_turn if order == "sequential" else at_once)(state.params, clients)
        models, infos = (structure.unflatten(list(part)) for part in zip(*results, strict=True))
        return ServerState(knowledge, state.opt_state, state.round + 1), models, infos

    def model(shared: PyTree, client_state: PyTree) -> PyTree:
        return structure.unflatten([one.params for one in structure.flatten_up_to(client_state)])

    return FederatedAlgorithm(init, step, lambda params: init_clients(groups, params), model)
