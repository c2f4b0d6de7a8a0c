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
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import cedarjax as cj
from bench.measure import Case, Workload
from cedarjax import nn

NUM_EXAMPLES, NUM_STIMULI, NUM_FEATURES, NUM_CLASSES = 20, 20, 784, 10
ROUND = "whole round"
STEPS, STEPS_MEAN, FILTER_MEAN, SCREENING = "local steps", "steps, mean", "steps, filter, mean", "steps, screening"
SCANNED, NUM_SCANNED = "ten rounds in a scan", 10


class Layout(NamedTuple):
    """How the clients lie on the hardware."""

    chunk_size: int | None
    """As in `cohort_map`."""
    mesh: Mesh | None
    """As in `cohort_map`."""

    @property
    def name(self) -> str:
        """For the tables."""
        chunk = {None: "vmap", 1: "loop"}.get(self.chunk_size, f"chunks of {self.chunk_size}")
        return chunk if self.mesh is None else f"mesh of {self.mesh.size}, {chunk}"

    @property
    def map_fn(self) -> cj.core.MapFn:
        """The layout itself."""
        return cj.cohort_map(self.chunk_size, self.mesh)

    def place(self, tree: Any, num_clients: int | None = None) -> Any:
        """Puts arrays where the round leaves them: a client axis over the mesh, if it divides, all else everywhere."""
        if self.mesh is None:
            return tree
        divides = num_clients is not None and num_clients % self.mesh.size == 0
        return jax.device_put(tree, NamedSharding(self.mesh, P("clients") if divides else P()))


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


@functools.cache
def problem(num_clients: int) -> Problem:
    """Noise of the right shapes, the same in every run."""
    model = nn.functional(lambda rngs: nn.MLP(NUM_FEATURES, (128, 64, 64, 64), NUM_CLASSES, rngs=rngs))
    rng = np.random.default_rng(0)
    rows = (num_clients, NUM_EXAMPLES)
    examples = {
        "x": jnp.asarray(rng.uniform(size=(*rows, NUM_FEATURES)), jnp.float32),
        "y": jnp.asarray(rng.integers(0, NUM_CLASSES, size=rows), jnp.int32),
    }
    count = jnp.full(num_clients, NUM_EXAMPLES, jnp.int32)
    stimuli = jnp.asarray(rng.uniform(size=(NUM_STIMULI, NUM_FEATURES)), jnp.float32)
    return Problem(model, model.init(jax.random.key(0)), stimuli, cj.ClientData(examples, count, count // 2))


def layouts() -> list[Layout]:
    """One device, and one device a core."""
    found = [Layout(chunk_size, None) for chunk_size in (1, 4, 10, None)]
    if len(jax.devices()) > 1:
        mesh = jax.make_mesh((len(jax.devices()),), ("clients",), axis_types=(AxisType.Auto,))
        found += [Layout(chunk_size, mesh) for chunk_size in (1, 5, 10)]
    return found


def local_steps(case: Problem) -> cj.LocalUpdate:
    """One pair of Adam steps, without the filter."""
    loss_fn = nn.cross_entropy(case.model.apply)
    return cj.meta.cedar(loss_fn, optax.adam(1e-3), optax.adam(1e-3), batch_size=10)


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


def one_case(part: str, layout: Layout, num_clients: int) -> Case:
    """The program of one part in one layout."""
    case = problem(num_clients)
    local = filtered_steps(case) if part in (ROUND, SCANNED, FILTER_MEAN) else local_steps(case)
    rule = screening(case, layout) if part in (ROUND, SCANNED, SCREENING) else cj.robust.mean()
    algorithm = cj.federated_round(local, optax.chain(rule, optax.sgd(1.0)), layout.map_fn)
    fun = {STEPS: clients_only(local, layout), SCANNED: scanned(algorithm)}.get(part, algorithm.step)
    state = layout.place(algorithm.init(case.params))
    args = (state, layout.place(cohort(case, local), num_clients), jax.random.key(1))
    return Case(layout.name, part, fun, args, num_clients * (NUM_SCANNED if part == SCANNED else 1))


def by_layout(num_clients: int) -> list[Case]:
    """The whole round in every layout."""
    return [one_case(ROUND, layout, num_clients) for layout in layouts()]


def by_part(num_clients: int, name: str) -> list[Case]:
    """The round built up, in the layout of that name."""
    layout = {layout.name: layout for layout in layouts()}[name]
    return [one_case(part, layout, num_clients) for part in (STEPS, STEPS_MEAN, FILTER_MEAN, SCREENING, ROUND, SCANNED)]


WORKLOAD = Workload(
    title="cedar: MLP 784-128-64-64-64-10, 20 examples a client, 20 stimuli, filter and screening on",
    unit="client",
    num_clients=(100,),
    layouts=by_layout,
    parts=by_part,
    goal_ms=0.6,
)
