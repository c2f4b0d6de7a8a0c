import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.core import shuffled_epochs
from cedarjax.personal.fedala import sample
from tests.local import local_oracles as oracles

RATE, WEIGHT_RATE, BATCH, WINDOW, MAX_PASSES, TOL, FRACTION = 0.1, 2.0, 2, 3, 12, 0.02, 0.7
SERVER = optax.chain(cj.robust.mean(), optax.sgd(1.0))
ADAPTED = np.array([True, True, True, False])  # `w`, not `b`


def build(**options):
    defaults = {"weight_rate": WEIGHT_RATE, "fraction": FRACTION, "tol": TOL, "window": WINDOW}
    options = defaults | {"max_passes": MAX_PASSES, "batch_size": BATCH, "num_epochs": 2} | options
    return cj.personal.fedala(oracles.loss_fn, optax.sgd(RATE), "w", **options)


def order(key, count):
    stream = shuffled_epochs(key, jnp.int32(0), jnp.int32(count), length=oracles.LENGTH, num_epochs=1)
    return np.asarray(stream.orders[0])[:count]


def learn(own, shared, weights, x, y, count, key, most):
    """The paper's weights: projected steps over a sample, pass after pass; also the losses of the passes."""
    sample_key, order_key, _ = jax.random.split(key, 3)
    size = max(1, round(FRACTION * count))
    chosen = order(sample_key, count)[:size]
    losses = []
    while len(losses) < most and not (len(losses) >= WINDOW and np.std(losses[-WINDOW:]) < TOL):
        rows = chosen[order(jax.random.fold_in(order_key, len(losses)), size)]
        batch_losses = []
        for step in range(-(-size // BATCH)):
            batch = rows[np.arange(step * BATCH, (step + 1) * BATCH) % size]
            start = np.where(ADAPTED, own + (shared - own) * weights, shared)
            error = np.column_stack([x[batch], np.ones(BATCH)]) @ start - y[batch]
            batch_losses.append(0.5 * np.mean(error**2))
            slope = oracles.gradient(start, x, y, batch) * (shared - own)
            weights = np.clip(weights - WEIGHT_RATE * slope, 0, 1)
        losses.append(np.mean(batch_losses))
    return weights, losses


def test_rounds_follow_the_paper():
    _, xs, ys = oracles.federation()
    _, shared_w = oracles.start()
    own, weights, passes = {}, np.ones((oracles.NUM_CLIENTS, 4)), []
    taken = np.zeros(oracles.NUM_CLIENTS, int)
    for r, ids, p, shared, states, info in oracles.rounds(build(), SERVER, weighted=True):
        trained = []
        for place, i in enumerate(ids):
            count = oracles.COUNTS[i]
            train_key, weight_key = jax.random.split(oracles.client_key(r, i))
            most = (0, MAX_PASSES, 1)[min(taken[i], 2)]
            mine = own.get(i, shared_w)
            weights[i], losses = learn(mine, shared_w, weights[i], xs[i], ys[i], count, weight_key, most)
            w = np.where(ADAPTED, mine + (shared_w - mine) * weights[i], shared_w)
            for rows in oracles.rows_of(train_key, count, BATCH, 2):
                w = w - RATE * oracles.gradient(w, xs[i], ys[i], rows)
            trained.append(w)
            taken[i] += 1
            passes.append(len(losses))
            assert info.local.num_passes[place] == len(losses)
            np.testing.assert_allclose(info.local.weight_loss[place], losses[-1] if losses else 0.0, rtol=1e-4)
            np.testing.assert_allclose(info.local.mean_weight[place], weights[i][:3].mean(), rtol=1e-4)
        own |= dict(zip(ids, trained, strict=True))
        shared_w = p @ np.array(trained) / p.sum()
        np.testing.assert_allclose(oracles.flat(shared), shared_w, rtol=1e-4, atol=1e-5)
        for i in own:
            state = jax.tree.map(lambda leaf, i=i: leaf[i], states)
            np.testing.assert_allclose(oracles.flat(state.params), own[i], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(state.weights["w"], weights[i][:3], rtol=1e-4, atol=1e-5)
            assert state.weights["b"] is None and state.num_rounds == taken[i]
    # First rounds, long first aggregations that ended in different ways, and later ones.
    assert {0, 1} < set(passes) and len(set(passes)) >= 4
    learnt = weights[:, ADAPTED]
    assert ((learnt > 0) & (learnt < 1)).any() and (learnt == 0).any() and (learnt == 1).any()


def client(i=0):
    return jax.tree.map(lambda x: x[i], oracles.federation()[0])


def second_round(local, data=None, key=0):
    """A client that has trained once from the start meets a model that is elsewhere."""
    params = oracles.start()[0]
    state = local.init(jax.tree.map(lambda p: p + 0.4, params))._replace(num_rounds=jnp.int32(1))
    return local.update(params, state, client() if data is None else data, jax.random.key(key))


def test_the_first_round_is_sgd():
    params, key = oracles.start()[0], jax.random.key(1)
    plain = cj.local.sgd(oracles.loss_fn, optax.sgd(RATE), batch_size=BATCH, num_epochs=2)
    want, _, _ = plain.update(params, (), client(), jax.random.split(key)[0])
    local = build()
    stale = local.init(jax.tree.map(lambda p: p + 1, params))
    got, state, info = local.update(params, stale, client(), key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got.delta, want.delta)
    assert info.num_passes == 0 and info.mean_weight == 1 and state.num_rounds == 1


def test_what_is_deployed():
    local, params = build(), oracles.start()[0]
    new = local.init(jax.tree.map(lambda p: p + 1, params))
    jax.tree.map(np.testing.assert_array_equal, local.model(params, new), params)
    upload, state, _ = second_round(local)
    jax.tree.map(np.testing.assert_array_equal, local.model(params, state), state.params)
    jax.tree.map(lambda s, d, p: np.testing.assert_allclose(s - d, p, rtol=1e-6), params, upload.delta, state.params)


def test_passes_end_when_losses_settle():
    _, _, info = second_round(build(tol=1e9))
    assert info.num_passes == WINDOW
    _, _, info = second_round(build(tol=0.0, max_passes=7))
    assert info.num_passes == 7
    _, _, info = second_round(build(max_passes=1))
    assert info.num_passes == 1


def test_weights_stay_in_their_bounds():
    _, state, _ = second_round(build(weight_rate=1e4, tol=0.0))
    assert ((state.weights["w"] >= 0) & (state.weights["w"] <= 1)).all()
    assert set(np.unique(state.weights["w"])) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("count", "fraction", "size"), [(6, 0.8, 5), (6, 1.0, 6), (5, 0.01, 1), (1, 0.5, 1), (0, 1, 0)]
)
def test_the_sample(count, fraction, size):
    data = client()._replace(num_examples=jnp.int32(count))
    stream = sample(jax.random.key(0), data, fraction)
    assert stream.num_rows == size
    rows = np.asarray(stream.orders[0])[:size]
    assert len(set(rows)) == size and all(row < count for row in rows)
    others = [sample(jax.random.key(k), data, fraction).orders[0][:size].tolist() for k in range(20)]
    assert len({tuple(o) for o in others}) > 1 or size <= 1


def test_rates_can_be_swept():
    def work(weight_rate, tol):
        return second_round(build(weight_rate=weight_rate, tol=tol))

    swept = jax.vmap(work)(jnp.array([0.1, 2.0]), jnp.array([1.0, 0.0]))
    for i, pair in enumerate([(0.1, 1.0), (2.0, 0.0)]):
        jax.tree.map(lambda s, d, i=i: np.testing.assert_allclose(s[i], d, rtol=1e-4, atol=1e-6), swept, work(*pair))
    assert swept[2].num_passes.tolist() == [WINDOW, MAX_PASSES]


def test_a_client_without_examples_stays_finite():
    data = cj.ClientData(
        jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), client().examples), jnp.int32(0), jnp.int32(0)
    )
    results = second_round(build(), data)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(results))


@pytest.mark.slow
def test_laws():
    oracles.check_laws(build(num_steps_fn=oracles.half))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "fraction must satisfy 0 < fraction <= 1, got 0.0"),
        ({"fraction": 1.1}, "fraction must satisfy 0 < fraction <= 1, got 1.1"),
        ({"weight_rate": -1.0}, "weight_rate must be at least 0, got -1.0"),
        ({"tol": -1.0}, "tol must be at least 0, got -1.0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"max_passes": 0}, "max_passes must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_part_that_is_none():
    local = cj.personal.fedala(oracles.loss_fn, optax.sgd(RATE), "head", batch_size=2)
    with pytest.raises(ValueError, match="head"):
        local.init(oracles.start()[0])
