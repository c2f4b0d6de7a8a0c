import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.robust.quantiles import fold_rows, from_sortable, sortable, weighted_quantiles

NUM_ROWS, WIDTH = 13, 24
LARGEST = float(np.finfo(np.float32).max)
DENORMAL = float(np.finfo(np.float32).smallest_subnormal)


@functools.partial(jax.jit, static_argnums=3)
def quantiles(x, masses, targets, num_targets):
    return [from_sortable(k) for k in weighted_quantiles(sortable(x), masses, [targets[i] for i in range(num_targets)])]


def bits(x):
    """Integers that tell apart what `==` does not: -0.0 from 0.0."""
    return np.asarray(x, np.float32).view(np.int32)


def draw(kind, rng, shape):
    normal = rng.normal(size=shape)
    return {
        "normal": normal,
        "ties": rng.integers(-2, 3, size=shape),
        "equal": np.full(shape, 0.3),
        "zeros": rng.choice([-0.0, 0.0], size=shape),
        "huge": rng.choice([-1e38, 1e38, LARGEST, -LARGEST, 1.0], size=shape) * rng.uniform(0.5, 1, size=shape),
        "tiny": normal * 1e-37,
        "denormal": rng.integers(-9, 10, size=shape) * DENORMAL,
        "scales": normal * 10.0 ** rng.integers(-30, 30, size=shape),
        "far out": np.where(rng.random(shape) < 0.3, 1e30 * normal, 1 + 1e-6 * normal),
        "two values": rng.choice([1.0, 1.0 + 2**-23], size=shape),
        "infinite": rng.choice([-np.inf, np.inf, -1.0, 2.0], size=shape),
    }[kind].astype(np.float32)


KINDS = "normal ties equal zeros huge tiny denormal scales infinite".split() + ["far out", "two values"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_order_statistic_is_that_of_a_sort(kind):
    rng = np.random.default_rng(0)
    x = draw(kind, rng, (NUM_ROWS, WIDTH))
    # np.sort takes -0.0 for 0.0; ordered by their keys they are told apart.
    want = np.sort(x, axis=0) if kind != "zeros" else np.asarray(from_sortable(np.sort(sortable(x), axis=0)))
    got = quantiles(x, jnp.ones(NUM_ROWS), jnp.arange(1.0, NUM_ROWS + 1), NUM_ROWS)
    np.testing.assert_array_equal(
        bits(got) if kind == "zeros" else np.asarray(got), bits(want) if kind == "zeros" else want
    )


@hypothesis.given(st.integers(0, 10_000), st.sampled_from(KINDS), st.integers(1, NUM_ROWS))
def test_rows_without_mass_are_not_read(seed, kind, num_present):
    rng = np.random.default_rng(seed)
    x = draw(kind, rng, (NUM_ROWS, WIDTH))
    there = rng.permutation(NUM_ROWS) < num_present
    want = np.sort(x[there], axis=0)
    x[~there] = rng.choice(np.array([np.nan, np.inf, -np.inf, 0.0], np.float32), size=(NUM_ROWS - num_present, WIDTH))
    targets = np.minimum(np.arange(1, NUM_ROWS + 1), num_present).astype(np.float32)
    got = np.stack(quantiles(x, there.astype(np.float32), targets, NUM_ROWS))
    np.testing.assert_array_equal(got, want[targets.astype(int) - 1])


@hypothesis.given(st.integers(0, 10_000), st.sampled_from(["normal", "ties", "scales", "huge"]))
def test_masses_are_counted_along_the_sorted_column(seed, kind):
    rng = np.random.default_rng(seed)
    x = draw(kind, rng, (NUM_ROWS, WIDTH))
    masses = rng.integers(0, 5, NUM_ROWS).astype(np.float32)
    masses[rng.integers(NUM_ROWS)] = 3
    targets = np.concatenate([rng.integers(1, masses.sum() + 1, NUM_ROWS - 2), [1, masses.sum()]]).astype(np.float32)
    x[masses == 0] = np.nan
    got = np.stack(quantiles(x, masses, targets, NUM_ROWS))
    for column, found in zip(x.T, got.T, strict=True):
        repeated = np.sort(np.repeat(column, masses.astype(int)))
        np.testing.assert_array_equal(found, repeated[targets.astype(int) - 1])


def test_fractions_of_mass():
    x = jnp.array([[3.0], [1.0], [2.0], [9.0]])
    masses, targets = jnp.array([0.2, 0.5, 0.3, 0.0]), jnp.array([0.4, 0.6, 0.9])
    assert [float(q[0]) for q in quantiles(x, masses, targets, 3)] == [1.0, 2.0, 3.0]


def test_nobody_is_there_and_the_search_ends():
    assert np.shape(quantiles(jnp.full((NUM_ROWS, WIDTH), jnp.nan), jnp.zeros(NUM_ROWS), jnp.ones(1), 1)) == (1, WIDTH)


def test_keys_are_ordered_as_numbers_and_come_back():
    x = np.array([-np.inf, -LARGEST, -1.0, -DENORMAL, -0.0, 0.0, DENORMAL, 1.0, LARGEST, np.inf], np.float32)
    keys = np.asarray(sortable(jnp.asarray(x)))
    assert keys.dtype == np.int32 and (np.diff(keys.astype(np.int64)) > 0).all()
    np.testing.assert_array_equal(bits(from_sortable(jnp.asarray(keys))), bits(x))


def test_wide_numbers(x64):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 7)) * 10.0 ** rng.integers(-200, 200, size=(9, 7))
    x[:, 0] = 1 + np.arange(9) * 2.0**-52
    keys = sortable(jnp.asarray(x))
    assert keys.dtype == jnp.int64
    for rank in (1, 5, 9):
        (got,) = weighted_quantiles(keys, jnp.ones(9), [jnp.asarray(float(rank))])
        np.testing.assert_array_equal(from_sortable(got), np.sort(x, axis=0)[rank - 1])


def test_all_reductions_at_once_are_those_row_by_row(monkeypatch):
    """How accelerators take a pass, on a CPU."""
    monkeypatch.setattr("cedarjax.robust.quantiles.on_cpu", lambda: False)
    rng = np.random.default_rng(2)
    for kind in ("normal", "ties", "scales"):
        x = draw(kind, rng, (NUM_ROWS, WIDTH))
        keys = jax.jit(lambda x: weighted_quantiles(sortable(x), jnp.ones(NUM_ROWS), [jnp.array(1.0), jnp.array(7.0)]))(
            x
        )
        np.testing.assert_array_equal(np.stack([from_sortable(k) for k in keys]), np.sort(x, axis=0)[[0, 6]])


@pytest.mark.parametrize("num_rows", [1, 4, 5, 11])
def test_rows_are_folded_in_their_order(num_rows):
    def add(total, row, factor):
        return (total[0] * 2 + row * factor,)

    x = jnp.arange(float(2 * num_rows)).reshape(num_rows, 2)
    factors = jnp.arange(1.0, num_rows + 1)
    want = np.zeros(2)
    for row, factor in zip(np.asarray(x), np.asarray(factors), strict=True):
        want = want * 2 + row * factor
    (got,) = fold_rows(add, (jnp.zeros(2),), x, factors)
    np.testing.assert_array_equal(got, want)


def test_batches_of_columns_search_side_by_side():
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(3, NUM_ROWS, 5)), jnp.float32)
    masses = jnp.asarray(rng.random((3, NUM_ROWS)) < 0.6, jnp.float32).at[:, 0].set(1.0)

    def middle(x, masses):
        return from_sortable(weighted_quantiles(sortable(x), masses, [jnp.ceil(masses.sum() / 2)])[0])

    for got, rows, there in zip(jax.jit(jax.vmap(middle))(x, masses), x, masses > 0, strict=True):
        present = np.sort(np.asarray(rows)[np.asarray(there)], axis=0)
        np.testing.assert_array_equal(got, present[-(-len(present) // 2) - 1])
