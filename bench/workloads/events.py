"""An asynchronous federation of many clients with a small model: FedAsync and FedBuff, every event one upload."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cedarjax as cj
from bench.floor import Work
from bench.measure import Case, Workload

NUM_EVENTS = 10_000
NUM_FEATURES, ROWS = 10, 4


def loss_fn(params: Any, batch: Any, key: jax.Array) -> jax.Array:
    """Squared error of a line."""
    return 0.5 * jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)


def layouts(num_clients: int, dtype: Any) -> Sequence[Case]:
    """All clients work at once, each with the model that it downloaded."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_clients * ROWS, NUM_FEATURES)).astype(np.float32)
    owner = np.repeat(np.arange(num_clients), ROWS)
    dataset = cj.data.federated_dataset({"x": x, "y": x.sum(axis=1)}, owner)
    dataset = jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, dataset)
    params = {"w": jnp.zeros(NUM_FEATURES, dtype), "b": jnp.zeros((), dtype)}
    local = cj.local.sgd(loss_fn, optax.sgd(0.05), batch_size=ROWS)
    mean_seconds = jnp.asarray(rng.lognormal(size=num_clients), jnp.float32)
    key = jax.random.key(0)
    servers = {
        "FedAsync": cj.server.fedasync(0.5, cj.server.polynomial(0.5)),
        "FedBuff": cj.server.fedbuff(10, optax.sgd(1.0)),
    }

    size = NUM_FEATURES + 1
    # Forwards and backwards over a client's rows, read once; the model read and written.
    work = Work(NUM_EVENTS * 4.0 * ROWS * size, NUM_EVENTS * (ROWS + 2.0) * size * jnp.dtype(dtype).itemsize)

    def case(name: str) -> Case:
        def run(params: Any, dataset: Any, mean_seconds: jax.Array) -> Any:
            fleet = cj.simulation(servers[name], local, dataset, durations=cj.core.exponential_durations(mean_seconds))
            state, history, _ = cj.simulate(fleet, fleet.init(params, key), key, num_events=NUM_EVENTS)
            return state.server.params, history.staleness

        return Case("one scan", name, run, (params, dataset, mean_seconds), NUM_EVENTS, work)

    return [case(name) for name in servers]


WORKLOAD = Workload(
    title=f"Asynchronous simulation: {NUM_EVENTS:,} events, all clients at work, a model of {NUM_FEATURES + 1} numbers",
    unit="event",
    num_clients=(1_000, 100_000),
    layouts=layouts,
)
