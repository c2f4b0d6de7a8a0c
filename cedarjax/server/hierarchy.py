"""Clients, edges, cloud: rounds on the edges, and now and then one between the edges and the cloud.

Reference: Liu et al., `Client-Edge-Cloud Hierarchical Federated Learning <https://arxiv.org/abs/1905.06641>`_ (2020),
HierFAVG. There both levels take weighted means; here both are chains of optax transformations, so any robust rule and
any server optimiser can stand on either.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from cedarjax.core.cohort import MapFn, cohort_map
from cedarjax.core.rounds import apply_server, check_cohort, client_keys, init_server, keep_absent, upload_weights
from cedarjax.core.types import Cohort, FederatedAlgorithm, LocalUpdate, Params, PyTree, ServerState


class HierarchyState(NamedTuple):
    """What stands in the place of the server's `opt_state`."""

    cloud: PyTree
    """State of the cloud's chain."""
    edges: ServerState
    """The edges' servers, leaves `[E, ...]`; `edges.params` is what their clients are sent."""
    weight: jax.Array
    """`[E]` float32, weight of the clients that each edge has heard since it last spoke to the cloud."""


class LinkMessages(NamedTuple):
    """Models that were sent in a round, int32 scalars."""

    device_up: jax.Array
    """From clients to their edges."""
    device_down: jax.Array
    """From edges to their clients."""
    edge_up: jax.Array
    """From edges to the cloud."""
    edge_down: jax.Array
    """From the cloud to the edges."""


class HierarchyInfo(NamedTuple):
    """What a round tells."""

    local: PyTree
    """The local update's info, leaves `[C, ...]`."""
    edges: tuple[PyTree, ...]
    """The infos of the edges' chains, leaves `[E, ...]`."""
    cloud: tuple[PyTree, ...]
    """The infos of the cloud's chain, zeros in rounds in which it has nothing to do."""
    is_synced: jax.Array
    """bool scalar, whether the cloud took part."""
    messages: LinkMessages
    """What was sent on each kind of link."""


class LinkBytes(NamedTuple):
    """Exact bytes on each kind of link."""

    device_edge: int
    """Between clients and edges, both ways."""
    edge_cloud: int
    """Between edges and the cloud, both ways."""


def hierarchical_round(
    local_update: LocalUpdate,
    edge_tx: optax.GradientTransformation,
    cloud_tx: optax.GradientTransformation,
    edge_of: ArrayLike,
    *,
    num_edges: int,
    period: int,
    map_fn: MapFn | None = None,
) -> FederatedAlgorithm:
    """A federated algorithm with edges between the clients and the cloud.

    In every round the clients of the cohort start from the parameters of their edges, and each edge runs `edge_tx` on
    the uploads of its own clients. Every `period` rounds the edges' parameters `w_e` go to the cloud as
    pseudo-gradients `w - w_e`, weighted by the clients that were heard since the last time; the cloud runs `cloud_tx`,
    and all edges start again from its `w`. With local training of `tau_1` steps and `period = tau_2` this is HierFAVG.

    Args:
      local_update: one client's work.
      edge_tx: chain of an aggregator and an optimiser, the same for all edges, each with a state of its own.
      cloud_tx: chain of an aggregator over edges and an optimiser.
      edge_of: `[N]` integers in `[0, num_edges)`, the edge of each client.
      num_edges: static number of edges, `E`.
      period: rounds from one synchronisation to the next, at least 1.
      map_fn: how the client axis is laid out, from `cohort_map`; default: one vmap.

    Returns:
      A `FederatedAlgorithm`. Its state's `params` are the cloud's, as of the last synchronisation, and its `opt_state`
      is a `HierarchyState`; it tells a `HierarchyInfo`. An edge none of whose clients is present keeps its state.

    Raises:
      ValueError: if a number is out of range or `edge_of` is not a vector of integers.

    Example:
      >>> import cedarjax as cj
      >>> loss_fn = lambda w, batch, key: 0.5 * jnp.mean((w - batch) ** 2)
      >>> local = cj.local.sgd(loss_fn, optax.sgd(1.0), batch_size=1)
      >>> fedavg = optax.chain(cj.robust.mean(), optax.sgd(1.0))
      >>> algorithm = hierarchical_round(local, fedavg, fedavg, [0, 0, 1], num_edges=2, period=2)
      >>> one = jnp.ones(3, jnp.int32)
      >>> data = cj.ClientData(jnp.array([[1.0], [3.0], [8.0]]), num_examples=one, num_support=one)
      >>> cohort = cj.Cohort(data, weights=jnp.ones(3), client_id=jnp.arange(3))
      >>> state = algorithm.init(jnp.float32(0.0))
      >>> for key in jax.random.split(jax.random.key(0)):
      ...     state, _, info = algorithm.step(state, cohort, key)
      ...     print(state.params, info.messages.edge_up)
      0.0 0
      4.0 2
    """
    if num_edges < 1:
        raise ValueError(f"num_edges must be at least 1, got {num_edges}.")
    if period < 1:
        raise ValueError(f"period must be at least 1, got {period}.")
    edge_index = jnp.asarray(edge_of)
    if edge_index.ndim != 1 or not jnp.issubdtype(edge_index.dtype, jnp.integer):
        raise ValueError(f"edge_of must be [N] integers, got {edge_index.dtype} of shape {edge_index.shape}.")
    if not isinstance(edge_index, jax.core.Tracer):
        least, most = int(edge_index.min()), int(edge_index.max())
        if least < 0 or most >= num_edges:
            raise ValueError(f"edge_of must lie in [0, {num_edges}), got {least} to {most}.")
    edge_tx, cloud_tx = optax.with_extra_args_support(edge_tx), optax.with_extra_args_support(cloud_tx)
    map_fn = cohort_map() if map_fn is None else map_fn

    def init(params: Params) -> ServerState:
        shared = local_update.share(params)
        cloud, edge = init_server(cloud_tx, shared), init_server(edge_tx, shared)
        edges = jax.tree.map(lambda x: jnp.array(jnp.broadcast_to(x, (num_edges, *x.shape)), copy=True), edge)
        return cloud._replace(opt_state=HierarchyState(cloud.opt_state, edges, jnp.zeros(num_edges, jnp.float32)))

    def work(shared: PyTree, edge: jax.Array, *one_client: Any) -> Any:
        return local_update.update(jax.tree.map(lambda x: x[edge], shared), *one_client)

    def step(state: ServerState, cohort: Cohort, key: jax.Array) -> tuple[ServerState, PyTree, HierarchyInfo]:
        check_cohort(cohort)
        local_key, server_key = jax.random.split(key)
        hierarchy: HierarchyState = state.opt_state
        edge = edge_index.at[cohort.client_id].get(mode="clip")
        keys = client_keys(local_key, cohort.client_id)
        upload, client_state, info = map_fn(work, hierarchy.edges.params, edge, cohort.state, cohort.data, keys)

        is_member = edge[None, :] == jnp.arange(num_edges, dtype=edge.dtype)[:, None]
        weights = jnp.where(is_member, cohort.weights[None, :], 0)

        def one_edge(server: ServerState, mine: jax.Array, edge_key: jax.Array) -> Any:
            told = {"weights": upload_weights(mine, upload.mask), "key": edge_key, "byzantine": cohort.byzantine}
            return apply_server(edge_tx, server, upload.delta, **told)

        moved, told = jax.vmap(one_edge)(hierarchy.edges, weights, client_keys(server_key, jnp.arange(num_edges)))
        heard = weights.sum(axis=1)
        edges = keep_absent(heard, moved, hierarchy.edges)
        heard = hierarchy.weight + heard.astype(hierarchy.weight.dtype)

        def synchronise(_: None) -> tuple[ServerState, Any]:
            drift = jax.tree.map(lambda w, w_e: w[None] - w_e, state.params, edges.params)
            server = state._replace(opt_state=hierarchy.cloud)
            cloud, cloud_told = apply_server(cloud_tx, server, drift, weights=heard, key=server_key)
            fresh = jax.tree.map(lambda w, w_e: jnp.broadcast_to(w, w_e.shape), cloud.params, edges.params)
            renewed = HierarchyState(cloud.opt_state, edges._replace(params=fresh), jnp.zeros_like(heard))
            return cloud._replace(opt_state=renewed), cloud_told

        def go_on(_: None) -> tuple[ServerState, Any]:
            silent = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(synchronise, None)[1])
            waiting = HierarchyState(hierarchy.cloud, edges, heard)
            return state._replace(opt_state=waiting, round=state.round + 1), silent

        is_synced = (state.round + 1) % period == 0
        server, cloud_told = jax.lax.cond(is_synced, synchronise, go_on, None)
        present = jnp.sum(cohort.weights > 0, dtype=jnp.int32)
        spoke = jnp.where(is_synced, jnp.int32(num_edges), jnp.int32(0))
        messages = LinkMessages(present, present, spoke, spoke)
        told_of_all = HierarchyInfo(info, told, cloud_told, is_synced, messages)
        return server, keep_absent(cohort.weights, client_state, cohort.state), told_of_all

    return FederatedAlgorithm(init, step, local_update.init, local_update.model)


def link_bytes(messages: LinkMessages, *, model_bytes: int) -> LinkBytes:
    """Bytes of a run on each kind of link, exact however many they are.

    Args:
      messages: counts of one round, or of many, `[R]`.
      model_bytes: of one model; both ways the same.

    Returns:
      Python integers.

    Example:
      >>> sent = LinkMessages(*jnp.array([[3, 2], [3, 3], [0, 2], [0, 2]]))
      >>> link_bytes(sent, model_bytes=10)
      LinkBytes(device_edge=110, edge_cloud=40)
    """
    counts = [sum(map(int, jnp.ravel(count))) for count in messages]
    return LinkBytes((counts[0] + counts[1]) * model_bytes, (counts[2] + counts[3]) * model_bytes)
