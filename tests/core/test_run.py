import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.core import LocalUpdate, Upload, federated_round, init_run, run_rounds

COUNTS = [3, 1, 4, 2, 5, 2]


def visit(shared, visits, data, key):
    """Half a step to the client's mean, with noise; counts the client's visits."""
    mask = jnp.arange(data.examples.shape[0], dtype=jnp.int32) < data.num_examples
    mean = jnp.where(mask, data.examples, 0).sum() / data.num_examples.astype(jnp.float32)
    noise = 0.01 * jax.random.normal(key, ())
    return Upload(jax.tree.map(lambda p: 0.5 * (p - mean) + noise, shared)), visits + 1, {"noise": noise}


LOCAL = LocalUpdate(lambda params: jnp.zeros((), jnp.int32), visit)
PARAMS = {"w": jnp.float32(0.0)}


def make_dataset():
    values = np.random.default_rng(0).normal(size=sum(COUNTS)).astype(np.float32)
    owner = np.repeat(np.arange(len(COUNTS)), COUNTS)
    return cj.data.federated_dataset(values, client_id=owner)


def make_algorithm(rate=0.5):
    return federated_round(LOCAL, optax.chain(cj.robust.mean(), optax.sgd(rate, momentum=0.9)))


def assert_same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), a, b)


def test_a_run_is_its_rounds_one_after_another():
    """Against a Python loop over `sample_cohort` and `step`."""
    dataset, algorithm, key = make_dataset(), make_algorithm(), jax.random.key(3)
    state, history, metrics = run_rounds(
        algorithm, dataset, init_run(algorithm, dataset, PARAMS), key, num_rounds=5, num_clients=3
    )
    server, visits = algorithm.init(PARAMS), np.zeros(len(COUNTS), np.int32)
    for r in range(5):
        sample_key, step_key = jax.random.split(jax.random.fold_in(key, r))
        cohort = cj.core.sample_cohort(sample_key, dataset, 3)
        cohort = cohort._replace(state=jnp.asarray(visits)[cohort.client_id])
        server, client_state, info = algorithm.step(server, cohort, step_key)
        ids = np.asarray(cohort.client_id)
        visits[ids] += 1
        np.testing.assert_array_equal(client_state, visits[ids])
        np.testing.assert_array_equal(history.client_id[r], ids)
        np.testing.assert_array_equal(history.weights[r], np.asarray(COUNTS)[ids])
        np.testing.assert_allclose(history.info.local["noise"][r], info.local["noise"], rtol=1e-6)
    np.testing.assert_allclose(state.server.params["w"], server.params["w"], rtol=1e-5)
    np.testing.assert_array_equal(state.clients, visits)
    assert metrics is None and state.server.round == 5 and visits.sum() == 15


def test_two_runs_of_k_are_one_of_two_k():
    dataset, algorithm, key = make_dataset(), make_algorithm(), jax.random.key(1)
    start = init_run(algorithm, dataset, PARAMS)
    run = jax.jit(lambda state: run_rounds(algorithm, dataset, state, key, num_rounds=4, num_clients=2)[:2])
    middle, first = run(start)
    end, second = run(middle)
    whole, history = jax.jit(lambda state: run_rounds(algorithm, dataset, state, key, num_rounds=8, num_clients=2)[:2])(
        start
    )
    assert_same_bits(end, whole)
    assert_same_bits(jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second), history)


def test_evaluation_runs_every_so_often_and_changes_nothing():
    dataset, algorithm, key = make_dataset(), make_algorithm(), jax.random.key(2)
    start = init_run(algorithm, dataset, PARAMS)

    def evaluate(params, key):
        return {"w": params["w"], "draw": jax.random.normal(key, ())}

    plain, history, _ = run_rounds(algorithm, dataset, start, key, num_rounds=6, num_clients=3)
    state, same_history, metrics = run_rounds(
        algorithm, dataset, start, key, num_rounds=6, num_clients=3, eval_fn=evaluate, eval_every=2
    )
    assert_same_bits((state, same_history), (plain, history))
    path = [
        run_rounds(algorithm, dataset, start, key, num_rounds=r, num_clients=3)[0].server.params["w"] for r in (2, 4, 6)
    ]
    np.testing.assert_allclose(metrics["w"], path, rtol=1e-6)
    assert len(set(metrics["draw"].tolist())) == 1  # the same draw each time, so that rounds can be compared


def test_one_run_vmaps_over_seeds_and_learning_rates():
    dataset = make_dataset()

    def train(key, rate):
        algorithm = make_algorithm(rate)
        state, _, _ = run_rounds(
            algorithm, dataset, init_run(algorithm, dataset, PARAMS), key, num_rounds=3, num_clients=2
        )
        return state.server.params["w"], state.clients

    keys, rates = jax.random.split(jax.random.key(0), 2), jnp.array([0.1, 0.5, 1.0])
    swept, visits = jax.jit(jax.vmap(jax.vmap(train, (None, 0)), (0, None)))(keys, rates)
    alone = np.array([[train(k, r)[0] for r in rates] for k in keys])
    np.testing.assert_allclose(swept, alone, rtol=1e-5)
    assert len(set(np.ravel(swept).tolist())) == 6 and (visits.sum(-1) == 6).all()


def test_everybody_takes_part_by_default():
    dataset, algorithm = make_dataset(), make_algorithm()
    state, history, _ = run_rounds(
        algorithm, dataset, init_run(algorithm, dataset, PARAMS), jax.random.key(0), num_rounds=2
    )
    assert history.client_id.tolist() == [list(range(6))] * 2 and state.clients.tolist() == [2] * 6


def test_weighting_and_attackers_reach_the_cohort():
    dataset = make_dataset()
    algorithm = federated_round(LOCAL, optax.chain(cj.attacks.sign_flip(1.0), cj.robust.mean(), optax.sgd(1.0)))
    start, byzantine = init_run(algorithm, dataset, PARAMS), jnp.ones(6, bool)

    def run(bad):
        return run_rounds(
            algorithm, dataset, start, jax.random.key(0), num_rounds=1, weighting="uniform", byzantine=bad
        )

    flipped, history, _ = run(byzantine)
    honest, _, _ = run(~byzantine)
    assert (history.weights == 1).all()
    np.testing.assert_allclose(flipped.server.params["w"], -honest.server.params["w"], rtol=1e-6)


def test_no_rounds():
    dataset, algorithm = make_dataset(), make_algorithm()
    start = init_run(algorithm, dataset, PARAMS)
    state, history, metrics = run_rounds(
        algorithm, dataset, start, jax.random.key(0), num_rounds=0, eval_fn=lambda params, key: params["w"]
    )
    assert_same_bits(state, start)
    assert history.client_id.shape == (0, 6) and metrics.shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rounds": -1}, "num_rounds must be at least 0, got -1"),
        ({"num_rounds": 3, "eval_every": 0}, "eval_every must be at least 1 and divide num_rounds, got 0 and 3"),
        ({"num_rounds": 3, "eval_every": 2, "eval_fn": lambda params, key: 0}, "got 2 and 3"),
        ({"num_rounds": 1, "num_clients": 7}, "num_clients must satisfy 1 <= num_clients <= 6"),
        ({"num_rounds": 1, "weighting": "size"}, "weighting must be one of"),
    ],
)
def test_options_out_of_range(options, message):
    dataset, algorithm = make_dataset(), make_algorithm()
    with pytest.raises(ValueError, match=message):
        run_rounds(algorithm, dataset, init_run(algorithm, dataset, PARAMS), jax.random.key(0), **options)
