"""Edges between the clients and the cloud."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax import local, robust, server

NUM_CLIENTS, NUM_EDGES = 6, 3
EDGE_OF = np.array([0, 2, 0, 1, 2, 0])
RATE = 0.1


def fedavg():
    return optax.chain(robust.mean(), optax.sgd(1.0))


def loss_fn(w, batch, key):
    return 0.5 * jnp.mean(jnp.sum((w["a"][None] - batch) ** 2, axis=1)) + 0.05 * jnp.sum(w["b"] ** 2)


def make_dataset(seed=0):
    rng = np.random.default_rng(seed)
    counts = np.array([4, 8, 4, 12, 4, 8])
    x = rng.normal(size=(counts.sum(), 3)).astype(np.float32) + 3
    return cj.data.federated_dataset(x, np.repeat(np.arange(NUM_CLIENTS), counts)), x, counts


PARAMS = {"a": jnp.array([1.0, -1.0, 0.5]), "b": jnp.array([[2.0]])}
WORK = local.sgd(loss_fn, optax.sgd(RATE), batch_size=4)


def cohort_of(dataset, ids, weights):
    cohort = cj.core.take_clients(dataset, jnp.array(ids, jnp.int32))
    return cohort._replace(weights=jnp.array(weights, jnp.float32))


def full_batch_cohort(dataset, ids, weights):
    """Every client has 4 rows, so that a batch is all of them and the order does not matter."""
    cohort = cohort_of(dataset, ids, weights)
    return cohort._replace(data=cohort.data._replace(num_examples=jnp.full(len(ids), 4, jnp.int32)))


def leaves(tree):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]


def test_hierfavg_is_the_formula_in_numpy():
    dataset, x, counts = make_dataset()
    starts = np.cumsum([0, *counts])
    algorithm = server.hierarchical_round(WORK, fedavg(), fedavg(), EDGE_OF, num_edges=NUM_EDGES, period=2)
    state = algorithm.init(PARAMS)
    cloud = {"a": np.array([1.0, -1.0, 0.5]), "b": np.array([[2.0]])}
    edges = [{k: v.copy() for k, v in cloud.items()} for _ in range(NUM_EDGES)]
    heard = np.zeros(NUM_EDGES)
    schedule = [
        ([0, 1, 2], [4.0, 2.0, 1.0]),
        ([1, 3, 5], [1.0, 3.0, 2.0]),
        ([0, 2, 4], [1.0, 0.0, 5.0]),
        ([5, 4], [2.0, 2.0]),
    ]
    for turn, (ids, weights) in enumerate(schedule):
        state, _, info = jax.jit(algorithm.step)(state, full_batch_cohort(dataset, ids, weights), jax.random.key(turn))
        for edge in range(NUM_EDGES):
            mine = [(i, w) for i, w in zip(ids, weights, strict=True) if EDGE_OF[i] == edge and w > 0]
            if not mine:
                continue
            total = sum(w for _, w in mine)
            start = edges[edge]
            new = {k: np.zeros_like(v) for k, v in start.items()}
            for i, w in mine:
                mean = x[starts[i] : starts[i] + 4].astype(np.float64).mean(axis=0)
                new["a"] += w / total * (start["a"] - RATE * (start["a"] - mean))
                new["b"] += w / total * (start["b"] - RATE * 0.1 * start["b"])
            edges[edge], heard[edge] = new, heard[edge] + total
        synced = turn % 2 == 1
        if synced:
            cloud = {k: sum(h * e[k] for h, e in zip(heard, edges, strict=True)) / heard.sum() for k in cloud}
            edges, heard = [{k: v.copy() for k, v in cloud.items()} for _ in range(NUM_EDGES)], np.zeros(NUM_EDGES)
        assert bool(info.is_synced) == synced and int(state.round) == turn + 1
        for got, want in zip(leaves(state.params), leaves(cloud), strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)
        stacked = {k: np.stack([e[k] for e in edges]) for k in cloud}
        for got, want in zip(leaves(state.opt_state.edges.params), leaves(stacked), strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(state.opt_state.weight, heard)
        present = sum(w > 0 for w in weights)
        assert [int(m) for m in info.messages] == [present, present, *([NUM_EDGES] * 2 if synced else [0, 0])]


@pytest.mark.slow
@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "edge_tx", [fedavg(), optax.chain(robust.krum(f=1), optax.adam(0.1)), optax.chain(robust.median(), optax.sgd(0.5))]
)
def test_one_edge_is_flat(edge_tx):
    dataset, _, _ = make_dataset()
    flat = cj.federated_round(WORK, edge_tx)
    deep = server.hierarchical_round(WORK, edge_tx, fedavg(), np.zeros(6, int), num_edges=1, period=1)
    a, b = flat.init(PARAMS), deep.init(PARAMS)
    for turn in range(3):
        cohort = cohort_of(dataset, [0, 1, 3, 4, 5], [1.0, 2.0, 0.0, 4.0, 1.0])
        a, _, _ = flat.step(a, cohort, jax.random.key(turn))
        b, _, _ = deep.step(b, cohort, jax.random.key(turn))
    for got, want in zip(leaves(b.params), leaves(a.params), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_means_of_means_are_the_mean():
    dataset, _, _ = make_dataset()
    flat = cj.federated_round(WORK, fedavg())
    deep = server.hierarchical_round(WORK, fedavg(), fedavg(), EDGE_OF, num_edges=NUM_EDGES, period=1)
    cohort = cohort_of(dataset, range(6), [1.0, 2.0, 0.0, 4.0, 1.0, 3.0])
    a, _, _ = flat.step(flat.init(PARAMS), cohort, jax.random.key(0))
    b, _, _ = deep.step(deep.init(PARAMS), cohort, jax.random.key(0))
    for got, want in zip(leaves(b.params), leaves(a.params), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_poisoned_edge_is_dropped_by_the_clouds_rule():
    dataset, _, _ = make_dataset()
    results = {}
    for name, cloud in (("mean", robust.mean()), ("median", robust.median())):
        deep = server.hierarchical_round(
            WORK, fedavg(), optax.chain(cloud, optax.sgd(1.0)), np.array([0, 0, 1, 1, 2, 2]), num_edges=3, period=1
        )
        cohort = cohort_of(dataset, range(6), np.ones(6))
        wrong = jnp.where(cohort.client_id[:, None, None] >= 4, 1e4, cohort.data.examples)
        cohort = cohort._replace(data=cohort.data._replace(examples=wrong))
        state, _, _ = deep.step(deep.init(PARAMS), cohort, jax.random.key(0))
        results[name] = float(jnp.max(jnp.abs(state.params["a"])))
    assert results["median"] < 10 < 100 < results["mean"]


def test_absent_clients_and_edges_change_nothing():
    dataset, _, _ = make_dataset()
    deep = server.hierarchical_round(WORK, fedavg(), fedavg(), EDGE_OF, num_edges=NUM_EDGES, period=3)
    cohort = cohort_of(dataset, [0, 2, 1], [1.0, 2.0, 0.0])
    bad = cohort._replace(data=cohort.data._replace(examples=cohort.data.examples.at[2].set(jnp.nan)))
    a, _, _ = deep.step(deep.init(PARAMS), jax.tree.map(lambda x: x[:2], cohort), jax.random.key(0))
    b, _, _ = deep.step(deep.init(PARAMS), bad, jax.random.key(0))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)
    for got, want in zip(leaves(b.opt_state.edges.params), leaves(PARAMS), strict=True):
        np.testing.assert_array_equal(got[1:], np.broadcast_to(want, got[1:].shape))


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_layouts_and_resuming_change_nothing():
    dataset, _, _ = make_dataset()
    results = []
    for map_fn in (None, cj.cohort_map(1), cj.cohort_map(4)):
        deep = server.hierarchical_round(
            WORK,
            optax.chain(robust.mean(), optax.adam(0.1)),
            fedavg(),
            EDGE_OF,
            num_edges=NUM_EDGES,
            period=3,
            map_fn=map_fn,
        )
        state = cj.init_run(deep, dataset, PARAMS)
        for rounds in (7,) if map_fn is None else (3, 4):
            state, history, _ = cj.run_rounds(deep, dataset, state, jax.random.key(5), num_rounds=rounds, num_clients=4)
        results.append(state)
    assert history.info.messages.edge_up.tolist() == [0, 0, NUM_EDGES, 0]
    for other in results[1:]:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), other, results[0])


def test_bytes_are_exact_beyond_32_bits():
    count = jnp.array([2**31 - 1, 2**31 - 1], jnp.int32)
    sent = server.LinkMessages(count, count, jnp.array([3]), jnp.array([4]))
    assert server.link_bytes(sent, model_bytes=10) == (4 * (2**31 - 1) * 10, 70)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_edges": 0}, "num_edges must be at least 1, got 0"),
        ({"period": 0}, "period must be at least 1, got 0"),
        ({"num_edges": 2}, r"edge_of must lie in \[0, 2\), got 0 to 2"),
        ({"edge_of": np.array([0.5])}, r"edge_of must be \[N\] integers, got float32"),
    ],
)
def test_bad_numbers_are_named(options, message):
    given = {"edge_of": EDGE_OF, "num_edges": 3, "period": 1, **options}
    with pytest.raises(ValueError, match=message):
        server.hierarchical_round(WORK, fedavg(), fedavg(), **given)
