"""The count sketch against its matrix, and the bounds of the textbook."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.compress.count_sketch import count_sketch, sketch, unsketch

NUM_SEEDS = 4096


def normal(length, seed=0):
    return np.random.default_rng(seed).normal(size=length).astype(np.float32)


def matrix_of(length, num_rows, num_cols, seed):
    """`[num_rows, num_cols, length]`, the linear map, column by column."""
    table = jax.vmap(lambda row: sketch(row, num_rows=num_rows, num_cols=num_cols, seed=seed))(jnp.eye(length))
    return np.moveaxis(np.asarray(table, np.float64), 0, -1)


@pytest.mark.parametrize(("length", "num_rows", "num_cols"), [(50, 3, 7), (6, 4, 40), (1, 1, 1), (9, 2, 1)])
def test_against_its_matrix(length, num_rows, num_cols):
    matrix = matrix_of(length, num_rows, num_cols, seed=5)
    # Each number goes, with a sign, into one cell of every row.
    np.testing.assert_array_equal(np.abs(matrix).sum(axis=1), np.ones((num_rows, length)))
    np.testing.assert_array_equal(np.abs(matrix).max(axis=1), np.ones((num_rows, length)))
    x = normal(length)
    table = sketch(jnp.asarray(x), num_rows=num_rows, num_cols=num_cols, seed=5)
    np.testing.assert_allclose(table, matrix @ x, atol=1e-5)
    by_row = np.einsum("rcd,rc->rd", matrix, matrix @ x)
    np.testing.assert_allclose(unsketch(table, length, seed=5), np.median(by_row, axis=0), atol=1e-5)


def test_signs_and_cells_are_fair_and_independent():
    def where(seed):
        table = sketch(jnp.eye(1, 3)[0], num_rows=2, num_cols=5, seed=seed)
        other = sketch(jnp.eye(1, 3, k=1)[0], num_rows=2, num_cols=5, seed=seed)
        return jnp.concatenate([table, other])  # two rows of each of two numbers

    drawn = np.asarray(jax.vmap(where)(jnp.arange(NUM_SEEDS, dtype=jnp.uint32)))
    cells, signs = np.abs(drawn).argmax(axis=2), drawn.sum(axis=2)
    for place in range(4):
        counts = np.bincount(cells[:, place], minlength=5)
        assert np.abs(counts - NUM_SEEDS / 5).max() < 5 * np.sqrt(NUM_SEEDS * 0.16)
        assert np.abs(signs[:, place].sum()) < 5 * np.sqrt(NUM_SEEDS)
        for other in range(place):
            meet = np.sum(cells[:, place] == cells[:, other])
            assert np.abs(meet - NUM_SEEDS / 5) < 5 * np.sqrt(NUM_SEEDS * 0.16)
            assert np.abs(signs[:, place] @ signs[:, other]) < 5 * np.sqrt(NUM_SEEDS)


@pytest.mark.parametrize("num_rows", [1, 4, 5])
def test_unbiased_over_seeds_and_within_its_variance(num_rows):
    x = jnp.asarray(normal(40))

    def estimates(seed):
        return unsketch(sketch(x, num_rows=num_rows, num_cols=16, seed=seed), 40, seed=seed)

    got = np.asarray(jax.jit(jax.vmap(estimates))(jnp.arange(NUM_SEEDS, dtype=jnp.uint32)), np.float64)
    scores = (got.mean(axis=0) - x) / (got.std(axis=0) / np.sqrt(NUM_SEEDS))
    assert np.abs(scores).max() < 5
    if num_rows == 1:
        want = (np.sum(np.square(x)) - np.square(x)) / 16
        np.testing.assert_allclose(got.var(axis=0), want, rtol=0.25)


def test_medians_miss_as_rarely_as_the_bound_says():
    x = jnp.asarray(normal(100))
    limit = float(np.sqrt(3 / 32) * np.linalg.norm(x))
    missed = {}
    for num_rows in (1, 5, 9):

        def misses(seed, num_rows=num_rows):
            got = unsketch(sketch(x, num_rows=num_rows, num_cols=32, seed=seed), 100, seed=seed)
            return jnp.mean((jnp.abs(got - x) > limit).astype(jnp.float32))

        missed[num_rows] = float(jax.vmap(misses)(jnp.arange(256, dtype=jnp.uint32)).mean())
    # Chebyshev: 1/3 a row; a median of r rows fails if half of them do, at most as often as r coins of 1/3.
    assert missed[1] <= 1 / 3
    assert missed[5] <= 10 * (1 / 3) ** 3 and missed[9] <= missed[5] <= missed[1]


def test_linear():
    x, y = normal(300), normal(300, 1)
    compressor = count_sketch(3, 20, seed=4)
    tables = [
        compressor.compress(jnp.asarray(v), (), jax.random.key(i))[0] for i, v in enumerate((x, y, 2 * x - 3 * y))
    ]
    combined = jax.tree.map(lambda a, b: 2 * a - 3 * b, tables[0], tables[1])
    np.testing.assert_allclose(combined.payload, tables[2].payload, atol=1e-4)
    np.testing.assert_allclose(compressor.decompress(combined), compressor.decompress(tables[2]), atol=1e-4)


def test_heavy_hitters_are_recovered():
    """Numbers above `sqrt(8 / num_cols)` of the length of the rest stand out of 2,000 others."""
    num_cols, length, heavy = 200, 2000, np.array([3, 500, 999, 1500, 1998])
    x = 0.02 * normal(length)
    x[heavy] = [1.0, -2.0, 1.5, -1.0, 3.0]
    assert 1.0 > np.sqrt(8 / num_cols) * np.linalg.norm(np.delete(x, heavy))
    found = 0
    for seed in range(20):
        got = unsketch(sketch(jnp.asarray(x), num_rows=7, num_cols=num_cols, seed=seed), length, seed=seed)
        largest = np.sort(np.argsort(-np.abs(got))[:5])
        found += np.array_equal(largest, heavy)
        if np.array_equal(largest, heavy):
            np.testing.assert_allclose(got[heavy], x[heavy], atol=0.5)
    assert found >= 19


@pytest.mark.parametrize("scope", ["leaf", "model"])
def test_compressor_sends_only_the_cells(scope):
    compressor = count_sketch(5, 12, scope=scope)
    delta = {"a": jnp.asarray(normal(30)).reshape(5, 6), "b": jnp.asarray(normal(7))}
    compressed, state = jax.jit(compressor.compress)(delta, (), jax.random.key(0))
    leaves = jax.tree.leaves(compressed)
    assert state == () and {leaf.shape for leaf in leaves} == {(5, 12)}
    assert compressor.bits(compressed) == 8 * sum(np.asarray(leaf).nbytes for leaf in leaves) == 1920 * len(leaves)
    got = compressor.decompress(compressed)
    assert jax.tree.map(lambda v: (v.shape, v.dtype), got) == jax.tree.map(lambda v: (v.shape, v.dtype), delta)


def test_seed_may_be_traced_and_matters():
    x = jnp.asarray(normal(30))

    def table(seed):
        return count_sketch(2, 9, seed=seed).compress(x, (), jax.random.key(0))[0].payload

    tables = jax.jit(jax.vmap(table))(jnp.arange(2, dtype=jnp.uint32))
    np.testing.assert_allclose(tables[1], sketch(x, num_rows=2, num_cols=9, seed=1), atol=1e-6)
    assert not np.allclose(tables[0], tables[1])


def test_zeros_and_what_is_not_finite():
    compressor = count_sketch(3, 8)
    assert not compressor.decompress(compressor.compress(jnp.zeros(20), (), jax.random.key(0))[0]).any()
    assert compressor.decompress(compressor.compress(jnp.zeros(0), (), jax.random.key(0))[0]).shape == (0,)
    for value in (jnp.nan, jnp.inf):
        table = compressor.compress(jnp.ones(20).at[4].set(value), (), jax.random.key(0))[0]
        assert not np.isfinite(table.payload).all() and not np.isfinite(compressor.decompress(table)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_dtypes(dtype, x64):
    compressor, x = count_sketch(3, 4096), jnp.asarray(normal(5), dtype)
    compressed, _ = compressor.compress(x, (), jax.random.key(0))
    got = compressor.decompress(compressed)
    assert got.dtype == dtype and compressed.payload.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
    np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("settings", [{"num_rows": 0, "num_cols": 4}, {"num_rows": 4, "num_cols": 0}])
def test_refuses(settings):
    name = next(name for name, value in settings.items() if value == 0)
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        count_sketch(**settings)
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        sketch(jnp.ones(3), **settings)
    with pytest.raises(ValueError, match="scope"):
        count_sketch(3, 4, scope="row")
