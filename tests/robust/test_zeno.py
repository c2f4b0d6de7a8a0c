import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax import core
from cedarjax.robust import zeno
from tests.robust import robust_oracles as oracles

NUM_CLIENTS, F = 7, 2
PARAMS = {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array(0.25)}
RNG = np.random.default_rng(0)
BATCH = {"x": RNG.normal(size=(6, 3)).astype(np.float32), "y": RNG.normal(size=6).astype(np.float32)}
WEIGHTS = np.array([1.0, 2.0, 0.0, 3.0, 1.0, 1.0, 2.0])


def loss_fn(params, batch, key):
    del key
    return jnp.square(jnp.asarray(batch["x"]) @ params["w"] + params["b"] - jnp.asarray(batch["y"])).mean()


def loss(params):
    """The same in float64."""
    x, y = np.asarray(BATCH["x"], np.float64), np.asarray(BATCH["y"], np.float64)
    return np.square(x @ params[1:] + params[0] - y).mean()


def make_updates(seed=0):
    """Row 2 is absent and holds NaN, row 5 holds one Inf, row 4 climbs."""
    rng = np.random.default_rng(seed)
    grad = jax.grad(loss_fn)(PARAMS, BATCH, None)
    w = 0.1 * (np.asarray(grad["w"]) + rng.normal(size=(NUM_CLIENTS, 3)))
    b = 0.1 * (np.asarray(grad["b"]) + rng.normal(size=NUM_CLIENTS))
    w[4] *= -10
    w[2], b[5] = np.nan, np.inf
    return {"w": w.astype(np.float32), "b": b.astype(np.float32)}


def run(updates, weights=WEIGHTS, **options):
    rule = zeno(F, options.pop("loss_fn", loss_fn), BATCH, **options)
    weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), weights)
    return jax.jit(lambda u, w: rule.update(u, rule.init(PARAMS), PARAMS, weights=w))(updates, weights)


def scores(rows, learning_rate, penalty):
    here = oracles.flat_one(PARAMS)
    return np.array([loss(here) - loss(here - learning_rate * x) - penalty * x @ x for x in rows])


@pytest.mark.parametrize(("learning_rate", "penalty"), [(1.0, 5e-4), (0.1, 0.0), (1.0, 30.0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_best_descent_by_brute_force(seed, learning_rate, penalty):
    updates = make_updates(seed)
    got, state = run(updates, learning_rate=learning_rate, penalty=penalty)
    there = np.array([0, 1, 3, 4, 6])
    rows = oracles.flat(updates)[there]
    best = np.argsort(-scores(rows, learning_rate, penalty), kind="stable")[: len(there) - F]
    assert np.flatnonzero(state.info.coefficients).tolist() == sorted(there[best])
    np.testing.assert_allclose(oracles.flat_one(got), oracles.mean(rows[best], WEIGHTS[there][best]), atol=1e-6)
    assert state.info.ok and state.num_nonfinite == 1


def test_a_client_whose_loss_is_not_finite_is_never_taken():
    """Whoever is absent beside it."""

    def picky(params, batch, key):
        return jnp.where(params["b"] > 1, jnp.inf, loss_fn(params, batch, key))

    updates = make_updates()
    updates["b"][[0, 1, 4]] = -5.0
    for weights in (WEIGHTS, WEIGHTS + 1e-3 * (WEIGHTS == 0)):
        got, state = run(updates, weights, loss_fn=picky)
        assert np.flatnonzero(state.info.coefficients).tolist() == [3, 6]
        rows = oracles.flat(updates)[[3, 6]]
        np.testing.assert_allclose(oracles.flat_one(got), oracles.mean(rows, WEIGHTS[[3, 6]]), atol=1e-6)


@pytest.mark.parametrize("num_present", [0, 1, 2])
def test_too_few_by_values_take_the_best_alone(num_present):
    updates = make_updates()
    there = np.array([0, 3, 6])[:num_present]
    got, state = run(updates, np.isin(np.arange(NUM_CLIENTS), there) * 1.0)
    assert not state.info.ok
    if num_present:
        rows = oracles.flat(updates)[there]
        np.testing.assert_allclose(oracles.flat_one(got), rows[np.argmax(scores(rows, 1.0, 5e-4))], rtol=1e-6)
    else:
        assert not oracles.flat_one(got).any()


def test_layers_that_clients_left_out_stay_as_they_were_sent():
    updates = make_updates()
    updates["b"][5] = 0.1
    flags = {"w": np.array([1, 1, 0, 1, 1, 1, 1.0]), "b": np.array([1, 0, 0, 1, 1, 1, 1.0])}
    updates["b"][1] = np.nan
    _, state = run(updates, flags, penalty=0.0)
    rows = np.nan_to_num(oracles.flat(updates))
    there = np.array([0, 1, 3, 4, 5, 6])
    best = there[np.argsort(-scores(rows[there], 1.0, 0.0), kind="stable")[:4]]
    assert np.flatnonzero(state.info.coefficients).tolist() == sorted(best)


def test_losses_may_be_taken_in_chunks():
    updates = make_updates()
    want, _ = run(updates)
    got, _ = run(updates, map_fn=core.cohort_map(chunk_size=2))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, want)


def test_the_loss_gets_the_key():
    """Upside down for some keys, and then others are the best."""

    def moody(params, batch, key):
        return loss_fn(params, batch, key) * jnp.where(jax.random.bernoulli(key), 1, -1)

    updates, rule = make_updates(), zeno(F, moody, BATCH)
    update = jax.jit(lambda key: rule.update(updates, rule.init(PARAMS), PARAMS, key=key)[1].info.coefficients > 0)
    assert len({tuple(update(jax.random.key(seed)).tolist()) for seed in range(8)}) == 2


def test_arguments():
    with pytest.raises(ValueError, match="f must be at least 0, got -1"):
        zeno(-1, loss_fn, BATCH)
    with pytest.raises(ValueError, match="learning_rate must be above 0, got 0"):
        zeno(1, loss_fn, BATCH, learning_rate=0)
    with pytest.raises(ValueError, match="penalty must be at least 0, got -1"):
        zeno(1, loss_fn, BATCH, penalty=-1)
    rule = zeno(1, loss_fn, BATCH)
    with pytest.raises(ValueError, match="params must be given"):
        rule.update(make_updates(), rule.init(PARAMS))
    with pytest.raises(ValueError, match="f must satisfy f < num_clients, got f = 7 and num_clients = 7"):
        zeno(7, loss_fn, BATCH).update(make_updates(), rule.init(PARAMS), PARAMS)
