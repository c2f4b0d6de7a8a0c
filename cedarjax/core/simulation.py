"""An asynchronous federation in simulated time, as one `lax.scan` over events.

`A` slots are active at a time. Each holds a client, the time at which it will be done, and the version of the model
that it downloaded. At an event the earliest slot is done: its upload reaches the server, and the slot starts again with
the newest model. Nothing of this is a Python queue, so a run of any length is one compiled program, which can be
vmapped over seeds.

A client's training starts from the very parameters that it downloaded. They are kept in `min(A, max_staleness + 1)`
copies of the model: one a slot, or a ring of the last versions where that is smaller. So without `max_staleness` no
upload is ever too old, at the price of `A` models; with it, memory does not grow with the number of active clients.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core.asynchrony import Arrival, AsyncServer, AsyncServerState
from cedarjax.core.clock import DurationFn, fixed_durations
from cedarjax.core.dataset import ABSENT_ID, FederatedDataset, take_clients
from cedarjax.core.dtypes import accumulator
from cedarjax.core.events import AsyncHistory, Simulation, SimulationState
from cedarjax.core.fleet import change_client, event_queue, first_clients, next_event, reschedule
from cedarjax.core.lowrank.node import dense
from cedarjax.core.types import LocalUpdate, Params, PyTree


class _Job(NamedTuple):
    duration: jax.Array
    """Key of how long it takes."""
    training: jax.Array
    """Key of the client's work."""
    loss: jax.Array
    """Key of whether the upload gets lost."""


def _job(key: jax.Array, client_id: jax.Array, count: jax.Array) -> _Job:
    """Keys of a client's next job: they depend on the client and on its jobs so far, and on nothing that others do."""
    return _Job(*jax.random.split(jax.random.fold_in(jax.random.fold_in(key, client_id), count), 3))


def _check(name: str, values: jax.Array | float, num_clients: int) -> jax.Array:
    array = jnp.asarray(values)
    if array.shape not in ((), (num_clients,)):
        raise ValueError(f"{name} must be a scalar or [N] = [{num_clients}], got the shape {array.shape}.")
    return jnp.broadcast_to(array.astype(accumulator(array)), (num_clients,))


def simulation(
    server: AsyncServer,
    local_update: LocalUpdate,
    dataset: FederatedDataset,
    *,
    durations: DurationFn | jax.Array,
    num_active: int | None = None,
    max_staleness: int | None = None,
    start_times: jax.Array | None = None,
    loss_rate: float | jax.Array = 0.0,
    weighting: str | jax.Array = "examples",
) -> Simulation:
    """An asynchronous federation: a server, its clients, and how long they take.

    At an event the earliest slot is done, the lowest of those that are done at once. Its client trains from the model
    that it downloaded, the server receives the upload, and the slot starts anew with the newest model: with the same
    client, or, if fewer are active than there are, with one drawn uniformly among those that are idle (the one that has
    just finished among them). A client's draws for its `j`-th job come from its id and `j` alone. A job whose upload is
    not accepted leaves no trace: neither at the server nor in the client's state.

    Memory: `min(A, max_staleness + 1)` models, the clients' states, and about 20 bytes a client. Work for an event: one
    client's training, the server's rule, and `O(sqrt(A))`.

    Args:
      server: an `AsyncServer`, from `cedarjax.server`.
      local_update: one client's work.
      dataset: the clients, `N` of them.
      durations: `(key, client_id, count) -> seconds`, or `[N]` seconds. A client whose duration is not at least 0 never
        finishes. They are added in their own dtype, float32 or wider.
      num_active: `A`, clients that work at the same time; default: all.
      max_staleness: uploads with a staleness above this are dropped; default: none are.
      start_times: `[N]` seconds at which each client comes to the federation; default: 0 for all. A slot whose first
        client comes later than 0 has one event more, the download.
      loss_rate: probability that an upload never arrives, a scalar or `[N]`. The slot then starts again at the time at
        which it would have arrived.
      weighting: `"examples"` weighs an upload by the client's number of examples, `"uniform"` by 1; or `[N]` weights.

    Returns:
      A `Simulation`.

    Raises:
      ValueError: if a number is out of range or a shape does not fit.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> dataset = cj.data.federated_dataset(jnp.array([1.0, 5.0]), client_id=[0, 1])
      >>> local = cj.local.sgd(lambda w, x, key: 0.5 * jnp.mean((w - x) ** 2), optax.sgd(1.0), batch_size=1)
      >>> server = cj.server.fedasync(0.5, cj.server.constant())
      >>> fleet = simulation(server, local, dataset, durations=jnp.array([2.0, 3.0]))
      >>> key = jax.random.key(0)
      >>> state, history, _ = cj.core.simulate(fleet, fleet.init(jnp.float32(0.0), key), key, num_events=4)
      >>> print(state.server.params, history.time, history.client_id, history.staleness)
      1.4375 [2. 3. 4. 6.] [0 1 0 0] [0 1 1 0]
    """
    total = dataset.num_clients
    active = total if num_active is None else num_active
    if not 1 <= active <= total:
        raise ValueError(f"num_active must satisfy 1 <= num_active <= {total} (all clients), got {num_active}.")
    if max_staleness is not None and max_staleness < 0:
        raise ValueError(f"max_staleness must be at least 0, got {max_staleness}.")
    if isinstance(loss_rate, int | float) and not 0 <= loss_rate <= 1:
        raise ValueError(f"loss_rate must satisfy 0 <= loss_rate <= 1, got {loss_rate}.")
    if isinstance(weighting, str) and weighting not in ("examples", "uniform"):
        raise ValueError(f'weighting must be "examples", "uniform" or [N] weights, got {weighting!r}.')
    num_copies = active if max_staleness is None else min(active, max_staleness + 1)
    duration_fn: DurationFn = (
        durations if callable(durations) else fixed_durations(_check("durations", durations, total))
    )
    weights = None if isinstance(weighting, str) else _check("weighting", weighting, total)
    loses = not (isinstance(loss_rate, int | float) and loss_rate == 0)
    rates = _check("loss_rate", loss_rate, total) if loses else None

    def duration(key: jax.Array, client_id: jax.Array, count: jax.Array) -> jax.Array:
        seconds = jnp.asarray(duration_fn(_job(key, client_id, count).duration, client_id, count))
        if seconds.shape != ():
            raise ValueError(f"durations must return a scalar, got the shape {seconds.shape}.")
        seconds = seconds.astype(accumulator(seconds))
        return jnp.where(seconds >= 0, seconds, jnp.asarray(jnp.inf, seconds.dtype))

    def copy_of(slot: jax.Array, version: jax.Array) -> jax.Array:
        """Where the model that a slot downloaded is kept.

        In a ring the place of a version is taken by one at least `num_copies` newer, when it would be too old anyway.
        """
        return slot if num_copies == active else version % num_copies

    def init(params: Params, key: jax.Array) -> SimulationState:
        job_key, draw_key = jax.random.split(key)
        shared = local_update.share(params)
        one = local_update.init(params)
        come = jnp.zeros(total) if start_times is None else _check("start_times", start_times, total)
        client_id, start, idle = first_clients(jax.random.fold_in(draw_key, 0), come, active)
        num_jobs = jnp.zeros(total, jnp.int32)
        seconds = jax.vmap(lambda i: duration(job_key, i, jnp.int32(0)))(client_id)
        start = start.astype(seconds.dtype)
        server_state = server.init(shared)
        return SimulationState(
            server=server_state,
            clients=jax.tree.map(lambda x: jnp.array(jnp.broadcast_to(x, (total, *jnp.shape(x))), copy=True), one),
            queue=event_queue(jnp.where(start > 0, start, seconds)),
            client_id=client_id,
            version=jnp.zeros(active, jnp.int32),
            waiting=start > 0,
            downloaded=jax.tree.map(
                lambda x: jnp.array(jnp.broadcast_to(x, (num_copies, *x.shape)), copy=True), server_state.params
            ),
            idle=None if idle is None else idle._replace(since=idle.since.astype(seconds.dtype)),
            num_jobs=num_jobs,
            time=jnp.zeros((), seconds.dtype),
            event=jnp.zeros((), jnp.int32),
        )

    def train(
        state: SimulationState,
        slot: jax.Array,
        client: jax.Array,
        staleness: jax.Array,
        time: jax.Array,
        key: jax.Array,
    ) -> tuple[AsyncServerState, PyTree, PyTree, jax.Array, jax.Array]:
        """The client's work and what the server makes of it, with the client's next state."""
        place = copy_of(slot, state.version[slot])
        shared = jax.tree.map(lambda x: x[place], state.downloaded)
        cohort = take_clients(dataset, client[None], weighting=weighting if isinstance(weighting, str) else "uniform")
        before = jax.tree.map(lambda x: x[client], state.clients)
        data = jax.tree.map(lambda x: x[0], cohort.data)
        upload, after, info = local_update.update(shared, before, data, key)
        weight = cohort.weights[0] if weights is None else weights[client]
        upload = upload._replace(delta=dense(upload.delta))
        arrival = Arrival(upload, shared, staleness, weight, client, time, info)
        server_state, receipt = server.receive(state.server, arrival)
        after = jax.tree.map(lambda new, old: jnp.where(receipt.accepted, new, old), after, before)
        return server_state, after, info, receipt.accepted, receipt.coefficient

    def step(state: SimulationState, key: jax.Array) -> tuple[SimulationState, AsyncHistory]:
        job_key, draw_key = jax.random.split(key)
        slot, time = next_event(state.queue)
        happens = time < jnp.inf
        time = jnp.where(happens, time, state.time)
        client = state.client_id[slot]
        state = state._replace(server=server.advance(state.server, time))
        staleness = state.server.version - state.version[slot]
        ends = happens & ~state.waiting[slot]
        job = _job(job_key, client, state.num_jobs[client])
        lost = stale = jnp.zeros((), bool)
        if rates is not None:
            lost = ends & jax.random.bernoulli(job.loss, rates[client])
        if max_staleness is not None:
            stale = ends & ~lost & (staleness > max_staleness)
        arrives = ends & ~lost & ~stale

        def work() -> tuple[AsyncServerState, PyTree, PyTree, jax.Array, jax.Array]:
            return train(state, slot, client, staleness, time, job.training)

        def nothing() -> tuple[AsyncServerState, PyTree, PyTree, jax.Array, jax.Array]:
            before = jax.tree.map(lambda x: x[client], state.clients)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(work)[2:])
            return state.server, before, *zeros

        server_state, client_state, info, accepted, coefficient = jax.lax.cond(arrives, work, nothing)
        event = AsyncHistory(
            time=time,
            client_id=jnp.where(happens, client, ABSENT_ID),
            staleness=jnp.where(ends, staleness, 0),
            version=server_state.version,
            accepted=accepted,
            lost=lost,
            stale=stale,
            nonfinite=arrives & ~accepted,
            coefficient=coefficient,
            local=info,
        )
        state = state._replace(
            server=server_state,
            clients=jax.tree.map(lambda x, new: x.at[client].set(new), state.clients, client_state),
            num_jobs=state.num_jobs.at[client].add(ends.astype(jnp.int32)),
            time=time,
            event=state.event + 1,
        )
        return restart(state, slot, client, ends, happens, job_key, jax.random.fold_in(draw_key, state.event)), event

    def restart(
        state: SimulationState,
        slot: jax.Array,
        client: jax.Array,
        ends: jax.Array,
        happens: jax.Array,
        job_key: jax.Array,
        draw_key: jax.Array,
    ) -> SimulationState:
        """The slot downloads the newest model; a client that ended its job may give it to another one."""
        idle = state.idle
        if idle is not None:
            client, idle = change_client(idle, client, ends, state.time, draw_key)
        finish = state.time + duration(job_key, client, state.num_jobs[client])
        place = copy_of(slot, state.server.version)
        return state._replace(
            queue=reschedule(state.queue, slot, jnp.where(happens, finish, jnp.asarray(jnp.inf, finish.dtype))),
            client_id=state.client_id.at[slot].set(client),
            version=state.version.at[slot].set(state.server.version),
            waiting=state.waiting.at[slot].set(False),
            downloaded=jax.tree.map(lambda x, p: x.at[place].set(p), state.downloaded, state.server.params),
            idle=idle,
        )

    return Simulation(init, step)
