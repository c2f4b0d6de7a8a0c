from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.core import Cohort, LocalUpdate, Upload, cohort_map, federated_round

RATE = 0.25


def pull(shared, count, data, key):
    """Moves a quarter of the way to the client's target, layer by layer where it uploads; counts its rounds."""
    delta = jax.tree.map(lambda p, t: RATE * (p - t), shared, data["target"])
    return Upload(delta, data["mask"]), count + 1, {"noise": jax.random.normal(key, ())}


LOCAL = LocalUpdate(lambda params: jnp.zeros((), jnp.int32), pull)
PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.float32(0.5)}
AVERAGE = optax.chain(cj.robust.mean(), optax.sgd(1.0))


def make_cohort(seed, count=5, masked=True):
    rng = np.random.default_rng(seed)
    target = {"a": rng.normal(size=(count, 2)), "b": rng.normal(size=count)}
    mask = {"a": rng.random(count) < 0.6, "b": rng.random(count) < 0.6} if masked else None
    weights = rng.integers(1, 9, count) * (rng.random(count) < 0.7)

    def to_device(tree):
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)

    data = {"target": to_device(target), "mask": to_device(mask)}
    return Cohort(data, to_device(weights), jnp.arange(count), jnp.arange(count)), target, mask, weights


@pytest.mark.parametrize("masked", [False, True])
def test_three_rounds_of_averaging(masked):
    algorithm = federated_round(LOCAL, AVERAGE)
    state, step = algorithm.init(PARAMS), jax.jit(algorithm.step)
    want = {k: np.asarray(v, np.float64) for k, v in PARAMS.items()}
    for r in range(3):
        cohort, target, mask, weights = make_cohort(r, masked=masked)
        state, client_state, _ = step(state, cohort, jax.random.key(r))
        for name in want:
            w = weights * (mask[name] if masked else 1.0)
            if w.sum() > 0:
                want[name] = want[name] - RATE * (want[name] - np.average(target[name], axis=0, weights=w))
        np.testing.assert_array_equal(client_state, np.arange(5) + (weights > 0))
    assert int(state.round) == 3
    for name in want:
        np.testing.assert_allclose(state.params[name], want[name], rtol=1e-5, atol=1e-6)


def test_an_adaptive_server_sees_the_mean():
    """Two steps of momentum written out."""
    cohort, target, _, _ = make_cohort(0, masked=False)
    cohort = cohort._replace(weights=jnp.ones(5))
    algorithm = federated_round(LOCAL, optax.chain(cj.robust.mean(), optax.sgd(0.5, momentum=0.9)))
    state = algorithm.init(PARAMS)
    want, velocity = np.asarray(PARAMS["a"], np.float64), 0.0
    for _ in range(2):
        state = jax.jit(algorithm.step)(state, cohort, jax.random.key(0))[0]
        velocity = 0.9 * velocity + RATE * (want - target["a"].mean(axis=0))
        want = want - 0.5 * velocity
    np.testing.assert_allclose(state.params["a"], want, rtol=1e-5)


def test_draws_follow_the_client_and_the_round():
    cohort, *_ = make_cohort(0)
    step = jax.jit(federated_round(LOCAL, AVERAGE).step)
    state = federated_round(LOCAL, AVERAGE).init(PARAMS)

    def noise(ids, seed):
        return np.asarray(
            step(state, cohort._replace(client_id=jnp.asarray(ids)), jax.random.key(seed))[2].local["noise"]
        )

    first = noise([0, 1, 2, 3, 4], 0)
    np.testing.assert_array_equal(noise([4, 3, 2, 1, 0], 0), first[::-1])
    np.testing.assert_array_equal(noise([0, 7, 2, 8, 4], 0)[[0, 2, 4]], first[[0, 2, 4]])
    assert len(set(first)) == 5 and not set(first) & set(noise([0, 1, 2, 3, 4], 1))


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_every_layout_of_a_mesh_gives_the_round(chunk_size, mesh):
    cohort, *_ = make_cohort(4, count=6)
    want, got = (
        jax.jit(federated_round(LOCAL, AVERAGE, map_fn).step)(
            federated_round(LOCAL, AVERAGE).init(PARAMS), cohort, jax.random.key(0)
        )
        for map_fn in (None, cohort_map(chunk_size, mesh))
    )
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5), got, want)


class SpyState(NamedTuple):
    info: object = None


def spy():
    """Tells what the server's chain is given."""

    def update(updates, state, params=None, *, weights, key, byzantine):
        told = {"weights": weights, "byzantine": byzantine, "draw": jax.random.normal(key, ()), "params": params}
        return updates, SpyState(told)

    return optax.GradientTransformationExtraArgs(lambda params: SpyState(), update)


def test_the_chain_is_given_weights_key_byzantine_and_params():
    cohort, _, mask, weights = make_cohort(1)
    cohort = cohort._replace(byzantine=jnp.arange(5) == 2)
    algorithm = federated_round(LOCAL, optax.chain(spy(), AVERAGE))
    state = algorithm.init(PARAMS)
    after, _, info = algorithm.step(state, cohort, jax.random.key(0))
    (told,) = info.server
    np.testing.assert_array_equal(told["weights"]["a"], weights * mask["a"])
    assert told["byzantine"].tolist() == [False, False, True, False, False]
    np.testing.assert_array_equal(told["params"]["a"], PARAMS["a"])
    assert jax.tree.structure(after) == jax.tree.structure(state)
    again = algorithm.step(state, cohort, jax.random.key(1))[2].server[0]
    assert told["draw"] != again["draw"]


def test_the_state_can_be_donated_and_the_parameters_survive():
    held = optax.GradientTransformationExtraArgs(lambda params: params, lambda u, s, p=None, **_: (u, s))
    algorithm = federated_round(LOCAL, optax.chain(AVERAGE, held))  # its state is the parameters themselves
    state = algorithm.init(PARAMS)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((state, PARAMS))]
    assert len(set(pointers)) == len(pointers)
    step = jax.jit(algorithm.step, donate_argnums=0)
    cohort, *_ = make_cohort(0)
    for r in range(2):
        state, _, _ = step(state, cohort, jax.random.key(r))
    np.testing.assert_array_equal(PARAMS["a"], [1.0, -2.0])


@pytest.mark.parametrize(
    "params", [{"a": jnp.array([1.0, 2.0]), "b": 0.5}, {"a": np.ones(2, np.float32), "b": jnp.array(0.5)}]
)
def test_weakly_typed_parameters_do_not_retrace(params):
    algorithm, traces = federated_round(LOCAL, AVERAGE), []

    def step(*args):
        traces.append(1)
        return algorithm.step(*args)

    step, state = jax.jit(step), algorithm.init(params)
    for r in range(3):
        state = step(state, make_cohort(r)[0], jax.random.key(r))[0]
    assert len(traces) == 1


def test_the_step_vmaps_over_hyperparameters():
    cohort, *_ = make_cohort(0, masked=False)

    def run(rate):
        algorithm = federated_round(LOCAL, optax.chain(cj.robust.mean(), optax.sgd(rate)))
        return algorithm.step(algorithm.init(PARAMS), cohort, jax.random.key(0))[0].params["a"]

    rates = jnp.array([0.5, 1.0])
    got = jax.vmap(run)(rates)
    np.testing.assert_allclose(got, np.stack([run(float(r)) for r in rates]), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": jnp.ones(())}, r"cohort.weights must be \[C\] with C >= 1, got the shape \(\)"),
        ({"weights": jnp.ones(0)}, "C >= 1"),
        (
            {"client_id": jnp.arange(4)},
            r"cohort.client_id must have the client axis of cohort.weights, 5, .* got the shape \(4,\)",
        ),
        ({"data": {"target": {"a": jnp.ones((3, 2))}}}, "cohort.data.target.a must"),
        ({"byzantine": jnp.bool(True)}, "cohort.byzantine must"),
    ],
)
def test_a_cohort_whose_parts_disagree(change, message):
    algorithm = federated_round(LOCAL, AVERAGE)
    with pytest.raises(ValueError, match=message):
        algorithm.step(algorithm.init(PARAMS), make_cohort(0)[0]._replace(**change), jax.random.key(0))


def test_a_chain_without_an_aggregator():
    algorithm = federated_round(LOCAL, optax.sgd(1.0))
    with pytest.raises(
        ValueError, match=r"must contain an aggregator, .* returned the shape \(5, 2\) for 'a', expected \(2,\)"
    ):
        algorithm.step(algorithm.init(PARAMS), make_cohort(0)[0], jax.random.key(0))
