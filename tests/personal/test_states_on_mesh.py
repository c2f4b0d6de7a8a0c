"""Client states of a run that lie on a mesh, sharded by client."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import cedarjax as cj
from cedarjax import personal

NUM_CLIENTS, NUM_HIDDEN = 16, 20


def embed_fn(params, batch):
    return jnp.tanh(batch["x"] @ params["body"])


def loss_fn(params, batch, key):
    return 0.5 * jnp.mean((embed_fn(params, batch) @ params["head"] - batch["y"].astype(jnp.float32)) ** 2)


def make_problem():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 6, NUM_CLIENTS)
    owner = np.repeat(np.arange(NUM_CLIENTS), counts)
    x, y = rng.normal(size=(len(owner), 3)).astype(np.float32), rng.integers(0, 2, len(owner)).astype(np.int32)
    params = {"body": rng.normal(size=(3, NUM_HIDDEN)), "head": rng.normal(size=NUM_HIDDEN)}
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    return cj.data.federated_dataset({"x": x, "y": y}, owner), params


KERNELS = {
    "fedper": lambda: personal.fedper(loss_fn, optax.sgd(0.1), batch_size=2),
    "ditto": lambda: personal.ditto(
        cj.local.sgd(loss_fn, optax.sgd(0.1), batch_size=2), loss_fn, optax.sgd(0.1), 0.5, batch_size=2
    ),
    "fedproto": lambda: personal.fedproto(
        loss_fn, embed_fn, optax.sgd(0.1), num_classes=2, num_features=NUM_HIDDEN, batch_size=2
    ),
}


def by_client(tree, mesh):
    return jax.device_put(tree, NamedSharding(mesh, P("clients")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "num_clients"), [("fedper", 4), ("fedper", 6), ("fedper", 16), ("ditto", 6), ("fedproto", 6)]
)
def test_a_run_with_sharded_states_is_the_run_on_one_device(kernel, num_clients, mesh):
    """The same results, and the states that come back lie where those that went in lay, for any size of the cohort."""
    dataset, params = make_problem()

    def run(on_mesh):
        layout = cj.cohort_map(mesh=on_mesh)
        algorithm = cj.federated_round(KERNELS[kernel](), optax.chain(cj.robust.mean(), optax.sgd(1.0)), layout)
        state = cj.init_run(algorithm, dataset, params)
        data = dataset
        if on_mesh is not None:
            everywhere = NamedSharding(on_mesh, P())
            state = state._replace(
                clients=by_client(state.clients, on_mesh), server=jax.device_put(state.server, everywhere)
            )
            data = jax.device_put(dataset, everywhere)

        @jax.jit
        def rounds(state, data):
            return cj.run_rounds(algorithm, data, state, jax.random.key(0), num_rounds=3, num_clients=num_clients)[:2]

        return *rounds(state, data), rounds.lower(state, data)

    want, want_history, _ = run(None)
    got, history, lowered = run(mesh)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, want)
    np.testing.assert_array_equal(history.client_id, want_history.client_id)
    for leaf in jax.tree.leaves(got.clients):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, P("clients")), leaf.ndim)
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {NUM_CLIENTS // mesh.size}
    if num_clients < NUM_CLIENTS:  # no device ever holds everybody's states
        everybody = re.findall(rf"f32\[{NUM_CLIENTS},(?:3,)?{NUM_HIDDEN}\]", lowered.compile().as_text())
        assert not everybody


def test_a_second_segment_does_not_compile_again(mesh):
    """The states come back on the same shards, so that a run goes on without a new trace."""
    dataset, params = make_problem()
    layout = cj.cohort_map(mesh=mesh)
    algorithm = cj.federated_round(KERNELS["fedper"](), optax.chain(cj.robust.mean(), optax.sgd(1.0)), layout)
    everywhere = NamedSharding(mesh, P())
    state = cj.init_run(algorithm, dataset, params)
    state = state._replace(clients=by_client(state.clients, mesh), server=jax.device_put(state.server, everywhere))
    data = jax.device_put(dataset, everywhere)
    rounds = jax.jit(
        lambda state, data: cj.run_rounds(algorithm, data, state, jax.random.key(0), num_rounds=2, num_clients=4)[0]
    )
    for _ in range(2):
        state = rounds(state, data)
    assert rounds._cache_size() == 1
