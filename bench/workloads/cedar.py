"""A whole Cedar round: local meta update, layer filter, representational screening.

MLP 784-128-64-64-64-10 (118 k parameters), 20 examples a client: one support batch and one query batch of 10, Adam 1e-3
for both; the filter judges the four blocks on 20 stimuli and leaves out one; the server screens on the same stimuli,
detection on. Inputs are noise: they cost what images cost. All clients have taken part before, so the filter
filters.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cedarjax as cj
from bench import floor
from bench.layouts import Layout, layouts
from bench.measure import Case, Workload
from bench.models import NETWORKS
from cedarjax import nn

NUM_EXAMPLES, NUM_STIMULI, BATCH_SIZE = 20, 20, 10
NETWORK = NETWORKS["deep"]
ROUND = "whole round"
STEPS, STEPS_MEAN, FILTER_MEAN, SCREENING = "local steps", "steps, mean", "steps, filter, mean", "steps, screening"
SCANNED, NUM_SCANNED = "ten rounds in a scan", 10


class Problem(NamedTuple):
    """The model and the data."""

    model: nn.Model
    """The MLP."""
    params: Any
    """Its initial parameters."""
    stimuli: jax.Array
    """`[S, 784]`, the filter's and the server's."""
    data: cj.ClientData
    """All clients' examples."""


@functools.lru_cache(maxsize=1)
def problem(num_clients: int, dtype: Any) -> Problem:
    """Noise of the right shapes, the same in every run."""
    rng = np.random.default_rng(0)
    rows = (num_clients, NUM_EXAMPLES)
    examples = {
        "x": jnp.asarray(rng.uniform(size=(*rows, *NETWORK.input_shape)), dtype),
        "y": jnp.asarray(rng.integers(0, NETWORK.layers[-1].num_out, size=rows), jnp.int32),
    }
    count = jnp.full(num_clients, NUM_EXAMPLES, jnp.int32)
    stimuli = jnp.asarray(rng.uniform(size=(NUM_STIMULI, *NETWORK.input_shape)), dtype)
    params = jax.tree.map(lambda x: x.astype(dtype), NETWORK.model.init(jax.random.key(0)))
    return Problem(NETWORK.model, params, stimuli, cj.ClientData(examples, count, count // 2))


def local_steps(case: Problem) -> cj.LocalUpdate:
    """One pair of Adam steps, without the filter."""
    loss_fn = nn.cross_entropy(case.model.apply)
    return cj.meta.cedar(loss_fn, optax.adam(1e-3), optax.adam(1e-3), batch_size=BATCH_SIZE)


def filtered_steps(case: Problem) -> cj.LocalUpdate:
    """The same with the filter."""
    return cj.layers.upload_filter(local_steps(case), case.model.features, case.stimuli, num_skipped=1)


def screening(case: Problem, layout: Layout) -> cj.Aggregator:
    """Similarity weights and detection."""
    return cj.robust.cedar(case.model.apply, case.stimuli, map_fn=layout.map_fn)


def cohort(case: Problem, local: cj.LocalUpdate) -> cj.Cohort:
    """All clients, none of them for the first time."""
    num_clients = case.data.num_examples.shape[0]
    state = local.init(case.params)
    if hasattr(state, "started"):
        state = state._replace(started=jnp.ones((), bool))
    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_clients, *x.shape)), state)
    weights = case.data.num_examples.astype(jnp.float32)
    return cj.Cohort(case.data, weights, jnp.arange(num_clients, dtype=jnp.int32), states)


def clients_only(local: cj.LocalUpdate, layout: Layout) -> Callable[..., Any]:
    """What the clients do, their uploads stacked; no server."""

    def step(state: cj.core.ServerState, cohort: cj.Cohort, key: jax.Array) -> Any:
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(cohort.client_id)
        return layout.map_fn(local.update, state.params, cohort.state, cohort.data, keys)

    return step


def scanned(algorithm: cj.FederatedAlgorithm) -> Callable[..., Any]:
    """Rounds as `run_rounds` does them, in one program: it allocates its buffers once for all of them."""

    def steps(state: cj.core.ServerState, cohort: cj.Cohort, key: jax.Array) -> Any:
        def step(carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], None]:
            state, clients = carry
            state, clients, _ = algorithm.step(state, cohort._replace(state=clients), key)
            return (state, clients), None

        return jax.lax.scan(step, (state, cohort.state), jax.random.split(key, NUM_SCANNED))[0]

    return steps


def client_work(part: str) -> int:
    """Operations of one client: two steps, its blocks on the stimuli for the filter, its outputs for screening."""
    work = 2 * floor.gradient(NETWORK.layers, BATCH_SIZE)
    if part in (ROUND, SCANNED, FILTER_MEAN):
        work += floor.forward(NETWORK.layers[:-1], NUM_STIMULI)
    if part in (ROUND, SCANNED, SCREENING):
        work += floor.forward(NETWORK.layers, NUM_STIMULI)
    return work


def one_case(part: str, layout: Layout, num_clients: int, dtype: Any) -> Case:
    """The program of one part in one layout."""
    case = problem(num_clients, dtype)
    local = filtered_steps(case) if part in (ROUND, SCANNED, FILTER_MEAN) else local_steps(case)
    rule = screening(case, layout) if part in (ROUND, SCANNED, SCREENING) else cj.robust.mean()
    algorithm = cj.federated_round(local, optax.chain(rule, optax.sgd(1.0)), layout.map_fn)
    fun = {STEPS: clients_only(local, layout), SCANNED: scanned(algorithm)}.get(part, algorithm.step)
    state = layout.place(algorithm.init(case.params))
    args = (state, layout.place(cohort(case, local), num_clients), jax.random.key(1))
    rounds = NUM_SCANNED if part == SCANNED else 1
    work = floor.Work(rounds * num_clients * client_work(part), rounds * case.data.examples["x"].nbytes)
    return Case(layout.name, part, fun, args, rounds * num_clients, work, layout.num_devices)


def found_layouts(num_clients: int) -> list[Layout]:
    """All layouts of a round whose rule needs every update."""
    return layouts(num_clients, chunk_sizes=(1, 4, 10, None), streamed=(False,), representations=("dense",))


def by_layout(num_clients: int, dtype: Any) -> list[Case]:
    """The whole round in every layout."""
    return [one_case(ROUND, layout, num_clients, dtype) for layout in found_layouts(num_clients)]


def by_part(num_clients: int, dtype: Any, name: str) -> list[Case]:
    """The round built up, in the layout of that name."""
    layout = {layout.name: layout for layout in found_layouts(num_clients)}[name]
    parts = (STEPS, STEPS_MEAN, FILTER_MEAN, SCREENING, ROUND, SCANNED)
    return [one_case(part, layout, num_clients, dtype) for part in parts]


WORKLOAD = Workload(
    title="cedar: MLP 784-128-64-64-64-10, 20 examples a client, 20 stimuli, filter and screening on",
    unit="client",
    num_clients=(100,),
    layouts=by_layout,
    parts=by_part,
    goal_ms=0.6,
)
