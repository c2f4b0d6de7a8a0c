"""Which layers go: by number against a numpy sort, by budget against a greedy loop in Python integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cedarjax.layers import least_changed, within_budget

FEW_VALUES = st.sampled_from([0.0, 0.5, 0.5, 1.0, -1.0, np.inf, np.nan])  # ties on purpose


@given(st.sampled_from([1, 4, 9]).flatmap(lambda n: st.lists(FEW_VALUES, min_size=n, max_size=n)), st.data())
def test_least_changed_is_a_stable_sort(change, data):
    num_skipped = data.draw(st.sampled_from([0, len(change) // 2, len(change) - 1]))
    change = np.array(change, np.float32)
    wanted = np.ones(len(change), np.float32)
    wanted[np.argsort(change, kind="stable")[:num_skipped]] = 0
    got = least_changed(change, num_skipped)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, wanted)


def test_ties_skip_the_lower_index_and_nan_is_the_largest():
    np.testing.assert_array_equal(least_changed(jnp.array([0.5, 0.5, 0.5]), 1), [0, 1, 1])
    np.testing.assert_array_equal(least_changed(jnp.array([jnp.nan, jnp.inf, 1e30]), 2), [1, 0, 0])
    np.testing.assert_array_equal(least_changed(jnp.array([0.0, -0.0]), 1), [0, 1])


@pytest.mark.parametrize("num_skipped", [-1, 4, 7])
def test_num_skipped_out_of_range(num_skipped):
    message = f"num_skipped must satisfy 0 <= num_skipped < num_layers, got {num_skipped} and 4."
    with pytest.raises(ValueError, match=message):
        least_changed(jnp.ones(4), num_skipped)


def test_change_must_be_a_vector():
    with pytest.raises(ValueError, match=r"change must be \[L\].*\(2, 2\)"):
        least_changed(jnp.ones((2, 2)), 1)


def greedy(priority, layer_bytes, budget):
    key = [np.inf if np.isnan(p) else p for p in priority]
    mask, left = [0.0] * len(key), budget
    for layer in sorted(range(len(key)), key=lambda i: (-key[i], i)):
        if layer_bytes[layer] <= left:
            mask[layer], left = 1.0, left - layer_bytes[layer]
    return mask


@given(st.lists(st.tuples(FEW_VALUES, st.integers(0, 2**30)), min_size=6, max_size=6), st.integers(0, 2**31 - 1))
def test_within_budget_is_the_greedy_loop(layers, budget):
    priority, layer_bytes = np.array([p for p, _ in layers], np.float32), tuple(b for _, b in layers)
    got = within_budget(priority, layer_bytes, budget)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, greedy(priority, layer_bytes, budget))
    assert sum(b for b, m in zip(layer_bytes, got.tolist(), strict=True) if m) <= budget


def test_a_traced_budget_is_exact_to_the_byte():
    mask = jax.jit(lambda budget: within_budget(jnp.array([2.0, 1.0]), (16777217, 1), budget))
    np.testing.assert_array_equal(mask(jnp.int32(16777217)), [1, 0])
    np.testing.assert_array_equal(mask(jnp.int32(16777218)), [1, 1])
    np.testing.assert_array_equal(mask(jnp.int32(16777216)), [0, 1])


def test_masks_under_vmap():
    values = np.random.default_rng(0).uniform(size=(5, 4)).astype(np.float32)
    budgets = jnp.array([0, 10, 20, 30, 100], jnp.int32)
    got = jax.jit(jax.vmap(lambda p, b: within_budget(p, (10, 20, 30, 5), b)))(values, budgets)
    wanted = [greedy(p, (10, 20, 30, 5), b) for p, b in zip(values, budgets.tolist(), strict=True)]
    np.testing.assert_array_equal(got, wanted)
    got = jax.vmap(lambda c: least_changed(c, 2))(values)
    np.testing.assert_array_equal(got, np.stack([least_changed(c, 2) for c in values]))


def test_within_budget_rejects_bad_input():
    with pytest.raises(ValueError, match=r"priority must be \[L\] with L = len\(layer_bytes\) = 3.*\(2,\)"):
        within_budget(jnp.ones(2), (1, 2, 3), 5)
    with pytest.raises(ValueError, match=r"layer_bytes must lie within \[0, 2\^31\), got 2147483648 at 1"):
        within_budget(jnp.ones(2), (1, 2**31), 5)
    with pytest.raises(ValueError, match=r"budget must lie within \[0, 2\^31\), got -1"):
        within_budget(jnp.ones(1), (1,), -1)
