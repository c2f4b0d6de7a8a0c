import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax import robust
from cedarjax.robust import krum_scores, multi_krum
from tests.robust import robust_oracles as oracles

NUM_CLIENTS = 9


@pytest.fixture(autouse=True)
def fast_compilation():
    """Most of the time here is XLA's."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def compiled(f, num_selected, num_neighbors):
    rule = multi_krum(f, num_selected, num_neighbors)
    return jax.jit(lambda x, w: rule.update(x, rule.init(x[0]), weights=w))


def run(x, weights=None, f=2, num_selected=None, num_neighbors=None):
    weights = np.ones(len(x)) if weights is None else weights
    out, state = compiled(f, num_selected, num_neighbors)(
        jnp.asarray(x, jnp.float32), jnp.asarray(weights, jnp.float32)
    )
    return np.asarray(out), state.info


def draw(kind, rng):
    x = rng.normal(size=(NUM_CLIENTS, 5))
    return {
        "normal": x,
        "offset": x + 300,
        "clusters": x + 40 * rng.integers(0, 2, NUM_CLIENTS)[:, None],
        "attacked": np.where(np.arange(NUM_CLIENTS)[:, None] < 2, 1e5 * x, x),
    }[kind].astype(np.float32)


@hypothesis.given(st.integers(0, 10_000), st.sampled_from(["normal", "offset", "clusters", "attacked"]), st.booleans())
def test_selection_by_brute_force(seed, kind, weighted):
    rng = np.random.default_rng(seed)
    x = draw(kind, rng)
    there = rng.permutation(NUM_CLIENTS) < rng.integers(7, NUM_CLIENTS + 1)
    weights = there * (rng.integers(1, 4, NUM_CLIENTS) if weighted else 1.0)
    out, info = run(np.where(there[:, None], x, np.nan), weights)
    rows = np.flatnonzero(there)[oracles.multi_krum_rows(x[there].astype(np.float64), 2)]
    np.testing.assert_array_equal(np.flatnonzero(info.coefficients), np.sort(rows))
    np.testing.assert_allclose(out, oracles.mean(x[rows].astype(np.float64), weights[rows]), rtol=2e-6, atol=2e-6)
    assert info.ok


@pytest.mark.parametrize("num_neighbors", [1, 3, 5, 6, 8])
def test_scores_by_brute_force(num_neighbors):
    x = np.random.default_rng(0).normal(size=(NUM_CLIENTS, 4))
    got = krum_scores(jnp.asarray(x @ x.T, jnp.float32), jnp.ones(NUM_CLIENTS), num_neighbors)
    np.testing.assert_allclose(got, oracles.krum_scores(x, num_neighbors), rtol=1e-5)
    there = np.arange(NUM_CLIENTS) != 4
    got = krum_scores(jnp.asarray(x @ x.T, jnp.float32), jnp.asarray(there, jnp.float32), min(num_neighbors, 7))
    np.testing.assert_allclose(got[there], oracles.krum_scores(x[there], min(num_neighbors, 7)), rtol=1e-5)
    assert np.isinf(got[4])


@pytest.mark.slow
@pytest.mark.parametrize("f", [0, 1, 2, 3])
def test_krum_counts_the_paper_neighbours_unless_told(f):
    """ByzFL counts one more, which may select another."""
    rng, differ = np.random.default_rng(f), 0
    for _ in range(20):
        x = rng.normal(size=(NUM_CLIENTS, 5)).astype(np.float32)
        chosen = []
        for neighbors in (None, NUM_CLIENTS - f - 1):
            rule = compiled_krum(f, neighbors)
            out, state = rule(jnp.asarray(x))
            want = int(np.argmin(oracles.krum_scores(x.astype(np.float64), neighbors or NUM_CLIENTS - f - 2)))
            np.testing.assert_array_equal(out, x[want])
            np.testing.assert_array_equal(state.info.coefficients, np.eye(NUM_CLIENTS)[want])
            chosen.append(want)
        differ += chosen[0] != chosen[1]
    assert differ


@functools.cache
def compiled_krum(f, num_neighbors):
    rule = robust.krum(f, num_neighbors)
    return jax.jit(lambda x: rule.update(x, rule.init(x[0])))


def test_as_flower_computes_it():
    """Distances in pairs, `n - f - 2` of them for each, the best `m`, their mean weighted by examples."""
    rng = np.random.default_rng(1)
    x, examples = rng.normal(size=(NUM_CLIENTS, 5)).astype(np.float32), rng.integers(1, 50, NUM_CLIENTS)
    distances = np.array([[np.linalg.norm(a - b) ** 2 for b in x] for a in x], np.float64)
    closest = max(1, NUM_CLIENTS - 2 - 2)
    nearest = [np.argsort(row).tolist()[1 : closest + 1] for row in distances]
    scores = [distances[i][rows].sum() for i, rows in enumerate(nearest)]
    best = np.argsort(scores)[:4]
    out, info = run(x, examples, num_selected=4)
    np.testing.assert_array_equal(np.flatnonzero(info.coefficients), np.sort(best))
    np.testing.assert_allclose(out, np.average(x[best], axis=0, weights=examples[best]), rtol=2e-6)


def test_of_equal_scores_the_first():
    x = np.array([[5.0], [0.0], [1.0], [0.0], [1.0], [0.0], [1.0], [9.0], [-9.0]])
    _, info = run(x, num_selected=2)
    assert np.flatnonzero(info.coefficients).tolist() == [1, 2]
    _, info = run(np.ones((NUM_CLIENTS, 3)), num_selected=2)
    assert np.flatnonzero(info.coefficients).tolist() == [0, 1]
    weights = np.ones(NUM_CLIENTS)
    weights[0] = 0
    _, info = run(np.ones((NUM_CLIENTS, 3)), weights, num_selected=2)
    assert np.flatnonzero(info.coefficients).tolist() == [1, 2]


def test_two_attackers_at_1e7_cost_no_digits():
    """Distances between honest clients keep the digits that select, whatever the others send."""
    x = np.random.default_rng(2).normal(size=(NUM_CLIENTS, 50)).astype(np.float32) + 1
    x[[3, 6]] *= np.float32(1e7)
    for selected in (1, 3, 7):
        _, info = run(x, num_selected=selected)
        rows = oracles.multi_krum_rows(x.astype(np.float64), 2, selected)
        np.testing.assert_array_equal(np.flatnonzero(info.coefficients), np.sort(rows))


@pytest.mark.parametrize("num_present", [1, 4, 6])
def test_too_few_by_values_give_the_median(num_present):
    rng = np.random.default_rng(num_present)
    x, weights = draw("normal", rng), rng.integers(1, 4, NUM_CLIENTS) * (rng.permutation(NUM_CLIENTS) < num_present)
    out, info = run(x, weights)
    assert not info.ok and not np.any(info.coefficients)
    want = oracles.median(x[weights > 0].astype(np.float64), weights[weights > 0])
    np.testing.assert_allclose(out, want, rtol=1e-6)


def test_as_many_neighbours_as_are_present_at_least():
    """Four are wanted, four are present: one has only three others."""
    x = draw("normal", np.random.default_rng(3))
    weights = np.array([0, 1, 1, 1, 1, 0, 0, 0, 0.0])
    out, info = run(x, weights, f=0, num_neighbors=4)
    assert not info.ok
    np.testing.assert_allclose(out, np.median(x[1:5], axis=0), rtol=1e-6)
    _, info = run(x, np.array([0, 1, 1, 1, 1, 1, 0, 0, 0.0]), f=0, num_neighbors=4)
    assert info.ok


def test_arguments():
    for make in (robust.krum, multi_krum):
        with pytest.raises(ValueError, match="f must be at least 0, got -1"):
            make(-1)
        with pytest.raises(TypeError, match="f must be an int, got 1.5"):
            make(1.5)
        with pytest.raises(ValueError, match="num_neighbors must be at least 1 or None, got 0"):
            make(1, num_neighbors=0)
        message = r"f must satisfy 2 \* f \+ 2 < num_clients, got f = 2 and num_clients = 6"
        with pytest.raises(ValueError, match=message):
            make(2).update(jnp.ones((6, 2)), make(2).init(None))
        with pytest.raises(ValueError, match="and 6 < num_clients"):
            make(1, num_neighbors=6).update(jnp.ones((6, 2)), make(1).init(None))
    with pytest.raises(ValueError, match="num_selected must be at least 1 or None, got 0"):
        multi_krum(1, 0)
    with pytest.raises(ValueError, match=r"6 <= num_clients - f, got f = 1 and num_clients = 6"):
        multi_krum(1, 6).update(jnp.ones((6, 2)), multi_krum(1).init(None))


def test_gradient_goes_to_the_selected():
    x = np.random.default_rng(4).normal(size=(NUM_CLIENTS, 3)).astype(np.float32)
    rule = multi_krum(2)
    got = jax.jit(jax.grad(lambda x: rule.update(x, rule.init(x[0]))[0].sum()))(jnp.asarray(x))
    rows = oracles.multi_krum_rows(x.astype(np.float64), 2)
    want = np.where(np.isin(np.arange(NUM_CLIENTS), rows), 1 / 7, 0.0)
    np.testing.assert_allclose(got, np.repeat(want[:, None], 3, axis=1), atol=1e-6)


def test_double_precision(x64):
    x = 1e6 + np.random.default_rng(5).normal(size=(NUM_CLIENTS, 4))
    rule = multi_krum(2, 3)
    out, _ = jax.jit(rule.update)(jnp.asarray(x), rule.init(x[0]))
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, oracles.multi_krum(x, np.ones(NUM_CLIENTS), 2, 3), rtol=1e-14)


def test_half_precision():
    x = jnp.asarray(np.random.default_rng(6).normal(size=(NUM_CLIENTS, 40)), jnp.bfloat16)
    rule = robust.krum(2)
    out, _ = jax.jit(rule.update)(x, rule.init(x[0]))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, x[np.argmin(oracles.krum_scores(np.asarray(x, np.float64), 5))])
