"""FedAvg and MAML rounds on a model, in every layout: what several workloads have in common.

Each client has 20 examples: two batches of 10 for FedAvg, which takes one step of SGD on each; ten support and ten
query examples for MAML, with one inner step. The round is whole: the clients' keys, their shuffled batches, their mean,
the server's step. Inputs are noise, which costs what images cost.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cedarjax as cj
from bench import floor
from bench.layouts import Layout, layouts
from bench.measure import Case, PeerTask, Workload
from bench.models import NETWORKS, Network
from cedarjax import nn
from cedarjax.core.rounds import client_keys

Kind = Literal["fedavg", "maml"]
LEARNING_RATE, BATCH_SIZE, NUM_BATCHES = 0.05, 10, 2
NUM_EXAMPLES = BATCH_SIZE * NUM_BATCHES


class Problem(NamedTuple):
    """The model's start and the clients of one round."""

    params: Any
    """Initial parameters."""
    cohort: cj.Cohort
    """All clients, of equal weight."""
    key: jax.Array
    """Key of the round."""


@functools.lru_cache(maxsize=1)  # of all sizes and workloads only the one at hand stays in memory
def problem(name: str, num_clients: int, dtype: Any) -> Problem:
    """Parameters and noise of the right shapes, the same in every run."""
    network = NETWORKS[name]
    rng = np.random.default_rng(0)
    rows = (num_clients, NUM_EXAMPLES)
    examples = {
        "x": jnp.asarray(rng.random((*rows, *network.input_shape), np.float32), dtype),
        "y": jnp.asarray(rng.integers(0, network.layers[-1].num_out, size=rows, dtype=np.int32)),
    }
    count = jnp.full(num_clients, NUM_EXAMPLES, jnp.int32)
    ids = jnp.arange(num_clients, dtype=jnp.int32)
    cohort = cj.Cohort(cj.ClientData(examples, count, count // NUM_BATCHES), jnp.ones(num_clients), ids)
    params = jax.tree.map(lambda x: x.astype(dtype), network.model.init(jax.random.key(0)))
    return Problem(params, cohort, jax.random.key(1))


def local_update(kind: Kind, network: Network, representation: cj.core.Representation = "dense") -> cj.LocalUpdate:
    """One client's work."""
    loss_fn = nn.cross_entropy(network.model.apply)
    inner_tx = optax.sgd(LEARNING_RATE)
    if kind == "fedavg":
        return cj.local.sgd(loss_fn, inner_tx, batch_size=BATCH_SIZE, representation=representation)
    return cj.meta.maml(
        loss_fn,
        inner_tx,
        1,
        remat=False,  # one inner step keeps little that could be recomputed
        batch_size=BATCH_SIZE,
        query_batch_size=BATCH_SIZE,
        representation=representation,
    )


def client_work(kind: Kind, network: Network) -> int:
    """Operations of one client in a round."""
    if kind == "fedavg":
        return NUM_BATCHES * floor.gradient(network.layers, BATCH_SIZE)
    return floor.meta_gradient(network.layers, BATCH_SIZE, BATCH_SIZE)


def round_work(kind: Kind, network: Network, num_clients: int, dtype: Any) -> floor.Work:
    """The least work of a round: all examples are read once, the parameters once, and written once."""
    size = jnp.dtype(dtype).itemsize
    example = size * int(np.prod(network.input_shape)) + jnp.dtype(jnp.int32).itemsize
    num_bytes = num_clients * NUM_EXAMPLES * example + 2 * size * network.num_params
    return floor.Work(num_clients * client_work(kind, network), num_bytes)


def one_case(kind: Kind, name: str, layout: Layout, num_clients: int, dtype: Any) -> Case:
    """The round in one layout."""
    case, network = problem(name, num_clients, dtype), NETWORKS[name]
    algorithm = layout.mean_round(local_update(kind, network, layout.representation))
    args = (layout.place(algorithm.init(case.params)), layout.place(case.cohort, num_clients), case.key)
    units = num_clients * (NUM_BATCHES if kind == "fedavg" else 1)
    work = round_work(kind, network, num_clients, dtype)
    return Case(layout.name, "round", algorithm.step, args, units, work, layout.num_devices)


def batches_read(case: Problem) -> np.ndarray:
    """Rows `[C, T, B]` of its examples that each client takes, step by step, as `local.sgd` itself takes them.

    A loss that is linear in one number a row writes down where in the stream the row was read: its gradient there is
    minus the position. Another number counts the steps.
    """

    def written_loss(params: Any, batch: jax.Array, key: jax.Array) -> jax.Array:
        del key
        start = jax.lax.stop_gradient(params["step"]) * BATCH_SIZE
        position = start + jnp.arange(BATCH_SIZE, dtype=jnp.float32)
        return -params["step"] - jnp.dot(params["position"][batch], position)

    local = cj.local.sgd(written_loss, optax.sgd(1.0), batch_size=BATCH_SIZE)
    rows = jnp.broadcast_to(jnp.arange(NUM_EXAMPLES, dtype=jnp.int32), (len(case.cohort.weights), NUM_EXAMPLES))
    blank = {"position": jnp.zeros(NUM_EXAMPLES, jnp.float32), "step": jnp.zeros((), jnp.float32)}
    keys = client_keys(jax.random.split(case.key)[0], case.cohort.client_id)  # as `federated_round` makes them
    upload, _, _ = jax.jit(cj.cohort_map(), static_argnums=0)(
        local.update, blank, (), case.cohort.data._replace(examples=rows), keys
    )
    return np.argsort(-np.asarray(upload.delta["position"])).reshape(-1, NUM_BATCHES, BATCH_SIZE)


def peer_task(kind: Kind, name: str, num_clients: int) -> Any:
    """The round for peers: plain arrays, batch by batch."""
    from bench import peers  # what peers need is not needed without them

    case = problem(name, num_clients, jnp.float32)
    rows = np.arange(NUM_EXAMPLES).reshape(1, NUM_BATCHES, BATCH_SIZE)  # support, then query
    rows = batches_read(case) if kind == "fedavg" else np.repeat(rows, num_clients, axis=0)
    x, y = (np.asarray(case.cohort.data.examples[field]) for field in ("x", "y"))
    client = np.arange(num_clients)[:, None, None]
    return peers.Task(
        kind=kind,
        model=name,
        params=NETWORKS[name].flat(case.params),
        x=x[client, rows],
        y=y[client, rows],
        learning_rate=LEARNING_RATE,
    )


def answer(kind: Kind, name: str, num_clients: int, output: Any) -> dict[str, np.ndarray]:
    """What a peer finds if it does the same: parameters after a round of FedAvg, the mean meta-gradient of MAML."""
    network = NETWORKS[name]
    after = network.flat(output[0].params)
    if kind == "fedavg":
        return after
    before = network.flat(problem(name, num_clients, jnp.float32).params)
    return {leaf: before[leaf] - after[leaf] for leaf in after}


def workload(
    kind: Kind,
    name: str,
    *,
    num_clients: tuple[int, ...],
    layouts: Callable[[int], Sequence[Layout]] = layouts,
    has_peers: bool = True,
) -> Workload:
    """Rounds on one model.

    Args:
      kind: what a client does.
      name: of the model, in `NETWORKS`.
      num_clients: sizes of the cohort.
      layouts: `layouts(num_clients)`, the ones to measure.
      has_peers: whether others have this model.

    Returns:
      The workload.
    """
    network = NETWORKS[name]
    what = {"fedavg": "FedAvg, 2 steps a client", "maml": "MAML, second order, 1 inner step"}[kind]
    task = PeerTask(functools.partial(peer_task, kind, name), functools.partial(answer, kind, name))
    return Workload(
        title=f"{what}, batches of {BATCH_SIZE}: {network.title} ({network.num_params:,} parameters)",
        unit="client-step",
        num_clients=num_clients,
        layouts=lambda count, dtype: [one_case(kind, name, layout, count, dtype) for layout in layouts(count)],
        peers=task if has_peers else None,
    )
