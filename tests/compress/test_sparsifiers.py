"""Top-k and random-k against sorting, counting and their bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cedarjax import compress
from cedarjax.compress import counting

NUM_KEYS = 4096


def largest_by_sorting(v, k):
    kept = np.zeros(len(v), bool)
    kept[np.argsort(-np.abs(v), kind="stable")[:k]] = True
    return kept


def check_marks(v, got, k):
    """The same but for zeros, all of which are marked where one is."""
    want = largest_by_sorting(v, k)
    np.testing.assert_array_equal(got & (v != 0), want & (v != 0), err_msg=f"k = {k}")
    assert got.sum() >= k


def through(compressor, delta, key):
    return compressor.decompress(compressor.compress(delta, (), key)[0])


KINDS = {
    "normal": lambda rng, d: rng.normal(size=d),
    "cauchy": lambda rng, d: rng.standard_cauchy(size=d),
    "uniform": lambda rng, d: rng.uniform(size=d),
    "grid": lambda rng, d: rng.integers(-4, 5, size=d),
    "magnitudes": lambda rng, d: 10.0 ** rng.uniform(-30, 30, size=d) * rng.choice([-1, 1], size=d),
    "constant": lambda rng, d: np.full(d, 3.0),
    "two": lambda rng, d: np.where(np.arange(d) % 7 == 0, 2.0, -1.0),
    "infinite": lambda rng, d: np.where(np.arange(d) == d // 2, -np.inf, rng.normal(size=d)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 50])
def test_largest_is_that_of_a_stable_sort(kind, size):
    v = KINDS[kind](np.random.default_rng(size), size).astype(np.float32)
    mark = jax.jit(compress.largest, static_argnums=1)
    for k in {1, max(1, size // 10), size // 2 + 1, size}:
        check_marks(v, np.asarray(mark(jnp.asarray(v), k)), k)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_leads_to_the_same(kind, monkeypatch):
    monkeypatch.setattr(counting, "_LONG", 500)
    monkeypatch.setattr(counting, "_SAMPLE", 100)
    v = KINDS[kind](np.random.default_rng(5), 3001).astype(np.float32)
    for k in (1, 30, 300, 2000, 3000):
        check_marks(v, np.asarray(jax.jit(compress.largest, static_argnums=1)(v, k)), k)


@settings(max_examples=12)  # each length is compiled
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_top_k_keeps_the_largest_of_lowest_index(numbers, fraction):
    v = np.array(numbers, np.float32)
    k = min(len(v), max(1, round(fraction * len(v))))
    assert compress.num_kept(len(v), fraction) == k
    got = np.asarray(through(compress.top_k(fraction), jnp.asarray(v), jax.random.key(0)))
    np.testing.assert_array_equal(got, np.where(largest_by_sorting(v, k), v, 0))


def test_top_k_sends_k_places_in_order():
    v = jnp.asarray([0.0, -5.0, 1.0, 0.0, 5.0, 2.0])
    payload = compress.top_k(0.5).compress(v, (), jax.random.key(0))[0].payload
    assert compress.unpack_bits(payload.indices, 3, 3).tolist() == [1, 4, 5]
    assert payload.values.tolist() == [-5.0, 5.0, 2.0]
    full = compress.top_k(0.9).compress(v, (), jax.random.key(0))[0].payload  # zeros fill up
    assert full.values.shape == (5,) and set(full.values.tolist()) == {0.0, -5.0, 1.0, 5.0, 2.0}


@pytest.mark.parametrize("fraction", [0.01, 0.25, 1.0])
def test_top_k_contracts(fraction):
    v = np.random.default_rng(0).standard_t(2, size=400).astype(np.float32)
    got = np.asarray(through(compress.top_k(fraction), jnp.asarray(v), jax.random.key(0)))
    k = round(fraction * 400)
    squares = v.astype(np.float64) ** 2
    assert ((got - v).astype(np.float64) ** 2).sum() <= (1 - k / 400) * squares.sum() + 1e-9
    assert (got != 0).sum() >= k


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("scope", ["leaf", "model"])
@pytest.mark.parametrize("make", [compress.top_k, compress.random_k])
def test_values_travel_in_the_dtype_of_the_leaf(make, scope, dtype):
    rng = np.random.default_rng(1)
    shapes = {"a": (4, 5), "b": (7,), "c": (), "none": (0, 2)}
    delta = {name: jnp.asarray(rng.normal(size=s), dtype) for name, s in shapes.items()}
    compressor = make(0.3, scope=scope)
    compressed, _ = compressor.compress(delta, (), jax.random.key(0))
    nodes = [compressed] if scope == "model" else list(compressed.values())
    assert {node.payload.values.dtype for node in nodes} == {jnp.dtype(dtype)}
    got = compressor.decompress(compressed)
    for name, leaf in delta.items():
        assert got[name].shape == leaf.shape and got[name].dtype == leaf.dtype


@pytest.mark.slow
def test_wide_floats(x64):
    v = jnp.asarray([1e300, -1e-300, 1e301, 1e-301], jnp.float64)
    assert through(compress.top_k(0.5), v, jax.random.key(0)).tolist() == [1e300, 0.0, 1e301, 0.0]
    assert through(compress.random_k(1.0), v, jax.random.key(0)).dtype == jnp.float64


def test_the_short_way_gives_the_same_numbers_and_bits():
    delta = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(30, 9)), jnp.float32), "b": jnp.ones(5)}
    compressor, key = compress.top_k(0.2), jax.random.key(0)
    after, _, count = compressor.roundtrip(delta, (), key)
    compressed, _ = compressor.compress(delta, (), key)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(compressor.decompress(compressed)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(count()) == int(compressor.bits(compressed)) == 54 * (9 + 32) + 1 * (3 + 32)


@pytest.mark.slow
def test_clients_together_are_clients_alone(monkeypatch):
    monkeypatch.setattr(counting, "_LONG", 100)
    monkeypatch.setattr(counting, "_SAMPLE", 40)
    rows = jnp.asarray(np.random.default_rng(0).standard_t(2, size=(6, 300)), jnp.float32)
    rows = rows.at[2].set(1.0).at[3].set(0.0)
    keys = jax.random.split(jax.random.key(0), 6)
    for make in (compress.top_k, compress.random_k):
        mapped = jax.jit(jax.vmap(lambda v, k, make=make: through(make(0.1), v, k)))(rows, keys)
        for row, key, got in zip(rows, keys, mapped, strict=True):
            np.testing.assert_array_equal(through(make(0.1), row, key), got)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("make", [compress.top_k, compress.random_k])
def test_what_is_not_finite_stays_so(make, bad):
    v = np.random.default_rng(0).normal(size=40).astype(np.float32)
    for place in (0, 17, 39):
        spoilt = jnp.asarray(v).at[place].set(bad)
        assert not np.isfinite(through(make(0.1), spoilt, jax.random.key(0))).all()
    assert not np.isfinite(through(make(0.1), jnp.full(40, bad), jax.random.key(0))).all()


@pytest.mark.parametrize(("size", "num_places"), [(1, 1), (2, 1), (5, 2), (8, 3), (17, 16), (33, 33)])
def test_places_are_distinct_and_equally_likely(size, num_places):
    seeds = jax.random.bits(jax.random.key(0), (NUM_KEYS,))
    places = np.asarray(jax.jit(jax.vmap(lambda s: compress.random_places(s, size, num_places)))(seeds))
    assert all(len(set(row)) == num_places for row in places) and places.min() >= 0 and places.max() < size
    share = num_places / size
    hits = np.bincount(places.reshape(-1), minlength=size) / NUM_KEYS
    assert (np.abs(hits - share) <= 5 * np.sqrt(share * (1 - share) / NUM_KEYS) + 1e-9).all()
    # Every pair is as likely as any other, too: within six standard errors.
    if 1 < num_places < size:
        marked = np.zeros((NUM_KEYS, size))
        np.put_along_axis(marked, places, 1.0, axis=1)
        both = marked.T @ marked / NUM_KEYS
        want = share * (num_places - 1) / (size - 1)
        error = 6 * np.sqrt(want * (1 - want) / NUM_KEYS)
        assert np.abs(both[~np.eye(size, dtype=bool)] - want).max() <= error


def test_random_k_is_unbiased_with_its_variance():
    v = np.random.default_rng(0).normal(size=20).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), NUM_KEYS)
    compressor = compress.random_k(0.25)
    results = np.asarray(jax.jit(jax.vmap(lambda k: through(compressor, jnp.asarray(v), k)))(keys), np.float64)
    assert (np.abs(results.mean(0) - v) <= 5 * results.std(0) / np.sqrt(NUM_KEYS)).all()
    error = ((results - v) ** 2).sum(1)
    squared = (v.astype(np.float64) ** 2).sum()
    np.testing.assert_allclose(error.mean(), 3 * squared, atol=5 * error.std() / np.sqrt(NUM_KEYS))
    plain = np.asarray(jax.vmap(lambda k: through(compress.random_k(0.25, scale=False), jnp.asarray(v), k))(keys))
    np.testing.assert_allclose(plain * 4, results, rtol=1e-6)
    assert ((plain != 0).sum(1) == 5).all()


@pytest.mark.parametrize("make", [compress.top_k, compress.random_k])
@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_bad_fractions(make, fraction):
    with pytest.raises(ValueError, match=rf"fraction must lie within \(0, 1\], got {fraction}"):
        make(fraction)
