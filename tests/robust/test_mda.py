"""The subset of least diameter against all subsets, in numpy and float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cedarjax.robust.mda import is_exact, least_diameter, mda, nearest_around_one

SEARCH = jax.jit(least_diameter, static_argnums=2)


def narrowest(distances, here, f):
    """The first of all subsets of least diameter, and that diameter."""
    subsets = list(itertools.combinations(here, len(here) - f))
    diameters = [distances[np.ix_(s, s)].max() for s in subsets]
    return list(subsets[int(np.argmin(diameters))]), min(diameters)


def distances_between(rows):
    return np.square(rows[:, None] - rows[None]).sum(axis=-1)


def chosen(mask):
    return np.flatnonzero(mask).tolist()


@pytest.mark.parametrize("count, f", [(3, 1), (5, 2), (8, 0), (8, 3), (10, 2), (11, 5)])
@pytest.mark.parametrize("kind", ["normal", "attacked", "grid", "two points", "equal"])
def test_the_search_finds_the_first_of_all_subsets(count, f, kind):
    for seed in range(12):
        rng = np.random.default_rng(seed)
        rows = {
            "normal": lambda: rng.normal(size=(count, 3)),  # noqa: B023
            "attacked": lambda: rng.normal(size=(count, 3)) * np.where(rng.permutation(count) < f, 50, 1)[:, None],  # noqa: B023
            "grid": lambda: rng.integers(-2, 3, size=(count, 2)).astype(float),  # noqa: B023
            "two points": lambda: rng.integers(0, 2, size=(count, 1)).astype(float),  # noqa: B023
            "equal": lambda: np.ones((count, 2)),
        }[kind]()
        present = np.ones(count, bool)
        if count > 2 * f + 2 and seed % 2:
            present[rng.integers(count)] = False
        distances = distances_between(rows)
        wanted, _ = narrowest(distances, np.flatnonzero(present), f)
        got = SEARCH(jnp.asarray(distances, jnp.float32), jnp.asarray(present), f)
        assert chosen(got) == wanted


@given(st.integers(0, 2**31), st.lists(st.booleans(), min_size=9, max_size=9), st.sampled_from([0.0, 1e-3, 1.0]))
def test_the_search_on_ties_and_absent_clients(seed, absent, noise):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 3, size=(9, 2)) + noise * rng.normal(size=(9, 2))
    present = ~np.array(absent)
    if present.sum() < 7:
        present[:] = True
    distances = distances_between(rows)
    wanted, _ = narrowest(distances, np.flatnonzero(present), 3)
    got = SEARCH(jnp.asarray(distances, jnp.float32), jnp.asarray(present), 3)
    assert chosen(got) == wanted


def test_the_approximation_is_at_most_twice_as_wide():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(9, 2)) * np.where(rng.permutation(9) < 3, 20, 1)[:, None]
        present = np.ones(9, bool)
        present[seed % 9] = seed % 2 == 0
        distances = distances_between(rows)
        _, least = narrowest(np.sqrt(distances), np.flatnonzero(present), 3)
        kept = chosen(nearest_around_one(jnp.asarray(distances, jnp.float32), jnp.asarray(present), 3))
        assert len(kept) == present.sum() - 3 and present[kept].all()
        assert np.sqrt(distances[np.ix_(kept, kept)].max()) <= 2 * least * (1 + 1e-6)


def aggregate(rule, rows, weights=None, dtype=jnp.float32):
    out, state = jax.jit(rule.update)({"a": jnp.asarray(rows, dtype)}, rule.init(None), weights=weights)
    return np.asarray(out["a"], np.float64), state


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_rule_on_updates(offset):
    rng = np.random.default_rng(4)
    rows = (rng.normal(size=(10, 6)) + offset).astype(np.float32).astype(np.float64)
    rows[[3, 6]] += 5
    weights = np.array([1, 2, 0, 1, 1, 1, 4, 1, 0.5, 1])
    broken = rows.copy()
    broken[5, 2], broken[2] = np.inf, np.nan
    here = [0, 1, 3, 4, 6, 7, 8, 9]
    kept, _ = narrowest(distances_between(rows), here, 2)
    out, state = aggregate(mda(2), broken, jnp.asarray(weights, jnp.float32))
    wanted = weights[kept] @ rows[kept] / weights[kept].sum()
    np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    assert chosen(state.info.coefficients) == kept
    assert state.info.ok and state.num_nonfinite == 1


def test_double_precision(x64):
    rows = np.random.default_rng(6).normal(size=(9, 6)) + 4
    kept, _ = narrowest(distances_between(rows), range(9), 4)
    np.testing.assert_allclose(aggregate(mda(4), rows, dtype=jnp.float64)[0], rows[kept].mean(axis=0), rtol=1e-13)


def test_too_few_that_are_there_get_the_median():
    rows = np.random.default_rng(6).normal(size=(6, 4)).astype(np.float32)
    out, state = aggregate(mda(2), rows, jnp.array([1.0, 1, 0, 1, 0, 1]))
    np.testing.assert_allclose(out, np.median(rows[[0, 1, 3, 5]], axis=0), rtol=1e-6)
    assert not state.info.ok


def test_what_is_exact():
    assert is_exact(632, 2) and is_exact(20, 9) and is_exact(100, 14)
    assert not is_exact(100, 15) and not is_exact(1000, 20)


def test_a_large_cohort_is_approximated():
    rows = np.random.default_rng(0).normal(size=(64, 3))
    rows[40:] += 100
    _, state = aggregate(mda(24), rows)
    assert chosen(state.info.coefficients) == list(range(40))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="f must be at least 0"):
        mda(-1)
    with pytest.raises(TypeError, match="f must be an int"):
        mda(True)
    with pytest.raises(ValueError, match="2 \\* f < num_clients, got f = 2 and num_clients = 4"):
        aggregate(mda(2), np.zeros((4, 2)))
