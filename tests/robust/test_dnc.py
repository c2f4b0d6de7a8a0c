"""Divide and conquer against a singular value decomposition in numpy; sampled parameters; directions; ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.core.lowrank import LowRank
from cedarjax.core.mixture import Mixture
from cedarjax.robust.dnc import dnc
from cedarjax.robust.sampling import common_gram, distinct_indices, sampled_columns, uploaded_columns
from cedarjax.robust.spectral import top_eigenpair
from cedarjax.robust.ties import merge_ties

SIZES = {"a": 6, "b": 1, "c": 13}


def tree_of(rows, dtype=jnp.float32):
    a, b, c = np.split(rows, [6, 7], axis=1)
    return {"a": jnp.asarray(a.reshape(-1, 2, 3), dtype), "b": jnp.asarray(b[:, 0], dtype), "c": jnp.asarray(c, dtype)}


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in jax.tree.leaves(tree)])


def aggregate(rule, updates, weights=None, **extra):
    return jax.jit(rule.update)(updates, rule.init(None), weights=weights, **extra)


def least_aligned(rows, here, f):
    centred = rows[here] - rows[here].mean(axis=0)
    scores = np.square(centred @ np.linalg.svd(centred)[2][0])
    return {here[i] for i in np.argsort(scores, kind="stable")[: len(here) - f]}


def chosen(state):
    return set(np.flatnonzero(state.info.coefficients).tolist())


@pytest.mark.slow
@pytest.mark.parametrize("f", [0, 1, 3])
@pytest.mark.parametrize("kind", ["normal", "attacked", "offset"])
def test_all_parameters(f, kind):
    rows = np.random.default_rng(2).normal(size=(8, 20)) * np.array([4] + [1] * 19)
    rows[1:4] += {"normal": 0, "attacked": 6, "offset": 0}[kind]
    rows = (rows + 40 * (kind == "offset")).astype(np.float32).astype(np.float64)
    weights = np.array([1, 1, 2, 1, 1, 1, 5, 1.0])
    out, state = aggregate(dnc(f, 2), tree_of(rows), jnp.asarray(weights, jnp.float32))
    kept = sorted(least_aligned(rows, list(range(8)), f))
    assert sorted(chosen(state)) == kept
    wanted = weights[kept] @ rows[kept] / weights[kept].sum()
    np.testing.assert_allclose(flat(out), wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("as_mixture", [False, True])
def test_sampled_parameters_intersect(as_mixture):
    rows = np.random.default_rng(5).normal(size=(9, 20)).astype(np.float32).astype(np.float64)
    broken, key, here = rows.copy(), jax.random.key(3), [0, 1, 3, 4, 5, 6, 7]
    weights = jnp.ones(9).at[2].set(0)
    updates = tree_of(rows)
    if as_mixture:
        updates = Mixture.of(jnp.eye(9) * 2, tree_of(rows / 2))
        here = [0, 1, 3, 4, 5, 6, 7, 8]
    else:
        broken[2], broken[8, 19] = np.nan, np.inf
        updates = tree_of(broken)
    out, state = aggregate(dnc(2, 2, 7), updates, weights, key=key)
    kept = set(here)
    for i in range(2):
        columns = np.asarray(distinct_indices(jax.random.fold_in(key, i), 7, 20))
        kept &= least_aligned(rows[:, columns], here, 2)
    assert chosen(state) == kept and state.info.ok
    np.testing.assert_allclose(flat(out), rows[sorted(kept)].mean(axis=0), atol=2e-6)


def test_as_many_as_there_are_is_all_of_them():
    rows = np.random.default_rng(5).normal(size=(7, 20))
    _, sampled = aggregate(dnc(2, 1, 20), tree_of(rows))
    _, whole = aggregate(dnc(2), tree_of(rows))
    assert chosen(sampled) == chosen(whole) and len(chosen(whole)) == 5


def test_where_nobody_is_left_it_is_the_median():
    rows = np.random.default_rng(1).normal(size=(5, 20)).astype(np.float32)
    out, state = aggregate(dnc(2, 6, 2), tree_of(rows), key=jax.random.key(0))
    np.testing.assert_allclose(flat(out), np.median(rows, axis=0), rtol=1e-6)
    assert not state.info.ok and not state.info.coefficients.any()
    few = jnp.array([1.0, 0, 1, 0, 1])
    for rule in (dnc(2), dnc(2, 1, 5)):
        out, state = aggregate(rule, tree_of(rows), few, key=jax.random.key(0))
        np.testing.assert_allclose(flat(out), np.median(rows[::2], axis=0), rtol=1e-6)
        assert not state.info.ok


def test_equal_rows_drop_from_behind():
    _, state = aggregate(dnc(2), tree_of(np.zeros((5, 20))))
    assert chosen(state) == {0, 1, 2}


def test_double_precision(x64):
    rows = np.random.default_rng(8).normal(size=(7, 20)) + 3
    for rule, columns in ((dnc(2), slice(None)), (dnc(2, 1, 6), distinct_indices(jax.random.key(1), 6, 20))):
        if not isinstance(columns, slice):
            columns = np.asarray(distinct_indices(jax.random.fold_in(jax.random.key(1), 0), 6, 20))
        out, _ = aggregate(rule, tree_of(rows, jnp.float64), key=jax.random.key(1))
        kept = sorted(least_aligned(rows[:, columns], list(range(7)), 2))
        np.testing.assert_allclose(flat(out), rows[kept].mean(axis=0), rtol=1e-13)


@pytest.mark.parametrize("num_indices, length", [(1, 1), (5, 5), (3, 50), (1, 70_000), (40, 70_000), (30_000, 70_000)])
def test_indices_are_distinct_and_sorted(num_indices, length):
    drawn = np.asarray(distinct_indices(jax.random.key(7), num_indices, length))
    assert drawn.shape == (num_indices,) and drawn.min() >= 0 and drawn.max() < length
    assert (np.diff(drawn) > 0).all()


def test_indices_are_drawn_from_everywhere():
    drawn = np.asarray(distinct_indices(jax.random.key(0), 15_000, 70_000))
    counts = np.histogram(drawn, bins=7, range=(0, 70_000))[0]
    assert np.abs(counts - 15_000 / 7).max() < 5 * np.sqrt(15_000 / 7)


@pytest.mark.parametrize("indices", [[0], [6], [19], [5, 6, 7], [0, 3, 6, 8, 19], list(range(20))])
def test_columns_are_gathered_leaf_by_leaf(indices):
    rows = np.random.default_rng(0).normal(size=(4, 20)).astype(np.float32)
    got = sampled_columns(tree_of(rows), jnp.asarray(indices, jnp.int32))
    np.testing.assert_array_equal(got, rows[:, indices])
    weights = {"a": jnp.array([1.0, 0, 1, 1]), "b": jnp.array([0.0, 1, 1, 1]), "c": jnp.array([1.0, 1, 0, 2])}
    sent = np.repeat(np.stack([weights[name] for name in SIZES], axis=1), list(SIZES.values()), axis=1) > 0
    np.testing.assert_array_equal(
        uploaded_columns(tree_of(rows), weights, jnp.asarray(indices, jnp.int32)), sent[:, indices]
    )


def test_columns_of_low_rank_updates():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(3, 2, 4)).astype(np.float32), rng.normal(size=(3, 2, 5)).astype(np.float32)
    dense = np.einsum("crm,crn->cmn", left, right).reshape(3, 20)
    indices = jnp.array([0, 4, 5, 13, 19], jnp.int32)
    got = sampled_columns({"w": LowRank.of((jnp.asarray(left), jnp.asarray(right)))}, indices)
    np.testing.assert_allclose(got, dense[:, np.asarray(indices)], rtol=1e-5, atol=1e-6)


def test_distances_over_common_columns():
    rng = np.random.default_rng(1)
    rows, sent = rng.normal(size=(4, 6)) + 20, rng.random((4, 6)) < 0.7
    sent[0], sent[1] = [True] * 3 + [False] * 3, [False] * 3 + [True] * 3
    got = -2 * common_gram(jnp.asarray(np.where(sent, rows, np.nan), jnp.float32), jnp.asarray(sent))
    wanted = np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            both = sent[i] & sent[j]
            wanted[i, j] = np.square(rows[i] - rows[j])[both].sum() * 6 / both.sum() if both.any() else np.nan
    np.testing.assert_allclose(got, np.where(np.isnan(wanted), np.nanmax(wanted), wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gap", [1.0, 1e-2, 1e-4])
def test_top_eigenpair(x64, gap):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    values = np.concatenate([[1.0, 1 - gap], rng.random(10) * (1 - gap)])
    matrix = (basis * values) @ basis.T
    for dtype, tolerance in ((jnp.float64, 1e-14), (jnp.float32, 2e-6)):
        value, vector = jax.jit(top_eigenpair)(jnp.asarray(matrix * 1e12, dtype))
        np.testing.assert_allclose(value / 1e12, 1, rtol=2e-6 if dtype == jnp.float32 else 1e-13)
        vector = np.asarray(vector, np.float64)
        assert np.abs(vector * np.sign(vector @ basis[:, 0]) - basis[:, 0]).max() < tolerance / gap


def test_top_eigenpair_of_nothing():
    value, vector = top_eigenpair(jnp.zeros((3, 3)))
    assert value == 0 and not vector.any()


def test_ties_are_merged_from_the_least():
    values = np.array([2.0, 1.0, 1.0 + 1e-7, np.inf, 0.5, np.inf, 2.0 - 1e-7], np.float32)
    got = merge_ties(jnp.asarray(values), jnp.ones(7))
    np.testing.assert_array_equal(got, np.float32([2.0 - 1e-7, 1, 1, np.inf, 0.5, np.inf, 2.0 - 1e-7]))
    np.testing.assert_array_equal(merge_ties(jnp.asarray(values), jnp.zeros(7)), values)


def test_arguments_are_checked():
    for wrong in ({"num_iters": 0}, {"subsample": 0}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            dnc(1, **wrong)
    with pytest.raises(ValueError, match="f must be at least 0"):
        dnc(-1)
    rows = np.zeros((4, 20))
    with pytest.raises(ValueError, match="key must be given"):
        aggregate(dnc(1, 1, 5), tree_of(rows))
    for rule in (dnc(2), dnc(2, 1, 5)):
        with pytest.raises(ValueError, match="2 \\* f < num_clients, got f = 2 and num_clients = 4"):
            aggregate(rule, tree_of(rows), key=jax.random.key(0))
