"""Rounds of linear rules whose memory does not grow with the number of clients.

Chunking alone saves nothing when all updates are collected before they are averaged. Here each chunk's weighted sum is
added to a running total inside the scan, so no `[C, D]` array ever exists.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cedarjax.core.cohort import client_mesh
from cedarjax.core.dataset import pad_cohort
from cedarjax.core.rounds import apply_server, check_cohort, client_keys, init_server, keep_absent, upload_weights
from cedarjax.core.trees import accumulator, finite_rows, weighted_sum
from cedarjax.core.types import Cohort, FederatedAlgorithm, LocalUpdate, PyTree, RoundInfo, ServerState, Upload


def streamed_round(
    local_update: LocalUpdate, server_tx: optax.GradientTransformation, *, chunk_size: int = 1, mesh: Mesh | None = None
) -> FederatedAlgorithm:
    """A federated round that averages while it maps, `delta = sum_i w_i delta_i / sum_i w_i`.

    Same numbers, to rounding, as `federated_round(local_update, optax.chain(robust.mean(), server_tx))`; peak memory is
    that of one chunk. On a mesh each device streams its share of the clients and one all-reduce adds the totals.

    Args:
      local_update: one client's work.
      server_tx: server optimiser only; it sees the weighted mean, without a client axis.
      chunk_size: clients that are vmapped together on each device.
      mesh: mesh whose axes, all of them, carry the client axis; or None for one device.

    Returns:
      A `FederatedAlgorithm` with info `RoundInfo`. A non-finite upload counts as absent; the number of those is the
      first entry of `RoundInfo.server`.

    Raises:
      ValueError: if `chunk_size` is not positive, or, at trace time, if the parts of a cohort disagree.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> local = cj.local.sgd(lambda w, x, key: 0.5 * jnp.mean((w - x) ** 2), optax.sgd(1.0), batch_size=1)
      >>> algorithm = cj.streamed_round(local, optax.sgd(1.0), chunk_size=2)
      >>> one = jnp.ones(4, jnp.int32)
      >>> data = cj.ClientData(jnp.array([[1.0], [3.0], [5.0], [7.0]]), num_examples=one, num_support=one)
      >>> cohort = cj.Cohort(data, weights=jnp.ones(4), client_id=jnp.arange(4))
      >>> state, _, _ = jax.jit(algorithm.step)(algorithm.init(jnp.float32(0.0)), cohort, jax.random.key(0))
      >>> print(state.params)
      4.0
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    server_tx = optax.with_extra_args_support(server_tx)
    mesh = None if mesh is None else client_mesh(mesh)
    num_devices = 1 if mesh is None else mesh.size

    def one_client(params: PyTree, state: PyTree, data: PyTree, key: jax.Array) -> tuple[Upload, PyTree, PyTree]:
        return local_update.update(params, state, data, key)

    def stream(params: PyTree, cohort: Cohort, keys: jax.Array) -> tuple[PyTree, PyTree, jax.Array, PyTree, PyTree]:
        count = cohort.weights.shape[0]
        chunks = jax.tree.map(lambda x: x.reshape(count // chunk_size, chunk_size, *x.shape[1:]), (cohort, keys))

        def add_chunk(totals: tuple, chunk: tuple[Cohort, jax.Array]) -> tuple[tuple, tuple]:
            part, part_keys = chunk
            upload, client_state, info = jax.vmap(one_client, in_axes=(None, 0, 0, 0))(
                params, part.state, part.data, part_keys
            )
            finite = finite_rows(upload.delta)
            weights = jnp.where(finite, part.weights, jnp.zeros_like(part.weights))
            per_leaf = upload_weights(weights, upload.mask)
            sums, masses, bad = totals
            if upload.mask is None:
                per_leaf = jax.tree.map(lambda _: weights, masses)
            # Widened before the sum: a chunk's total need not fit the dtype of the parameters.
            delta = jax.tree.map(lambda a, x: x.astype(a.dtype), sums, upload.delta)
            sums = jax.tree.map(jnp.add, sums, weighted_sum(per_leaf, delta))
            masses = jax.tree.map(lambda a, w: a + w.sum(), masses, per_leaf)
            bad = bad + jnp.sum(~finite & (part.weights > 0), dtype=jnp.int32)
            return (sums, masses, bad), (keep_absent(part.weights, client_state, part.state), info)

        wide = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), accumulator(x)), params)
        masses = jax.tree.map(lambda _: jnp.zeros((), cohort.weights.dtype), params)
        totals, told = jax.lax.scan(add_chunk, (wide, masses, jnp.zeros((), jnp.int32)), chunks)
        return *totals, *jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), told)

    def step(state: ServerState, cohort: Cohort, key: jax.Array) -> tuple[ServerState, PyTree, RoundInfo]:
        count = check_cohort(cohort)
        local_key, server_key = jax.random.split(key)
        per_step = chunk_size * num_devices
        cohort = pad_cohort(cohort, -(-count // per_step) * per_step)
        keys = client_keys(local_key, cohort.client_id)
        run = stream
        if mesh is not None:
            clients = P(mesh.axis_names)

            def sharded_stream(params: PyTree, cohort: Cohort, keys: jax.Array) -> tuple:
                *totals, client_state, info = stream(params, cohort, keys)
                return *jax.lax.psum(totals, mesh.axis_names), client_state, info

            run = jax.shard_map(
                sharded_stream,
                mesh=mesh,
                in_specs=(P(), clients, clients),
                out_specs=(P(), P(), P(), clients, clients),
                check_vma=False,
            )
        sums, masses, bad, client_state, info = run(state.params, cohort, keys)
        client_state, info = jax.tree.map(lambda x: x[:count], (client_state, info))
        mean = jax.tree.map(
            lambda s, m, p: (s / jnp.where(m > 0, m, jnp.ones_like(m)).astype(s.dtype)).astype(p.dtype),
            sums,
            masses,
            state.params,
        )
        state, told = apply_server(server_tx, state, mean, key=server_key)
        return state, client_state, RoundInfo(info, (bad, *told))

    return FederatedAlgorithm(lambda params: init_server(server_tx, params), step, local_update.init)
