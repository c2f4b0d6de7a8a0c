"""The subset of least variance along any direction against all subsets, in numpy and float64."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.robust.smea import smea, subset_without


def steadiest(rows, here, f):
    subsets = list(itertools.combinations(here, len(here) - f))
    values = np.array([np.linalg.norm(np.cov(rows[list(s)].T, bias=True), 2) for s in subsets])
    return list(subsets[int(np.argmax(values <= values.min() * (1 + 1e-9) + 1e-12))])


def aggregate(rule, rows, weights=None, dtype=jnp.float32):
    out, state = jax.jit(rule.update)({"a": jnp.asarray(rows, dtype)}, rule.init(None), weights=weights)
    return np.asarray(out["a"], np.float64), state


def chosen(state):
    return np.flatnonzero(state.info.coefficients).tolist()


@pytest.mark.parametrize("count, f", [(4, 0), (5, 1), (6, 3), (7, 2)])
def test_subsets_come_in_the_order_of_combinations(count, f):
    ranks = jnp.arange(math.comb(count, f), dtype=jnp.int32)
    masks = jax.vmap(lambda rank: subset_without(rank, count, f))(ranks)
    assert [tuple(np.flatnonzero(m)) for m in masks] == list(itertools.combinations(range(count), count - f))


@pytest.mark.parametrize("count, f", [(3, 1), (6, 0), (7, 3), (9, 2)])
def test_against_all_subsets(count, f):
    rule = smea(f)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(count, 5))
        if seed % 3 == 1:
            rows[rng.permutation(count)[:f]] += 30
        if seed % 3 == 2:
            rows += 200
        rows = rows.astype(np.float32).astype(np.float64)
        kept = steadiest(rows, range(count), f)
        out, state = aggregate(rule, rows)
        assert chosen(state) == kept
        np.testing.assert_allclose(out, rows[kept].mean(axis=0), rtol=0, atol=2e-6 * np.abs(rows[kept]).max())


def test_absent_and_broken_clients_and_weights():
    rows = np.random.default_rng(1).normal(size=(9, 5)).astype(np.float32).astype(np.float64)
    weights = np.array([1, 2, 0, 1, 1, 3, 1, 1, 0.5])
    broken = rows.copy()
    broken[2], broken[4, 1] = np.nan, -np.inf
    kept = steadiest(rows, [0, 1, 3, 5, 6, 7, 8], 2)
    out, state = aggregate(smea(2), broken, jnp.asarray(weights, jnp.float32))
    assert chosen(state) == kept and state.info.ok and state.num_nonfinite == 1
    np.testing.assert_allclose(out, weights[kept] @ rows[kept] / weights[kept].sum(), rtol=0, atol=4e-6)


@pytest.mark.parametrize("rows", [np.ones((6, 3)), np.eye(6, 7), np.repeat([[0.0, 1], [2, 2]], 3, axis=0)])
def test_of_equal_subsets_the_first_is_taken(rows):
    _, state = aggregate(smea(2), rows)
    assert chosen(state) == steadiest(rows, range(6), 2)


def test_double_precision(x64):
    rows = np.random.default_rng(8).normal(size=(7, 6)) + 4
    kept = steadiest(rows, range(7), 2)
    np.testing.assert_allclose(aggregate(smea(2), rows, dtype=jnp.float64)[0], rows[kept].mean(axis=0), rtol=1e-13)


def test_too_few_that_are_there_get_the_median():
    rows = np.random.default_rng(6).normal(size=(6, 4)).astype(np.float32)
    out, state = aggregate(smea(2), rows, jnp.array([1.0, 1, 0, 1, 0, 1]))
    np.testing.assert_allclose(out, np.median(rows[[0, 1, 3, 5]], axis=0), rtol=1e-6)
    assert not state.info.ok


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="f must be at least 0"):
        smea(-1)
    with pytest.raises(ValueError, match="2 \\* f < num_clients, got f = 2 and num_clients = 4"):
        aggregate(smea(2), np.zeros((4, 2)))
    with pytest.raises(ValueError, match="at most 100000 subsets .* got f = 10 and num_clients = 40"):
        aggregate(smea(10), np.zeros((40, 2)))
