import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.core import Cohort, LocalUpdate, Upload, federated_round, stream_blocks, streamed_round

PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.float32(0.5)}


def pull(shared, count, data, key):
    noise = jax.random.normal(key, (), jnp.float32)
    delta = jax.tree.map(lambda p, t: (p - t) * noise.astype(p.dtype), shared, data["target"])
    return Upload(delta, data["mask"]), count + 1, noise


LOCAL = LocalUpdate(lambda params: jnp.zeros((), jnp.int32), pull)


def make_cohort(count, masked=True, bad=()):
    rng = np.random.default_rng(count)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    target = {"a": draw(count, 2), "b": draw(count)}
    target["a"] = target["a"].at[jnp.asarray(bad, jnp.int32), 1].set(jnp.nan)
    mask = {k: jnp.asarray(rng.random(count) < 0.6, jnp.float32) for k in PARAMS} if masked else None
    weights = jnp.asarray(rng.integers(0, 4, count), jnp.float32)
    return Cohort({"target": target, "mask": mask}, weights, jnp.arange(count), jnp.zeros(count, jnp.int32))


def step_of(algorithm, cohort, params=PARAMS):
    return jax.jit(algorithm.step)(algorithm.init(params), cohort, jax.random.key(0))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("chunk_size", "count", "sharded"), [(1, 5, False), (3, 7, False), (9, 4, False), (1, 8, True), (2, 5, True)]
)
def test_a_streamed_round_is_a_round(chunk_size, count, sharded, masked, mesh):
    cohort = make_cohort(count, masked)
    want, want_state, want_info = step_of(federated_round(LOCAL, optax.chain(cj.robust.mean(), optax.sgd(0.5))), cohort)
    streamed = streamed_round(LOCAL, optax.sgd(0.5), chunk_size=chunk_size, mesh=mesh if sharded else None)
    got, got_state, got_info = step_of(streamed, cohort)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6), got.params, want.params)
    np.testing.assert_array_equal(got_state, want_state)
    np.testing.assert_allclose(got_info.local, want_info.local, rtol=1e-6)
    assert got_info.server[0] == 0 and got.round == 1


@pytest.mark.parametrize("sharded", [False, True])
def test_a_client_that_is_not_finite_is_absent_and_counted(sharded, mesh):
    cohort = make_cohort(6, masked=False, bad=(1, 4))._replace(weights=jnp.array([1.0, 2.0, 3.0, 1.0, 0.0, 2.0]))
    streamed = streamed_round(LOCAL, optax.sgd(1.0), chunk_size=2, mesh=mesh if sharded else None)
    got, _, info = step_of(streamed, cohort)
    without = cohort._replace(weights=cohort.weights.at[1].set(0.0))
    want, _, _ = step_of(federated_round(LOCAL, optax.chain(cj.robust.mean(), optax.sgd(1.0))), without)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5), got.params, want.params)
    assert info.server[0] == 1  # the other one has weight 0


def test_nobody_present_changes_nothing():
    cohort = make_cohort(3)._replace(weights=jnp.zeros(3))
    got, client_state, _ = step_of(streamed_round(LOCAL, optax.sgd(1.0)), cohort)
    jax.tree.map(np.testing.assert_array_equal, got.params, PARAMS)
    assert not client_state.any()


def test_narrow_parameters_are_summed_wide():
    params = {"a": jnp.zeros(2, jnp.float16)}
    local = LocalUpdate(
        lambda p: (), lambda shared, s, data, key: (Upload(jax.tree.map(lambda p: p - data, shared)), s, ())
    )
    cohort = Cohort(jnp.ones(600, jnp.float16), jnp.full(600, 1000.0), jnp.arange(600))  # the sum is 600 000
    state, _, _ = step_of(streamed_round(local, optax.sgd(1.0), chunk_size=100), cohort, params)
    assert state.params["a"].dtype == jnp.float16
    np.testing.assert_array_equal(state.params["a"], 1.0)


def test_memory_does_not_grow_with_the_cohort():
    size = 50_000
    params = {"w": jnp.zeros(size)}
    local = LocalUpdate(lambda p: (), lambda shared, s, data, key: (Upload({"w": jnp.sin(shared["w"] + data)}), s, ()))

    def temp(algorithm, count):
        cohort = Cohort(jnp.ones(count), jnp.ones(count), jnp.arange(count))
        lowered = jax.jit(algorithm.step).lower(algorithm.init(params), cohort, jax.random.key(0))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    streamed = streamed_round(local, optax.sgd(1.0))
    collected = federated_round(local, optax.chain(cj.robust.mean(), optax.sgd(1.0)))
    assert temp(streamed, 64) - temp(streamed, 8) < 4 * size  # less than one more client
    assert temp(collected, 64) - temp(collected, 8) > 50 * 4 * size


def test_chunk_size_must_be_positive():
    with pytest.raises(ValueError, match='chunk_size must be "auto", None or at least 1, got 0'):
        streamed_round(LOCAL, optax.sgd(1.0), chunk_size=0)


def test_a_cohort_whose_parts_disagree():
    algorithm = streamed_round(LOCAL, optax.sgd(1.0))
    with pytest.raises(ValueError, match="cohort.client_id must have the client axis"):
        algorithm.step(algorithm.init(PARAMS), make_cohort(3)._replace(client_id=jnp.arange(2)), jax.random.key(0))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_round_in_blocks_is_a_round(sharded, masked, mesh):
    """Blocks of any size, the last one smaller: totals, states and infos are those of the whole cohort."""
    cohort, key = make_cohort(11, masked, bad=(3,)), jax.random.key(0)
    options = {"chunk_size": 2, "mesh": mesh if sharded else None}
    want, want_state, want_info = step_of(streamed_round(LOCAL, optax.sgd(0.5, momentum=0.9), **options), cohort)
    stream = stream_blocks(LOCAL, optax.sgd(0.5, momentum=0.9), **options)
    state, states, infos = stream.init(PARAMS), [], []
    totals, add = stream.start(state), jax.jit(stream.add)
    for start in range(0, 11, 4):
        block = jax.tree.map(lambda x, start=start: x[start : start + 4], cohort)
        totals, client_state, info = add(state, totals, block, key)
        states.append(client_state)
        infos.append(info)
    state, told = stream.finish(state, totals, key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state, want)
    np.testing.assert_array_equal(np.concatenate(states), want_state)
    np.testing.assert_allclose(np.concatenate(infos), want_info.local, rtol=1e-6)
    assert told[0] == want_info.server[0] == int(cohort.weights[3] > 0)


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_no_copy_of_the_data_is_made(chunk_size):
    """Temporaries do not grow with the clients: neither their data nor their updates are held twice."""
    local = cj.local.sgd(lambda w, x, key: jnp.mean((x @ w) ** 2), optax.sgd(0.1), batch_size=2)
    algorithm = streamed_round(local, optax.sgd(1.0), chunk_size=chunk_size)

    def temporaries(count):
        rows = jnp.full(count, 4, jnp.int32)
        cohort = Cohort(cj.ClientData(jnp.zeros((count, 4, 500)), rows, rows), jnp.ones(count), jnp.arange(count))
        args = (algorithm.init(jnp.zeros((500, 3))), cohort, jax.random.key(0))
        return jax.jit(algorithm.step).lower(*args).compile().memory_analysis().temp_size_in_bytes

    per_client = (temporaries(128) - temporaries(64)) / 64
    assert per_client < 100  # bytes: a loss, a count of steps, a key; the data of a client are 8000
