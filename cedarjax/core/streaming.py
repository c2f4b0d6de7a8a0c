"""Rounds of linear rules whose memory does not grow with the number of clients.

Chunking alone saves nothing when all updates are collected before they are averaged. Here each chunk's weighted sum is
added to a running total inside the scan, so no `[C, D]` array ever exists. `streamed_round` takes a cohort that lies on
the device; `stream_blocks` takes it apart, so that blocks of a cohort that does not fit can be brought in one by one.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cedarjax.core.chunks import ChunkSize, check_chunk_size, resolve_chunk_size
from cedarjax.core.cohort import client_mesh
from cedarjax.core.dataset import pad_cohort
from cedarjax.core.dtypes import accumulator
from cedarjax.core.rounds import apply_server, check_cohort, client_keys, init_server, keep_absent, upload_weights
from cedarjax.core.trees import finite_rows, weighted_sum
from cedarjax.core.types import Cohort, FederatedAlgorithm, LocalUpdate, PyTree, RoundInfo, ServerState, Upload


class Totals(NamedTuple):
    """What a streamed round has added up so far."""

    sums: PyTree
    """`sum_i w_i delta_i`, shaped like the parameters, in float32 or wider."""
    masses: PyTree
    """`sum_i w_i` of each parameter: they differ where clients left layers out."""
    num_nonfinite: jax.Array
    """int32 scalar, uploads left out because they were not finite."""


class RoundStream(NamedTuple):
    """A round that is fed block by block: `start`, then `add` for every block of clients, then `finish`."""

    init: Callable[[PyTree], ServerState]
    """`init(params) -> ServerState`, once."""
    start: Callable[[ServerState], Totals]
    """`start(state) -> Totals`, of a round without clients."""
    add: Callable[[ServerState, Totals, Cohort, jax.Array], tuple[Totals, PyTree, PyTree]]
    """`add(state, totals, block, key) -> (totals, client_state, info)`, with the same key for all blocks of a round: a
    client's draws come from its id."""
    finish: Callable[[ServerState, Totals, jax.Array], tuple[ServerState, tuple[PyTree, ...]]]
    """`finish(state, totals, key) -> (state, told)`, with the key of the round."""


def stream_blocks(
    local_update: LocalUpdate,
    server_tx: optax.GradientTransformation,
    *,
    chunk_size: ChunkSize = 1,
    mesh: Mesh | None = None,
) -> RoundStream:
    """The parts of `streamed_round`, for cohorts that are brought to the device block by block.

    A round over blocks has the numbers of the round over all clients at once, to rounding. Blocks of one size compile
    once; donate `totals` and, between two blocks, no more than two of them need to be in memory.

    Args:
      local_update: one client's work.
      server_tx: server optimiser only; it sees the weighted mean, without a client axis.
      chunk_size: clients that are vmapped together on each device, or `"auto"`, as in `cohort_map`.
      mesh: mesh whose axes, all of them, carry the client axis; or None for one device.

    Returns:
      A `RoundStream`.

    Raises:
      ValueError: if `chunk_size` is not positive, or, at trace time, if the parts of a block disagree.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> local = cj.local.sgd(lambda w, x, key: 0.5 * jnp.mean((w - x) ** 2), optax.sgd(1.0), batch_size=1)
      >>> stream = cj.stream_blocks(local, optax.sgd(1.0), chunk_size=2)
      >>> state, key = stream.init(jnp.float32(0.0)), jax.random.key(0)
      >>> totals, one = stream.start(state), jnp.ones(2, jnp.int32)
      >>> for first in (1.0, 5.0):
      ...     data = cj.ClientData(jnp.array([[first], [first + 2]]), num_examples=one, num_support=one)
      ...     block = cj.Cohort(data, weights=jnp.ones(2), client_id=jnp.arange(2))
      ...     totals, _, _ = stream.add(state, totals, block, key)
      >>> state, _ = stream.finish(state, totals, key)
      >>> print(state.params)
      4.0
    """
    check_chunk_size(chunk_size)
    if chunk_size is None:
        raise ValueError('chunk_size must be "auto" or at least 1, got None: all clients at once is no stream.')
    server_tx = optax.with_extra_args_support(server_tx)
    mesh = None if mesh is None else client_mesh(mesh)
    num_devices = 1 if mesh is None else mesh.size

    def one_client(params: PyTree, state: PyTree, data: PyTree, key: jax.Array) -> tuple[Upload, PyTree, PyTree]:
        return local_update.update(params, state, data, key)

    def stream(
        size: int, params: PyTree, totals: Totals, block: Cohort, keys: jax.Array
    ) -> tuple[Totals, PyTree, PyTree]:
        count = block.weights.shape[0]

        def add_chunk(totals: Totals, start: jax.Array) -> tuple[Totals, tuple[PyTree, PyTree]]:
            # Cut out by hand: reshaped to [chunks, chunk_size, ...], XLA:CPU may copy all clients' data first.
            part, part_keys = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), (block, keys))
            upload, client_state, info = jax.vmap(one_client, in_axes=(None, 0, 0, 0))(
                params, part.state, part.data, part_keys
            )
            finite = finite_rows(upload.delta)
            weights = jnp.where(finite, part.weights, jnp.zeros_like(part.weights))
            per_leaf = upload_weights(weights, upload.mask)
            if upload.mask is None:
                per_leaf = jax.tree.map(lambda _: weights, totals.masses)
            # Widened before the sum: a chunk's total need not fit the dtype of the parameters.
            delta = jax.tree.map(lambda a, x: x.astype(a.dtype), totals.sums, upload.delta)
            totals = Totals(
                sums=jax.tree.map(jnp.add, totals.sums, weighted_sum(per_leaf, delta)),
                masses=jax.tree.map(lambda a, w: a + w.sum(dtype=a.dtype), totals.masses, per_leaf),
                num_nonfinite=totals.num_nonfinite + jnp.sum(~finite & (part.weights > 0), dtype=jnp.int32),
            )
            return totals, (keep_absent(part.weights, client_state, part.state), info)

        starts = jnp.arange(0, count, size, dtype=jnp.int32)
        totals, told = jax.lax.scan(add_chunk, totals, starts)
        return totals, *jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), told)

    def start(state: ServerState) -> Totals:
        sums = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), accumulator(x)), state.params)
        return Totals(sums, jax.tree.map(lambda _: jnp.zeros((), jnp.float32), sums), jnp.zeros((), jnp.int32))

    def add(state: ServerState, totals: Totals, block: Cohort, key: jax.Array) -> tuple[Totals, PyTree, PyTree]:
        count = check_cohort(block)
        keys = client_keys(jax.random.split(key)[0], block.client_id)
        per_client = (block.state, block.data, keys)
        size = resolve_chunk_size(chunk_size, one_client, state.params, per_client, mesh, streamed=True) or count
        size = min(size, -(-count // num_devices))
        padded = pad_cohort(block, -(-count // (size * num_devices)) * size * num_devices)
        keys = keys if padded is block else client_keys(jax.random.split(key)[0], padded.client_id)
        run: Callable[..., tuple[Totals, PyTree, PyTree]] = functools.partial(stream, size)
        if mesh is not None:
            clients = P(mesh.axis_names)

            def sharded_stream(params: PyTree, start: Totals, block: Cohort, keys: jax.Array) -> tuple:
                zeros = jax.tree.map(jnp.zeros_like, start)
                sums, client_state, info = stream(size, params, zeros, block, keys)
                return jax.tree.map(jnp.add, start, jax.lax.psum(sums, mesh.axis_names)), client_state, info

            run = jax.shard_map(
                sharded_stream,
                mesh=mesh,
                in_specs=(P(), P(), clients, clients),
                out_specs=(P(), clients, clients),
                check_vma=False,
            )
        totals, client_state, info = run(state.params, totals, padded, keys)
        client_state, info = jax.tree.map(lambda x: x[:count], (client_state, info))
        return totals, client_state, info

    def finish(state: ServerState, totals: Totals, key: jax.Array) -> tuple[ServerState, tuple[PyTree, ...]]:
        mean = jax.tree.map(
            lambda s, m, p: (s / jnp.where(m > 0, m, jnp.ones_like(m)).astype(s.dtype)).astype(p.dtype),
            totals.sums,
            totals.masses,
            state.params,
        )
        state, told = apply_server(server_tx, state, mean, key=jax.random.split(key)[1])
        return state, (totals.num_nonfinite, *told)

    return RoundStream(lambda params: init_server(server_tx, local_update.share(params)), start, add, finish)


def streamed_round(
    local_update: LocalUpdate,
    server_tx: optax.GradientTransformation,
    *,
    chunk_size: ChunkSize = 1,
    mesh: Mesh | None = None,
) -> FederatedAlgorithm:
    """A federated round that averages while it maps, `delta = sum_i w_i delta_i / sum_i w_i`.

    Same numbers, to rounding, as `federated_round(local_update, optax.chain(robust.mean(), server_tx))`; peak memory is
    that of one chunk. On a mesh each device streams its share of the clients and one all-reduce adds the totals.

    Args:
      local_update: one client's work.
      server_tx: server optimiser only; it sees the weighted mean, without a client axis.
      chunk_size: clients that are vmapped together on each device, or `"auto"`, as in `cohort_map`.
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
    stream = stream_blocks(local_update, server_tx, chunk_size=chunk_size, mesh=mesh)

    def step(state: ServerState, cohort: Cohort, key: jax.Array) -> tuple[ServerState, PyTree, RoundInfo]:
        totals, client_state, info = stream.add(state, stream.start(state), cohort, key)
        state, told = stream.finish(state, totals, key)
        return state, client_state, RoundInfo(info, told)

    return FederatedAlgorithm(stream.init, step, local_update.init, local_update.model)
