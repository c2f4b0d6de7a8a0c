import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax import privacy
from cedarjax.core import LocalUpdate, Upload
from cedarjax.privacy import accounting, banded_toeplitz, correlated_gaussian_mechanism, correlated_plan, in_turns
from tests.privacy import privacy_oracles as oracles

pytest.importorskip("jax_privacy")
pytest.importorskip("dp_accounting")

ROUNDS = 6
COLUMN = (0.8, 0.5, 0.3)
KEYS = 8192


def strategy(column, num_rounds):
    """The Toeplitz matrix written out."""
    matrix = np.zeros((num_rounds, num_rounds))
    for i in range(num_rounds):
        for j in range(max(0, i - len(column) + 1), i + 1):
            matrix[i, j] = column[i - j]
    return matrix


def run(rule, updates_of, num_rounds, key):
    """`[num_rounds, ...]` updates."""
    params = jax.tree.map(lambda x: jnp.zeros_like(x[0]), updates_of(0))

    def step(state, i):
        updates = updates_of(i)
        weights = jnp.ones(len(jax.tree.leaves(updates)[0]))
        out, state = rule.update(updates, state, params, weights=weights, key=jax.random.fold_in(key, i))
        return cj.core.take_info(state)[0], out

    return jax.lax.scan(step, rule.init(params), jnp.arange(num_rounds))


def zeros(i):
    return {"a": jnp.zeros((2, 2)), "b": jnp.zeros((2,))}


def test_the_noise_of_prefix_sums_has_the_covariance_of_the_matrix():
    """`P A^-1 A^-T P^T s^2` with `P` the prefix sums and `s = z C |column| / m`, written out in numpy."""
    rule = correlated_gaussian_mechanism(COLUMN, 1.5, 2.0, 4.0, num_rounds=ROUNDS)
    told = jax.jit(jax.vmap(lambda key: run(rule, zeros, ROUNDS, key)[1]))(jax.random.split(jax.random.key(0), KEYS))
    sums = np.cumsum(np.asarray(told["a"], np.float64), axis=1)  # [keys, rounds, 2]
    scale = 1.5 * 2.0 * np.linalg.norm(COLUMN) / 4.0
    factor = np.tri(ROUNDS) @ np.linalg.inv(strategy(COLUMN, ROUNDS)) * scale
    want = factor @ factor.T
    spread = np.sqrt((want**2 + np.outer(np.diag(want), np.diag(want))) / KEYS)  # of a sample covariance
    for number in range(2):
        got = sums[:, :, number].T @ sums[:, :, number] / KEYS
        assert (np.abs(got - want) < 5 * spread).all()
    apart = sums[:, :, 0].T @ sums[:, :, 1] / KEYS
    assert (np.abs(apart) < 5 * np.sqrt(np.outer(np.diag(want), np.diag(want)) / KEYS)).all()
    independent = scale**2 / np.linalg.norm(COLUMN) ** 2 * ROUNDS
    assert want[-1, -1] < independent  # else there would be no point in it


def test_one_band_is_the_gaussian_mechanism():
    rows = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)}
    one = run(correlated_gaussian_mechanism((1.0,), 0.7, 1.0, 2.0, num_rounds=3), lambda i: rows, 3, jax.random.key(5))
    two = run(privacy.gaussian_mechanism(0.7, 1.0, 2.0), lambda i: rows, 3, jax.random.key(5))
    np.testing.assert_allclose(one[1]["a"], two[1]["a"], rtol=1e-5, atol=1e-6)


def test_the_signal_is_the_clipped_sum():
    rows = np.random.default_rng(1).normal(size=(3, 5, 4)).astype(np.float32)
    _, told = run(
        correlated_gaussian_mechanism((0.8, 0.6), 0.0, 1.5, 2.0, num_rounds=3),
        lambda i: jnp.asarray(rows)[i],
        3,
        jax.random.key(0),
    )
    want = [oracles.clipped_rows(r, np.ones(5), 1.5).sum(axis=0) / 2.0 for r in rows]
    np.testing.assert_allclose(told, want, rtol=1e-5, atol=1e-6)


def test_what_is_told_of_the_noise_of_the_first_round():
    rule = correlated_gaussian_mechanism(COLUMN, 1.5, 2.0, 4.0, num_rounds=3)
    _, state = rule.update(jnp.zeros((1, 2)), rule.init(jnp.zeros(2)), weights=jnp.ones(1), key=jax.random.key(0))
    first = 1.5 * 2.0 * np.linalg.norm(COLUMN) / 0.8 / 4.0
    np.testing.assert_allclose(state.info.noise_std, first, rtol=1e-6)


def test_it_stops_after_its_rounds_and_keeps_dtypes():
    rule = correlated_gaussian_mechanism((0.8, 0.6), 1.0, 1.0, 1.0, num_rounds=2)
    _, told = run(rule, lambda i: jnp.ones((2, 3), jnp.bfloat16), 4, jax.random.key(0))
    assert told.dtype == jnp.bfloat16 and told[:2].any(axis=1).all() and not told[2:].any()


def test_float64(x64):
    rule = correlated_gaussian_mechanism((0.8, 0.6), 1.0, 1.0, 1.0, num_rounds=2)
    _, told = run(rule, lambda i: jnp.ones((2, 3), jnp.float64), 2, jax.random.key(0))
    assert told.dtype == jnp.float64 and jnp.isfinite(told).all()


def test_columns_of_the_library():
    """Length 1; better, in the mean squared error of prefix sums, than independent noise and than fewer bands."""
    errors = []
    for bands in (1, 2, 4):
        column = banded_toeplitz(12, bands)
        assert len(column) == bands and np.linalg.norm(column) == pytest.approx(1, abs=1e-6)
        factor = np.tri(12) @ np.linalg.inv(strategy(column, 12))
        errors.append((factor**2).sum(axis=1).mean())
    assert errors[0] == pytest.approx(6.5) and errors[0] > errors[1] > errors[2]
    closed = np.array([1, 1 / 2, 3 / 8, 5 / 16])
    np.testing.assert_allclose(banded_toeplitz(4, 4, num_steps=0), closed / np.linalg.norm(closed), rtol=1e-6)


def test_clients_take_turns():
    selector = in_turns(cj.select.bernoulli(0.5, max_selected=4), 3)
    state, seen = selector.init(10), []
    for i in range(60):
        selection, state = selector.select(state, jax.random.key(i), jnp.ones(10, bool))
        seen.append(np.asarray(selection.client_id)[np.asarray(selection.weights) > 0])
        assert (seen[-1] % 3 == i % 3).all()
    rates = np.bincount(np.concatenate(seen), minlength=10) / 20
    assert np.abs(rates - 0.5).max() < 4 * np.sqrt(0.25 / 20)


def test_a_plan_costs_as_many_rounds_as_a_group_has_turns():
    """The worst of all patterns: the sensitivity of a client in every turn of its group is `sqrt(turns)`."""
    selector = cj.select.bernoulli(1.0, max_selected=4)
    plan = correlated_plan(
        selector, num_clients=10, num_rounds=9, num_groups=3, delta=1e-3, max_norm=1.0, noise_multiplier=4.0
    )
    matrix = strategy(banded_toeplitz(9, 3), 9)
    sensitivity = max(np.linalg.norm(matrix[:, first::3].sum(axis=1)) for first in range(3))
    exact = accounting.epsilon(sampling_rate=1.0, noise_multiplier=4.0 / sensitivity, num_rounds=1, delta=1e-3)
    assert exact <= plan.epsilon * (1 + 1e-6) and plan.epsilon == pytest.approx(exact, rel=0.1)
    assert plan.expected_cohort == pytest.approx(10 / 3)


@pytest.mark.slow
def test_sampling_within_turns_is_accounted_for():
    given = {"num_clients": 100, "num_rounds": 40, "num_groups": 4, "delta": 1e-4, "max_norm": 1.0}
    plan = correlated_plan(cj.select.bernoulli(0.2, max_selected=25), noise_multiplier=2.0, **given)
    told = accounting.epsilon(sampling_rate=0.2, noise_multiplier=2.0, num_rounds=10, delta=1e-4)
    assert plan.epsilon == told and plan.expected_cohort == 5
    back = correlated_plan(cj.select.bernoulli(1.0, max_selected=25), target_epsilon=told, **given)
    assert back.noise_multiplier > 2.0 and told * (1 - 1e-3) < back.epsilon <= told


def test_a_run():
    """Constant uploads: after all rounds the noise in the sum is less than that of independent noise of one price."""

    def update(shared, state, data, key):
        return Upload(jnp.zeros_like(shared)), state, ()

    dataset = cj.data.federated_dataset(np.zeros(20, np.float32), np.arange(20))
    selector = cj.select.bernoulli(0.5, max_selected=5)
    plan = correlated_plan(
        selector, num_clients=20, num_rounds=16, num_groups=4, delta=1e-3, max_norm=1.0, noise_multiplier=1.0
    )
    algorithm = cj.federated_round(LocalUpdate(lambda p: (), update), optax.chain(plan.aggregator, optax.sgd(1.0)))
    state = cj.init_run(algorithm, dataset, jnp.zeros(2_000), selector=plan.selector)
    state, history, _ = cj.run_rounds(
        algorithm, dataset, state, jax.random.key(0), num_rounds=16, selector=plan.selector
    )
    factor = np.tri(16) @ np.linalg.inv(strategy(banded_toeplitz(16, 4), 16)) / plan.expected_cohort
    std = float(jnp.std(state.server.params))
    assert std == pytest.approx(np.linalg.norm(factor[-1]), rel=0.1)
    assert std < 0.8 * 4 / plan.expected_cohort
    present = history.client_id[history.weights > 0]
    assert len(present) and history.client_id.shape == (16, 5)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"column": (0.5, 0.8)}, "column must hold numbers .* do not increase"),
        ({"column": ()}, "column must hold numbers"),
        ({"column": (0.5, -0.1)}, "column must hold numbers"),
        ({"column": (1.0,) * 9}, "column must have at most num_rounds = 8 numbers, got 9"),
        ({"max_norm": 0.0}, "max_norm must be above 0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be at least 0"),
    ],
)
def test_errors_of_the_mechanism(changed, message):
    given = {"column": (1.0,), "noise_multiplier": 1.0, "max_norm": 1.0, "expected_cohort": 1.0, "num_rounds": 8}
    with pytest.raises(ValueError, match=message):
        correlated_gaussian_mechanism(**{**given, **changed})


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"column": (0.8, 0.5, 0.3)}, "at most num_groups = 2 numbers, got 3: a client that takes part in two rounds"),
        ({"num_groups": 0}, "num_groups must lie between 1 and both num_clients and num_rounds, got 0"),
        ({"num_groups": 11}, "num_groups must lie between 1 and both"),
        ({"selector": cj.select.uniform(2)}, "must sample each client independently"),
        ({"selector": in_turns(cj.select.bernoulli(0.5, max_selected=2), 2)}, "law is not known"),
        ({"selector": cj.select.bernoulli(0.5, max_selected=1)}, "delta must be above the chance"),
    ],
)
def test_errors_of_the_plan(changed, message):
    given = {"selector": cj.select.bernoulli(0.5, max_selected=5), "num_clients": 10, "num_rounds": 20, "num_groups": 2}
    given |= {"delta": 1e-3, "max_norm": 1.0, "noise_multiplier": 1.0}
    with pytest.raises(ValueError, match=message):
        correlated_plan(**{**given, **changed})


def test_errors_of_strategies_and_turns():
    with pytest.raises(ValueError, match="1 <= num_bands <= num_rounds, got 5 and 4"):
        banded_toeplitz(4, 5)
    with pytest.raises(ValueError, match="num_steps must be at least 0, got -1"):
        banded_toeplitz(4, 2, num_steps=-1)
    with pytest.raises(ValueError, match="num_groups must be at least 1, got 0"):
        in_turns(cj.select.uniform(2), 0)
