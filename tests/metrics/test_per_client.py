import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cedarjax.metrics import fairness

described = jax.jit(fairness, static_argnames="higher_is_better")


def oracle(values, higher_is_better):
    values = np.sort(np.asarray(values, np.float64))
    worst = values[: int(np.ceil(len(values) / 10))] if higher_is_better else values[-int(np.ceil(len(values) / 10)) :]
    return values.mean(), values.std(), worst.mean(), values[0], np.median(values), values[-1], len(values)


@given(seed=st.integers(0, 10_000), num_present=st.integers(1, 31), higher_is_better=st.booleans())
def test_agrees_with_numpy(seed, num_present, higher_is_better):
    rng = np.random.default_rng(seed)
    values = np.float32(rng.normal(size=31))
    mask = rng.permutation(31) < num_present
    told = described(np.where(mask, values, np.nan), mask, higher_is_better=higher_is_better)
    np.testing.assert_allclose(told, oracle(values[mask], higher_is_better), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("num_clients", "num_worst"), [(1, 1), (10, 1), (11, 2), (20, 2), (21, 3)])
def test_the_worst_tenth_is_rounded_up(num_clients, num_worst):
    values = jnp.arange(num_clients, dtype=jnp.float32)
    low, high = (fairness(values, higher_is_better=higher).worst_decile for higher in (True, False))
    assert float(low) == np.arange(num_worst).mean()
    assert float(high) == np.arange(num_clients - num_worst, num_clients).mean()


def test_weights_only_tell_who_is_present():
    values, present = jnp.array([1.0, 2.0, 6.0]), jnp.array([True, True, False])
    np.testing.assert_array_equal(fairness(values, jnp.array([5.0, 0.1, 0.0])), fairness(values, present))


def test_nobody_scores_zero():
    told = described(jnp.full(4, jnp.nan), jnp.zeros(4, bool))
    assert [float(value) for value in told] == [0.0] * 7


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_a_diverged_client_cannot_hide(higher_is_better):
    told = described(jnp.array([0.5, jnp.nan, 0.7]), jnp.ones(3, bool), higher_is_better=higher_is_better)
    assert np.isnan(told[:-1]).all() and int(told.num_clients) == 3


def test_an_infinite_loss_is_the_worst():
    told = fairness(jnp.array([0.5, jnp.inf, 0.7]), higher_is_better=False)
    assert told.worst_decile == told.max == jnp.inf
    assert float(told.median) == pytest.approx(0.7) and float(told.min) == 0.5


def test_dtypes_and_a_scan_over_rounds():
    values = jnp.ones((5, 4), jnp.bfloat16)
    told = jax.lax.scan(lambda carry, row: (carry, fairness(row)), None, values)[1]
    assert told.num_clients.dtype == jnp.int32
    assert all(value.dtype == jnp.float32 and value.shape == (5,) for value in told[:-1])


@pytest.mark.parametrize(("values", "weights"), [((4, 1), None), ((4,), (4, 1)), ((4,), (5,))])
def test_bad_shapes(values, weights):
    with pytest.raises(ValueError, match="must"):
        fairness(jnp.ones(values), None if weights is None else jnp.ones(weights))
