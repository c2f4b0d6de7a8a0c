"""Aggregation rules alone, on noise in place of the clients' updates of an MLP (117,706 parameters)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import cedarjax as cj
from bench import floor
from bench.layouts import Layout, meshes
from bench.measure import Case, Workload
from bench.models import NETWORKS

NETWORK, NUM_STIMULI = NETWORKS["deep"], 20


def cedar(layout: Layout, stimuli: jax.Array) -> cj.Aggregator:
    """Screening by similarity weights and detection."""
    return cj.robust.cedar(NETWORK.model.apply, stimuli, map_fn=layout.map_fn)


class Rule(NamedTuple):
    """A rule and what it takes."""

    make: Callable[[Layout, jax.Array], cj.Aggregator]
    """`make(layout, stimuli)`."""
    for_client: float
    """Operations for one client."""
    for_pair: float = 0
    """Operations for one pair of clients."""


RULES = {
    "mean": Rule(lambda layout, stimuli: cj.robust.mean(), 2 * NETWORK.num_params),
    "cedar": Rule(cedar, 2 * NETWORK.num_params + floor.forward(NETWORK.layers, NUM_STIMULI)),
}


def one_case(name: str, layout: Layout, num_clients: int, dtype: Any) -> Case:
    """A rule in one layout."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x.astype(dtype), NETWORK.model.init(jax.random.key(0)))
    updates = jax.tree.map(
        lambda x: jnp.asarray(1e-3 * rng.standard_normal((num_clients, *x.shape), np.float32), dtype), params
    )
    stimuli = jnp.asarray(rng.random((NUM_STIMULI, *NETWORK.input_shape), np.float32), dtype)
    cost = RULES[name]
    rule = cost.make(layout, stimuli)

    def fun(updates: Any, params: Any, weights: jax.Array, key: jax.Array) -> Any:
        return rule.update(updates, rule.init(params), params, weights=weights, key=key)

    size = jnp.dtype(dtype).itemsize * NETWORK.num_params
    work = floor.Work(num_clients * cost.for_client + num_clients**2 * cost.for_pair, (num_clients + 1) * size)
    updates, weights = layout.place((updates, jnp.ones(num_clients, jnp.float32)), num_clients)
    args = (updates, layout.place(params), weights, jax.random.key(0))
    return Case(layout.where, name, fun, args, num_clients, work, layout.num_devices)


def cases(num_clients: int, dtype: Any) -> Sequence[Case]:
    """Every rule, where the updates lie on one device and where they lie on all."""
    chunk_size = 1 if jax.default_backend() == "cpu" else None  # of a rule that runs the clients' models
    found = [Layout(chunk_size, mesh) for mesh in meshes()]
    return [one_case(name, layout, num_clients, dtype) for name in RULES for layout in found]


WORKLOAD = Workload(
    title=f"robust: aggregation rules on [C, {NETWORK.num_params:,}] updates",
    unit="client",
    num_clients=(100,),
    layouts=cases,
)
