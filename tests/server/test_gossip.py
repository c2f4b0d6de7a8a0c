"""Clients that mix their models with their neighbours'."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cedarjax as cj
from cedarjax import local, server

RATE = 0.2


def loss_fn(w, batch, key):
    return 0.5 * jnp.mean(jnp.sum((w["a"][None] - batch) ** 2, axis=1))


WORK = local.sgd(loss_fn, optax.sgd(RATE), batch_size=2)
PARAMS = {"a": jnp.array([1.0, -1.0])}


def make_dataset(num_clients=5):
    x = np.random.default_rng(3).normal(size=(2 * num_clients, 2)).astype(np.float32)
    return cj.data.federated_dataset(x, np.repeat(np.arange(num_clients), 2)), x.reshape(num_clients, 2, 2)


def test_d_psgd_is_the_formula_in_numpy():
    dataset, x = make_dataset()
    mixing = np.asarray(server.metropolis_weights(server.ring(5)), np.float64)
    algorithm = server.gossip_round(WORK, mixing.astype(np.float32))
    run = cj.init_run(algorithm, dataset, PARAMS)
    models = np.tile(np.array([1.0, -1.0]), (5, 1))
    targets = x.astype(np.float64).mean(axis=1)
    for absent in ([], [1], [0, 3], []):
        weights = np.ones(5)
        weights[absent] = 0
        cohort = cj.core.take_clients(dataset, jnp.arange(5))._replace(
            weights=jnp.array(weights, jnp.float32), state=run.clients
        )
        new_server, clients, info = jax.jit(algorithm.step)(run.server, cohort, jax.random.key(0))
        run = run._replace(server=new_server, clients=clients)
        present = [i for i in range(5) if i not in absent]
        stepped = models.copy()
        stepped[present] -= RATE * (models[present] - targets[present])
        mixed = models.copy()
        for i in present:
            others = [j for j in present if j != i]
            mixed[i] = (1 - sum(mixing[i, j] for j in others)) * stepped[i] + sum(
                mixing[i, j] * stepped[j] for j in others
            )
        models = mixed
        np.testing.assert_allclose(clients.shared["a"], models, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(new_server.params["a"], models[present].mean(axis=0), rtol=1e-5, atol=1e-6)
        away = np.linalg.norm(models - models[present].mean(axis=0), axis=1)
        away[absent] = 0
        np.testing.assert_allclose(info.distance, away, rtol=1e-4, atol=1e-6)
        sent = [sum(mixing[i, j] > 0 for j in present if j != i) if i in present else 0 for i in range(5)]
        assert info.messages.tolist() == sent


@given(st.integers(1, 8), st.integers(0, 2**16))
def test_metropolis_weights_are_doubly_stochastic(num_clients, seed):
    rng = np.random.default_rng(seed)
    graph = np.triu(rng.random((num_clients, num_clients)) < 0.4, 1)
    mixing = np.asarray(server.metropolis_weights(jnp.asarray(graph | graph.T)))
    np.testing.assert_allclose(mixing.sum(axis=0), 1, atol=1e-6)
    np.testing.assert_allclose(mixing, mixing.T)
    assert mixing.min() >= -1e-6
    degree = (graph | graph.T).sum(axis=1)
    for i, j in zip(*np.nonzero(graph), strict=True):
        assert mixing[i, j] == pytest.approx(1 / (1 + max(degree[i], degree[j])), rel=1e-6)


@given(st.lists(st.booleans(), min_size=6, max_size=6))
def test_mixing_preserves_the_mean_of_who_is_there(present):
    mixing = server.metropolis_weights(server.ring(6))
    models = jnp.arange(12.0).reshape(6, 2) ** 2
    models = jnp.where(jnp.array(present)[:, None], models, jnp.nan)
    mixed = server.mix(mixing, jnp.array(present, jnp.float32), models)
    there = np.array(present)
    np.testing.assert_allclose(mixed[there].sum(axis=0), models[there].sum(axis=0), rtol=1e-5)
    assert np.isnan(mixed[~there]).all()


def test_disagreement_shrinks_by_the_spectral_gap():
    mixing = server.metropolis_weights(server.ring(7))
    gap = float(server.spectral_gap(mixing))
    assert gap == pytest.approx(1 - abs((1 + 2 * np.cos(2 * np.pi / 7)) / 3), abs=1e-5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 4)), jnp.float32)
    before = jnp.linalg.norm(x - x.mean(axis=0, keepdims=True))
    after = server.mix(mixing, jnp.ones(7), x)
    assert float(jnp.linalg.norm(after - x.mean(axis=0, keepdims=True)) / before) <= 1 - gap + 1e-5


def test_everybody_with_everybody_is_federated_averaging():
    dataset, _ = make_dataset()
    flat = cj.federated_round(WORK, optax.chain(cj.robust.mean(), optax.sgd(1.0)))
    gossip = server.gossip_round(WORK, jnp.full((5, 5), 0.2))
    runs = []
    for algorithm in (flat, gossip):
        state = cj.init_run(algorithm, dataset, PARAMS)
        state, _, _ = cj.run_rounds(algorithm, dataset, state, jax.random.key(1), num_rounds=3, weighting="uniform")
        runs.append(state)
    np.testing.assert_allclose(runs[1].server.params["a"], runs[0].server.params["a"], rtol=1e-5)
    np.testing.assert_allclose(runs[1].clients.shared["a"], np.tile(runs[0].server.params["a"], (5, 1)), rtol=1e-5)


def test_a_client_that_is_not_finite_is_not_heard():
    dataset, _ = make_dataset()
    algorithm = server.gossip_round(WORK, server.metropolis_weights(server.ring(5)))
    run = cj.init_run(algorithm, dataset, PARAMS)
    cohort = cj.core.take_clients(dataset, jnp.arange(5))._replace(state=run.clients)
    bad = cohort._replace(data=cohort.data._replace(examples=cohort.data.examples.at[2].set(jnp.inf)))
    gone = cohort._replace(weights=cohort.weights.at[2].set(0))
    results = [algorithm.step(run.server, c, jax.random.key(0)) for c in (bad, gone)]
    for a, b in zip(jax.tree.leaves(results[0][:2]), jax.tree.leaves(results[1][:2]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.isfinite(results[0][1].shared["a"]).all()


def test_a_client_deploys_its_own_model():
    algorithm = server.gossip_round(WORK, jnp.eye(2))
    client = server.GossipClient({"a": jnp.array([5.0, 6.0])}, ())
    assert algorithm.model(PARAMS, client) is client.shared


@pytest.mark.parametrize(
    ("mixing", "message"),
    [
        (jnp.ones((2, 3)), r"mixing must be \[N, N\], got the shape \(2, 3\)"),
        (jnp.ones((2, 2)), "mixing must have rows that sum to 1, got one that is off by 1"),
    ],
)
def test_bad_matrices_are_named(mixing, message):
    with pytest.raises(ValueError, match=message):
        server.gossip_round(WORK, mixing)


def test_bad_graphs_are_named():
    with pytest.raises(ValueError, match=r"adjacency must be \[N, N\], got the shape \(2, 3\)"):
        server.metropolis_weights(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="num_neighbors must be at least 1, got 0"):
        server.ring(4, 0)
    with pytest.raises(ValueError, match="num_clients must be at least 1, got 0"):
        server.ring(0)


def test_masked_uploads_are_refused():
    def update(shared, state, data, key):
        return cj.Upload(shared, jax.tree.map(lambda _: jnp.float32(1), shared)), state, ()

    dataset, _ = make_dataset()
    algorithm = server.gossip_round(cj.LocalUpdate(lambda p: (), update), jnp.eye(5))
    run = cj.init_run(algorithm, dataset, PARAMS)
    with pytest.raises(ValueError, match="local_update must upload all layers"):
        cj.run_rounds(algorithm, dataset, run, jax.random.key(0), num_rounds=1)
