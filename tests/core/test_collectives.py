"""What devices say to each other in a compiled round, read from the program: a fact, whatever the machine."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cedarjax as cj
from cedarjax import nn

NUM_CLIENTS = 8
MODEL = nn.functional(lambda rngs: nn.MLP(40, (32,), 10, rngs=rngs))
PARAMS = MODEL.init(jax.random.key(0))
SIZE = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
OPERATION = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def collectives(fun, *args):
    """Pairs of an operation and the number of elements that it returns, largest first."""
    program = jax.jit(fun).lower(*args).compile().as_text()
    found = []
    for shapes, name in OPERATION.findall(program):
        sizes = [math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]
        found.append((name, sum(sizes)))
    return sorted(found, key=lambda pair: -pair[1])


def problem(mesh, num_clients=NUM_CLIENTS):
    rng = np.random.default_rng(0)
    rows = jnp.full(num_clients, 4, jnp.int32)
    x = jnp.asarray(rng.normal(size=(num_clients, 4, 40)), jnp.float32)
    data = cj.ClientData({"x": x, "y": jnp.zeros((num_clients, 4), jnp.int32)}, rows, rows // 2)
    cohort = cj.Cohort(data, jnp.arange(1.0, num_clients + 1), jnp.arange(num_clients))
    everywhere = NamedSharding(mesh, P())
    return (
        jax.device_put(PARAMS, everywhere),
        jax.device_put(cohort, NamedSharding(mesh, P(mesh.axis_names))),
        jax.device_put(jax.random.key(0), everywhere),
    )


@pytest.mark.parametrize("representation", ["dense", "lowrank"])
@pytest.mark.parametrize("layout", ["vmap", "loop", "streamed"])
def test_a_linear_rule_is_one_all_reduce_of_the_parameters(layout, representation, mesh):
    params, cohort, key = problem(mesh)
    loss_fn = nn.cross_entropy(MODEL.apply)
    local = cj.local.sgd(loss_fn, optax.sgd(0.1), batch_size=2, representation=representation)
    if layout == "streamed":
        algorithm = cj.streamed_round(local, optax.sgd(1.0), chunk_size=2, mesh=mesh)
    else:
        map_fn = cj.cohort_map(1 if layout == "loop" else None, mesh)
        algorithm = cj.federated_round(local, optax.chain(cj.robust.mean(), optax.sgd(1.0)), map_fn)
    state = jax.device_put(algorithm.init(params), NamedSharding(mesh, P()))
    (first, size), *others = collectives(algorithm.step, state, cohort, key)
    num_masses = len(jax.tree.leaves(PARAMS))
    assert first == "all-reduce" and SIZE <= size <= SIZE + num_masses
    assert {name for name, _ in others} <= {"all-reduce"} and sum(size for _, size in others) <= num_masses + 1


@pytest.fixture(params=["one axis", "two axes"])
def any_mesh(request):
    """Four devices in a row, or two by two; all axes carry clients."""
    shape, names = ((4,), ("clients",)) if request.param == "one axis" else ((2, 2), ("hosts", "devices"))
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def random_updates(num_clients, low_rank):
    rng = np.random.default_rng(1)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=(num_clients, *shape)), jnp.float32)

    kernel = cj.core.LowRank.of((draw(2, 41), draw(2, 30))) if low_rank else draw(41, 30)
    return {"kernel": kernel, "bias": draw(7)}


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("num_clients", [8, 6])
def test_reductions_on_a_mesh_are_those_on_one_device(num_clients, low_rank, any_mesh):
    """Six clients do not divide over four devices: the compiler's own way, the same numbers."""
    updates = random_updates(num_clients, low_rank)
    coefficients = jnp.linspace(-1.0, 1.0, num_clients)
    want = cj.gram(cj.dense(updates)), cj.weighted_sum(coefficients, cj.dense(updates))
    placed = updates
    if num_clients % 4 == 0:
        placed = jax.device_put(updates, NamedSharding(any_mesh, P(any_mesh.axis_names)))

    def both(updates):
        return cj.gram(updates, mesh=any_mesh), cj.weighted_sum(coefficients, updates, mesh=any_mesh)

    for run in (jax.jit(both), both):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4), run(placed), want)


@pytest.mark.parametrize("low_rank", [False, True])
def test_inner_products_gather_nothing_of_all_clients_and_all_parameters(low_rank, any_mesh):
    updates = random_updates(NUM_CLIENTS, low_rank)
    placed = jax.device_put(updates, NamedSharding(any_mesh, P(any_mesh.axis_names)))
    found = collectives(lambda updates: cj.gram(updates, mesh=any_mesh), placed)
    share = -(-41 // 4) * (2 if low_rank else 30) * NUM_CLIENTS  # a quarter of the kernel's numbers, of all clients
    reduced = [size for name, size in found if name == "all-reduce"]
    assert reduced == [NUM_CLIENTS**2]
    for name, size in found:
        assert name != "all-gather" or (low_rank and size <= NUM_CLIENTS * 2 * 30)
        assert size <= max(share, NUM_CLIENTS * 2 * 30) + NUM_CLIENTS * 2


def test_an_absent_client_may_hold_nan_on_a_mesh(any_mesh):
    updates = random_updates(NUM_CLIENTS, low_rank=False)
    coefficients = jnp.ones(NUM_CLIENTS).at[3].set(0.0)
    poisoned = jax.tree.map(lambda x: x.at[3].set(jnp.nan), updates)
    got = cj.weighted_sum(coefficients, jax.device_put(poisoned, NamedSharding(any_mesh, P(any_mesh.axis_names))))
    on_mesh = jax.jit(lambda u: cj.weighted_sum(coefficients, u, mesh=any_mesh))(poisoned)
    want = cj.weighted_sum(coefficients, updates)
    for result in (got, on_mesh):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), result, want)
