"""No server: every client keeps a model of its own and mixes it with its neighbours'.

Reference: Lian et al., `Can Decentralized Algorithms Outperform Centralized Algorithms?
<https://arxiv.org/abs/1705.09056>`_ (2017), D-PSGD: a step of one's own, and `X <- W X` with a doubly stochastic `W`.
One matmul mixes all clients at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from cedarjax.core.cohort import MapFn, cohort_map
from cedarjax.core.rounds import check_cohort, client_keys, keep_absent
from cedarjax.core.trees import finite_rows, sq_norms, weighted_mean
from cedarjax.core.types import Cohort, FederatedAlgorithm, LocalUpdate, Params, PyTree, ServerState


class GossipClient(NamedTuple):
    """What a client keeps."""

    shared: PyTree
    """What it sends to its neighbours: its model's parameters for most local updates."""
    state: PyTree
    """The local update's own state."""


class GossipInfo(NamedTuple):
    """What a round tells."""

    local: PyTree
    """The local update's info, leaves `[C, ...]`."""
    messages: jax.Array
    """`[C]` int32, models that each client sent to others."""
    distance: jax.Array
    """`[C]` float32, how far each client is from the mean of all that are present, after mixing."""


def metropolis_weights(adjacency: jax.Array) -> jax.Array:
    """Doubly stochastic mixing matrix of an undirected graph.

    `w_ij = 1 / (1 + max(deg_i, deg_j))` for neighbours, and `w_ii = 1 - sum_j w_ij`. Reference: Xiao and Boyd, `Fast
    linear iterations for distributed averaging <https://doi.org/10.1016/j.sysconle.2004.02.022>`_ (2004).

    Args:
      adjacency: `[N, N]`, symmetric; the diagonal is not read.

    Returns:
      `[N, N]` float32, symmetric, rows and columns sum to 1.

    Example:
      >>> metropolis_weights(ring(4))[0].round(3).tolist()
      [0.3330000042915344, 0.3330000042915344, 0.0, 0.3330000042915344]
    """
    if adjacency.ndim != 2 or adjacency.shape[0] != adjacency.shape[1]:
        raise ValueError(f"adjacency must be [N, N], got the shape {adjacency.shape}.")
    eye = jnp.eye(adjacency.shape[0], dtype=bool)
    linked = adjacency.astype(bool) & ~eye
    degree = linked.sum(axis=1)
    larger = jnp.maximum(degree[:, None], degree[None, :]).astype(jnp.float32)
    weights = jnp.where(linked, 1 / (1 + larger), 0)
    return weights + jnp.where(eye, 1 - weights.sum(axis=1, keepdims=True), 0)


def ring(num_clients: int, num_neighbors: int = 1) -> jax.Array:
    """A ring in which everybody knows the nearest `num_neighbors` on either side.

    Args:
      num_clients: `N`.
      num_neighbors: on either side.

    Returns:
      `[N, N]` bool adjacency.

    Raises:
      ValueError: if a number is out of range.
    """
    if num_clients < 1:
        raise ValueError(f"num_clients must be at least 1, got {num_clients}.")
    if num_neighbors < 1:
        raise ValueError(f"num_neighbors must be at least 1, got {num_neighbors}.")
    place = jnp.arange(num_clients)
    apart = jnp.abs(place[:, None] - place[None, :])
    apart = jnp.minimum(apart, num_clients - apart)
    return (apart > 0) & (apart <= num_neighbors)


def spectral_gap(mixing: jax.Array) -> jax.Array:
    """`1 - |lambda_2|`: with every mixing, disagreement shrinks to `1 - gap` of what it was, or further.

    Args:
      mixing: `[N, N]`, symmetric, rows sum to 1.

    Returns:
      float32 scalar in [0, 1]; 0 where the graph falls into parts.
    """
    others = mixing - 1 / mixing.shape[0]
    return 1 - jnp.max(jnp.abs(jnp.linalg.eigvalsh(others)))


def mix(mixing: jax.Array, weights: jax.Array, models: PyTree) -> PyTree:
    """Mixes the models of those who are present.

    What a present client would have taken from an absent one, it keeps of its own: `w_ii` grows by it. So rows sum to 1
    whoever is absent, and a symmetric matrix preserves the mean of the models of those who are present.

    Args:
      mixing: `[C, C]`, rows sum to 1.
      weights: `[C]`; 0 means absent, other values are not read.
      models: leaves `[C, ...]`; rows of absent clients may hold anything and come back unchanged.

    Returns:
      Leaves `[C, ...]`.
    """
    present = weights > 0
    both = present[:, None] & present[None, :]
    kept = jnp.where(both, mixing, 0)
    kept += jnp.diag(jnp.where(present, 1 - kept.sum(axis=1), 0))

    def one_leaf(x: jax.Array) -> jax.Array:
        rows = jnp.where(present[:, None], x.reshape(x.shape[0], -1), 0)
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        mixed = jnp.matmul(kept.astype(dtype), rows.astype(dtype), precision=jax.lax.Precision.HIGHEST)
        return mixed.astype(x.dtype).reshape(x.shape)

    return keep_absent(weights, jax.tree.map(one_leaf, models), models)


def gossip_round(local_update: LocalUpdate, mixing: ArrayLike, map_fn: MapFn | None = None) -> FederatedAlgorithm:
    """A federated algorithm without a server: `x_i <- sum_j w_ij (x_j - delta_j)`.

    Every client of the cohort runs `local_update` from its own parameters, and those who are present mix what came out.

    Args:
      local_update: one client's work.
      mixing: `[N, N]`, rows sum to 1, for example `metropolis_weights(ring(N))`; `w_ij` is the weight that client `i`
        gives to client `j`.
      map_fn: how the client axis is laid out, from `cohort_map`; default: one vmap.

    Returns:
      A `FederatedAlgorithm`. Clients keep a `GossipClient`; the state's `params` are the mean of the models of those
      who were present, which nobody needs to go on; it tells a `GossipInfo`. A client's `model` is its own. A client
      whose model is no longer finite counts as absent: it keeps what it had, and nobody hears of it.

    Raises:
      ValueError: if `mixing` is not square, or its rows do not sum to 1.

    Example:
      >>> import optax
      >>> import cedarjax as cj
      >>> loss_fn = lambda w, batch, key: 0.5 * jnp.mean((w - batch) ** 2)
      >>> local = cj.local.sgd(loss_fn, optax.sgd(0.5), batch_size=1)
      >>> dataset = cj.data.federated_dataset(jnp.arange(6.0), client_id=jnp.arange(6))
      >>> algorithm = gossip_round(local, metropolis_weights(ring(6)))
      >>> state = cj.init_run(algorithm, dataset, jnp.float32(0.0))
      >>> state, _, _ = cj.run_rounds(algorithm, dataset, state, jax.random.key(0), num_rounds=30)
      >>> print(state.server.params.round(2), bool(jnp.ptp(state.clients.shared) < jnp.float32(5.0)))
      2.5 True
    """
    matrix = jnp.asarray(mixing)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"mixing must be [N, N], got the shape {matrix.shape}.")
    if not isinstance(matrix, jax.core.Tracer):
        worst = float(jnp.max(jnp.abs(matrix.sum(axis=1) - 1)))
        if not worst < 1e-4:
            raise ValueError(f"mixing must have rows that sum to 1, got one that is off by {worst:.3g}.")
    map_fn = cohort_map() if map_fn is None else map_fn

    def init(params: Params) -> ServerState:
        shared = jax.tree.map(lambda x: jnp.array(x, jnp.result_type(x), copy=True), local_update.share(params))
        return ServerState(shared, (), jnp.zeros((), jnp.int32))

    def init_client(params: Params) -> GossipClient:
        return GossipClient(local_update.share(params), local_update.init(params))

    def work(_: None, client: GossipClient, *rest: PyTree) -> tuple[GossipClient, PyTree]:
        upload, state, info = local_update.update(client.shared, client.state, *rest)
        if upload.mask is not None:
            raise ValueError("local_update must upload all layers: a client's own model has no layer that is left out.")
        return GossipClient(jax.tree.map(jnp.subtract, client.shared, upload.delta), state), info

    def step(state: ServerState, cohort: Cohort, key: jax.Array) -> tuple[ServerState, PyTree, GossipInfo]:
        check_cohort(cohort)
        clients, info = map_fn(work, None, cohort.state, cohort.data, client_keys(key, cohort.client_id))
        present = (cohort.weights > 0) & finite_rows(clients.shared)
        weights = present.astype(jnp.float32)
        clients = keep_absent(weights, clients, cohort.state)
        ids = jnp.clip(cohort.client_id, 0, matrix.shape[0] - 1)
        among = matrix[ids][:, ids]
        clients = clients._replace(shared=mix(among, weights, clients.shared))
        average = weighted_mean(clients.shared, weights)
        links = among.astype(bool) & present[:, None] & present[None, :] & ~jnp.eye(len(ids), dtype=bool)
        apart = jax.tree.map(lambda x, m: (x - m[None]).astype(jnp.float32), clients.shared, average)
        distance = jnp.where(present, jnp.sqrt(sq_norms(apart)), 0)
        told = GossipInfo(info, links.sum(axis=0, dtype=jnp.int32), distance)
        anybody = jnp.any(present)
        average = jax.tree.map(lambda new, old: jnp.where(anybody, new, old), average, state.params)
        return ServerState(average, (), state.round + 1), clients, told

    return FederatedAlgorithm(
        init, step, init_client, lambda shared, client: local_update.model(client.shared, client.state)
    )
