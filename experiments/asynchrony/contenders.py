"""Servers that wait, servers that do not, and edges in between, with the same clients and equally many jobs."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import cedarjax as cj
from cedarjax.core import AsyncServer
from cedarjax.core.rounds import client_keys
from experiments.asynchrony.problem import Fleet, Problem
from experiments.seeds import side_by_side

NUM_BINS = 32
"""Bins of the histogram of staleness; the last one holds what is above."""
NUM_EDGES, PERIOD = 4, 2
"""Edges of the hierarchy, and its rounds from one synchronisation to the next."""


class Told(NamedTuple):
    """What one seed tells."""

    time: jax.Array
    """`[P]` simulated seconds at each test."""
    accuracy: jax.Array
    """`[P]` of the model that the server had then."""
    staleness: jax.Array
    """`[NUM_BINS]` int32, how many uploads had which staleness."""
    messages: jax.Array
    """`[2]` int32: models sent between devices and what they talk to, and between edges and the cloud."""


class Contender(NamedTuple):
    """One row of the table."""

    label: str
    """Name in tables and figures."""
    run: Callable[[Problem, Fleet], Told]
    """One seed."""


def fedavg() -> optax.GradientTransformation:
    """Weighted mean."""
    return optax.chain(cj.robust.mean(), optax.sgd(1.0))


def _seconds(p: Problem, fleet: Fleet, cohort: cj.Cohort, round_number: jax.Array, key: jax.Array) -> jax.Array:
    """`[C]`, how long each client of a round takes."""
    keys = client_keys(key, cohort.client_id)
    count = jnp.broadcast_to(round_number, cohort.client_id.shape)
    return jax.vmap(p.durations(fleet))(keys, cohort.client_id, count)


def rounds(
    p: Problem,
    fleet: Fleet,
    algorithm: cj.FederatedAlgorithm,
    seconds_fn: Callable[[jax.Array, cj.Cohort, jax.Array], tuple[jax.Array, jax.Array]],
) -> tuple[Any, jax.Array, jax.Array]:
    """Rounds on a clock.

    Args:
      p: what is given.
      fleet: one seed.
      algorithm: what a round does.
      seconds_fn: `(seconds [C], cohort, round) -> (seconds of the round, weights [C])`.

    Returns:
      The last server's state, and `[P]` times and accuracies.
    """

    def one_round(carry: Any, _: None) -> tuple[Any, None]:
        server, now = carry
        sample_key, time_key, step_key = jax.random.split(jax.random.fold_in(fleet.key, server.round), 3)
        cohort = cj.core.sample_cohort(sample_key, fleet.train, p.num_active)
        took, weights = seconds_fn(_seconds(p, fleet, cohort, server.round, time_key), cohort, server.round)
        server, _, _ = algorithm.step(server, cohort._replace(weights=weights), step_key)
        return (server, now + took), None

    def one_part(carry: Any, _: None) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        carry, _ = jax.lax.scan(one_round, carry, None, length=p.jobs_a_part // p.num_active)
        return carry, (carry[1], p.accuracy(fleet, carry[0].params))

    start = algorithm.init(fleet.params), jnp.float32(0)
    (server, _), (times, scores) = jax.lax.scan(one_part, start, None, length=p.num_parts)
    return server, times, scores


def _fresh(p: Problem) -> jax.Array:
    return jnp.zeros(NUM_BINS, jnp.int32).at[0].set(p.num_parts * p.jobs_a_part)


def synchronous(patience: float | None) -> Callable[[Problem, Fleet], Told]:
    """A server that waits.

    Args:
      patience: share of a round's clients that it waits for; None for all. Who is later has worked in vain.
    """

    def run(p: Problem, fleet: Fleet) -> Told:
        algorithm = cj.federated_round(p.local, fedavg(), cj.cohort_map(side_by_side()))

        def wait(seconds: jax.Array, cohort: cj.Cohort, _: jax.Array) -> tuple[jax.Array, jax.Array]:
            last = math.ceil((1 if patience is None else patience) * p.num_active) - 1
            found = cj.core.synchronous_time(seconds[None], cohort.weights[None], deadline=jnp.sort(seconds)[last])
            return found.seconds[0], jnp.where(found.in_time[0], cohort.weights, 0)

        _, times, scores = rounds(p, fleet, algorithm, wait)
        sent = 2 * p.num_parts * p.jobs_a_part
        return Told(times, scores, _fresh(p), jnp.array([sent, 0], jnp.int32))

    return run


def hierarchical(p: Problem, fleet: Fleet) -> Told:
    """Edges wait for their own clients, and for each other only when they meet in the cloud."""
    edge_of = jnp.arange(fleet.train.num_clients, dtype=jnp.int32) % NUM_EDGES
    algorithm = cj.server.hierarchical_round(
        p.local,
        fedavg(),
        fedavg(),
        edge_of,
        num_edges=NUM_EDGES,
        period=PERIOD,
        map_fn=cj.cohort_map(side_by_side()),
    )

    def one_round(carry: Any, _: None) -> tuple[Any, jax.Array]:
        server, clocks = carry
        sample_key, time_key, step_key = jax.random.split(jax.random.fold_in(fleet.key, server.round), 3)
        cohort = cj.core.sample_cohort(sample_key, fleet.train, p.num_active)
        seconds = _seconds(p, fleet, cohort, server.round, time_key)
        mine = edge_of[cohort.client_id][None, :] == jnp.arange(NUM_EDGES, dtype=jnp.int32)[:, None]
        clocks = clocks + jnp.max(jnp.where(mine, seconds[None, :], 0), axis=1)
        server, _, info = algorithm.step(server, cohort, step_key)
        clocks = jnp.where(info.is_synced, clocks.max(), clocks)
        sent = info.messages
        return (server, clocks), jnp.stack([sent.device_up + sent.device_down, sent.edge_up + sent.edge_down])

    def one_part(carry: Any, _: None) -> tuple[Any, tuple[jax.Array, jax.Array, jax.Array]]:
        carry, sent = jax.lax.scan(one_round, carry, None, length=p.jobs_a_part // p.num_active)
        return carry, (carry[1].max(), p.accuracy(fleet, carry[0].params), sent.sum(axis=0))

    start = algorithm.init(fleet.params), jnp.zeros(NUM_EDGES)
    _, (times, scores, sent) = jax.lax.scan(one_part, start, None, length=p.num_parts)
    return Told(times, scores, _fresh(p), sent.sum(axis=0))


def asynchronous(make: Callable[[Problem], AsyncServer]) -> Callable[[Problem, Fleet], Told]:
    """A server that takes every upload when it comes."""

    def run(p: Problem, fleet: Fleet) -> Told:
        simulation = cj.core.simulation(
            make(p), p.local, fleet.train, durations=p.durations(fleet), num_active=p.num_active
        )
        state = simulation.init(fleet.params, fleet.key)
        events = p.num_parts * p.jobs_a_part
        _, history, scores = cj.core.simulate(
            simulation,
            state,
            fleet.key,
            num_events=events,
            eval_fn=lambda params, key: p.accuracy(fleet, params),
            eval_every=p.jobs_a_part,
        )
        times = history.time[p.jobs_a_part - 1 :: p.jobs_a_part]
        staleness = cj.core.staleness_histogram(history, NUM_BINS - 1)
        return Told(times, scores, staleness, jnp.array([2 * events, 0], jnp.int32))

    return run


CONTENDERS: dict[str, Contender] = {
    "sync": Contender("FedAvg, waits for all", synchronous(None)),
    "deadline": Contender("FedAvg, waits for 70 %", synchronous(0.7)),
    "hierarchical": Contender("HierFAVG", hierarchical),
    "fedasync": Contender("FedAsync", asynchronous(lambda p: cj.server.fedasync(0.3, cj.server.polynomial(0.5)))),
    "fedasync_constant": Contender(
        "FedAsync, no discount", asynchronous(lambda p: cj.server.fedasync(0.3, cj.server.constant()))
    ),
    "fedbuff": Contender(
        "FedBuff", asynchronous(lambda p: cj.server.fedbuff(max(1, p.num_active // 2), optax.sgd(1.0)))
    ),
}
