"""Events of an asynchronous federation, one after another, as one `lax.scan`.

What an event is, `core.simulation` says; here is what it needs, what it tells, and the run over many of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core.asynchrony import AsyncServerState
from cedarjax.core.fleet import EventQueue, IdleClients
from cedarjax.core.segments import check_segments, scan_segments
from cedarjax.core.types import Params, PyTree, Shared


class SimulationState(NamedTuple):
    """All that a simulation needs to go on; save it and it resumes bit for bit."""

    server: AsyncServerState
    """The server's state; `server.params` is the newest model."""
    clients: PyTree
    """States of all clients, leaves `[N, ...]`."""
    queue: EventQueue
    """When each slot is done."""
    client_id: jax.Array
    """`[A]` int32, who works in each slot."""
    version: jax.Array
    """`[A]` int32, the version that it downloaded."""
    waiting: jax.Array
    """`[A]` bool, slots whose client has not come yet; its event is a download."""
    downloaded: Shared
    """Leaves `[min(A, max_staleness + 1), ...]`: the models that clients work on."""
    idle: IdleClients | None
    """Clients without a slot; None if there are none."""
    num_jobs: jax.Array
    """`[N]` int32, jobs that each client has done."""
    time: jax.Array
    """Float scalar, simulated seconds since the start."""
    event: jax.Array
    """int32 scalar, events so far."""


class AsyncHistory(NamedTuple):
    """What happened at each event, leaves `[E, ...]`.

    Of the four flags exactly one is True for the end of a job; none for the first download of a client that comes late,
    and none where nothing is left to happen (its id is out of range then).
    """

    time: jax.Array
    """`[E]` seconds since the start."""
    client_id: jax.Array
    """`[E]` int32, whose job ended."""
    staleness: jax.Array
    """`[E]` int32, models that the server made since the client's download."""
    version: jax.Array
    """`[E]` int32, the server's version after the event."""
    accepted: jax.Array
    """`[E]` bool, the server took the upload."""
    lost: jax.Array
    """`[E]` bool, the upload never arrived."""
    stale: jax.Array
    """`[E]` bool, dropped because its staleness exceeds `max_staleness`."""
    nonfinite: jax.Array
    """`[E]` bool, refused because it is not finite or has no weight."""
    coefficient: jax.Array
    """`[E]` float32, how much the server's rule let it count."""
    local: PyTree
    """The local update's info, leaves `[E, ...]`; zeros where nobody was trained: `lost`, `stale`, no job."""


class Simulation(NamedTuple):
    """An asynchronous federation as pure functions: jit it, donate its state, scan it, vmap it over seeds."""

    init: Callable[[Params, jax.Array], SimulationState]
    """`init(params, key) -> state` at time 0, with the key of the whole run."""
    step: Callable[[SimulationState, jax.Array], tuple[SimulationState, AsyncHistory]]
    """`step(state, key) -> (state, event)`: the next event, with the same key each time."""


def simulate(
    fleet: Simulation,
    state: SimulationState,
    key: jax.Array,
    *,
    num_events: int,
    eval_fn: Callable[[Params, jax.Array], PyTree] | None = None,
    eval_every: int = 1,
) -> tuple[SimulationState, AsyncHistory, PyTree]:
    """Runs `num_events` events on the device.

    Two calls of 50 events are one call of 100, bit for bit. The function is pure: jit it once, donate `state`, vmap it
    over `key` and states, or over hyper-parameters that the federation closes over.

    Args:
      fleet: from `simulation`.
      state: from `fleet.init` with the same key, or from an earlier call.
      key: PRNG key of the whole run.
      num_events: static number of events.
      eval_fn: `(params, key) -> metrics`, called after every `eval_every` events with a key that is the same each time.
      eval_every: events between evaluations; must divide `num_events`. Evaluation `k` is at the time
        `history.time[(k + 1) * eval_every - 1]`.

    Returns:
      The next state, the history `[E, ...]`, and the metrics `[E // eval_every, ...]` (`None` without `eval_fn`).

    Raises:
      ValueError: if `num_events` is negative or `eval_every` does not divide it.
    """
    check_segments("num_events", num_events, eval_every, has_eval=eval_fn is not None)
    return scan_segments(lambda state: fleet.step(state, key), state, key, num_events, eval_fn, eval_every)


def staleness_histogram(history: AsyncHistory, max_staleness: int) -> jax.Array:
    """How many accepted uploads had which staleness.

    Args:
      history: leaves `[E, ...]`.
      max_staleness: staleness of the last bin, which also counts what is above.

    Returns:
      `[max_staleness + 1]` int32.

    Raises:
      ValueError: if `max_staleness` is negative.
    """
    if max_staleness < 0:
        raise ValueError(f"max_staleness must be at least 0, got {max_staleness}.")
    bins = jnp.zeros(max_staleness + 1, jnp.int32)
    return bins.at[jnp.minimum(history.staleness, max_staleness)].add(history.accepted.astype(jnp.int32))
