import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax import core
from cedarjax.robust import foolsgold, foolsgold_weights
from tests.robust import robust_oracles as oracles

NUM_CLIENTS = 7


def credibility(histories):
    """The published algorithm, client by client."""
    n = len(histories)
    lengths = np.linalg.norm(histories, axis=1)
    cosines = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if i != j and lengths[i] > 0 and lengths[j] > 0:
                cosines[i, j] = histories[i] @ histories[j] / lengths[i] / lengths[j]
    highest = [max(cosines[i, j] for j in range(n) if j != i) for i in range(n)]
    for i in range(n):
        for j in range(n):
            if i != j and highest[j] > highest[i] and highest[j] != 0:
                cosines[i, j] *= highest[i] / highest[j]
    a = np.array([1 - max(cosines[i, j] for j in range(n) if j != i) for i in range(n)])
    a = np.clip(a, 0, 1)
    a = np.minimum(a / a.max(), 0.99)
    with np.errstate(divide="ignore"):
        return np.clip(np.log(a / (1 - a)) + 0.5, 0, 1)


def cohort(seed):
    """Clients 0 to 3 each have a direction; 4 to 6 share one, up to little noise."""
    rng = np.random.default_rng(seed)
    base = np.random.default_rng(99).normal(size=(5, 12))
    x = base[[0, 1, 2, 3, 4, 4, 4]] + np.array([0.5] * 4 + [0.05] * 3)[:, None] * rng.normal(size=(NUM_CLIENTS, 12))
    x = x.astype(np.float32)
    return {"a": x[:, :8].reshape(NUM_CLIENTS, 4, 2), "b": x[:, 8:]}


def run(rule, cohorts, weights):
    state = rule.init(jax.tree.map(lambda x: x[0], cohorts[0]))
    step = jax.jit(lambda u, s, w: rule.update(u, s, weights=w))
    for updates, w in zip(cohorts, weights, strict=True):
        out, state = step(updates, core.take_info(state)[0], jnp.asarray(w, jnp.float32))
        yield oracles.flat_one(out), state


@pytest.mark.parametrize("num_clients", [None, NUM_CLIENTS])
def test_formulas_over_three_rounds(num_clients):
    cohorts = [cohort(seed) for seed in range(3)]
    weights = np.array([1.0, 2.0, 1.0, 1.0, 3.0, 1.0, 1.0])
    history = np.zeros((NUM_CLIENTS, 12))
    for (got, state), updates in zip(
        run(foolsgold(num_clients=num_clients), cohorts, [weights] * 3), cohorts, strict=True
    ):
        x = oracles.flat(updates)
        history += x
        want = weights * credibility(history)
        np.testing.assert_allclose(state.info.coefficients, want / want.sum(), atol=1e-4)
        np.testing.assert_allclose(got, want @ x / want.sum(), atol=2e-4)
        np.testing.assert_allclose(oracles.flat(state.history), history, rtol=1e-6, atol=1e-6)
        assert state.info.ok and not np.any(state.info.coefficients[4:])


def test_an_absent_client_keeps_its_history():
    cohorts = [cohort(seed) for seed in range(3)]
    weights = np.ones((3, NUM_CLIENTS))
    weights[1, [1, 4]] = 0
    cohorts[1]["a"][1] = np.nan
    cohorts[2]["b"][0, 1] = np.inf
    *_, (got, state) = run(foolsgold(), cohorts, weights)
    x = [oracles.flat(updates) for updates in cohorts]
    history = x[0] + x[2]
    history[[0, 2, 3, 5, 6]] += x[1][[0, 2, 3, 5, 6]]
    history[0] = x[0][0] + x[1][0]
    np.testing.assert_allclose(oracles.flat(state.history), history, rtol=1e-6, atol=1e-6)
    there = np.arange(NUM_CLIENTS) != 0  # the last upload of client 0 is not finite
    want = credibility(history[there])
    np.testing.assert_allclose(state.info.coefficients[there], want / want.sum(), atol=1e-4)
    assert state.info.coefficients[0] == 0 and state.num_nonfinite == 1
    np.testing.assert_allclose(got, want @ x[2][there] / want.sum(), atol=2e-4)


@pytest.mark.parametrize("num_rounds", [1, 3])
def test_all_alike_are_all_sybils(num_rounds):
    same = {"a": np.tile(np.random.default_rng(0).normal(size=(1, 4, 2)).astype(np.float32), (NUM_CLIENTS, 1, 1))}
    same["a"] *= np.linspace(1, 2, NUM_CLIENTS, dtype=np.float32)[:, None, None]  # alike in direction
    for got, state in run(foolsgold(), [same] * num_rounds, np.ones((num_rounds, NUM_CLIENTS))):
        assert not got.any() and not state.info.ok and not np.any(state.info.coefficients)


def test_a_client_alone_nobody_and_zeros():
    ones = np.eye(NUM_CLIENTS)[2]
    ((got, state),) = run(foolsgold(), [cohort(0)], [ones])
    assert state.info.ok
    np.testing.assert_allclose(got, oracles.flat(cohort(0))[2], rtol=1e-6)
    ((got, state),) = run(foolsgold(), [cohort(0)], [0 * ones])
    assert not got.any() and not state.info.ok
    zeros = jax.tree.map(np.zeros_like, cohort(0))
    ((got, state),) = run(foolsgold(), [zeros], [np.ones(NUM_CLIENTS)])
    assert not got.any() and np.isfinite(state.info.coefficients).all()


def test_an_attacker_whose_square_overflows_leaves_no_history():
    cohorts = [cohort(0), cohort(1)]
    cohorts[0]["b"][3] = 1e30
    rounds = list(run(foolsgold(), cohorts, np.ones((2, NUM_CLIENTS))))
    assert rounds[0][1].info.nonfinite.tolist() == [i == 3 for i in range(NUM_CLIENTS)]
    assert np.abs(rounds[0][0]).max() < 10 and np.isfinite(rounds[1][0]).all()
    np.testing.assert_allclose(oracles.flat(rounds[1][1].history)[3], oracles.flat(cohorts[1])[3], rtol=1e-6)


def test_weights_of_opposed_clients():
    """Nobody is like anybody: all cosines are negative, and all are trusted."""
    x = np.array([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9]])
    got = foolsgold_weights(jnp.asarray(x @ x.T, jnp.float32), jnp.ones(3, bool))
    np.testing.assert_allclose(got, credibility(x), atol=1e-5)
    assert (got == 1).all()


def test_layers_that_clients_left_out_add_nothing_to_their_history():
    updates = cohort(0)
    flags = {"a": jnp.ones(NUM_CLIENTS), "b": jnp.ones(NUM_CLIENTS).at[1].set(0.0)}
    updates["b"][1] = np.nan
    rule = foolsgold()
    _, state = jax.jit(rule.update)(updates, rule.init(None), weights=flags)
    np.testing.assert_array_equal(state.history["b"][1], 0.0)
    x = oracles.flat({**updates, "b": np.nan_to_num(updates["b"])})
    want = credibility(x)
    np.testing.assert_allclose(state.info.coefficients, want / want.sum(), atol=1e-4)


def test_the_number_of_clients_must_stay():
    with pytest.raises(ValueError, match="num_clients must be at least 1 or None, got 0"):
        foolsgold(num_clients=0)
    rule = foolsgold(num_clients=5)
    with pytest.raises(ValueError, match="num_clients must be that of the updates, 7, got 5"):
        rule.update(cohort(0), rule.init(jax.tree.map(lambda x: x[0], cohort(0))))
    rule = foolsgold()
    _, state = rule.update({"a": jnp.ones((3, 2))}, rule.init(None))
    with pytest.raises(ValueError, match="num_clients must be that of the updates, 4, got 3"):
        rule.update({"a": jnp.ones((4, 2))}, state)


def test_half_precision_keeps_a_wide_history():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(NUM_CLIENTS, 6)), jnp.bfloat16)
    rule = foolsgold()
    out, state = jax.jit(rule.update)(x, rule.init(x[0]))
    assert out.dtype == jnp.bfloat16 and state.history.dtype == jnp.float32
