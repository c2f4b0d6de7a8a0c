"""Quantisers against their formulas in float64, and against their bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax import compress

NUM_KEYS = 4096
TINY = float(jnp.finfo(jnp.float32).tiny)

UNBIASED = {
    "uniform_1": lambda: compress.uniform_quantize(1),
    "uniform_3": lambda: compress.uniform_quantize(3),
    "uniform_chunks": lambda: compress.uniform_quantize(2, chunk_size=5),
    "qsgd_1": lambda: compress.qsgd(1),
    "qsgd_4": lambda: compress.qsgd(4),
    "terngrad": lambda: compress.terngrad(),
}
ALL = UNBIASED | {
    "uniform_16": lambda: compress.uniform_quantize(16),
    "terngrad_clipped": lambda: compress.terngrad(clip=2.5),
    "sign": lambda: compress.sign(),
}


def vector(size=17):
    return np.random.default_rng(0).standard_t(3, size=size).astype(np.float32)


def through(compressor, delta, key):
    return compressor.decompress(compressor.compress(delta, (), key)[0])


def many(compressor, delta, num_keys=NUM_KEYS):
    keys = jax.random.split(jax.random.key(1), num_keys)
    return np.asarray(jax.jit(jax.vmap(lambda k: through(compressor, delta, k)))(keys), np.float64)


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased(name):
    v = vector()
    results = many(UNBIASED[name](), jnp.asarray(v))
    # Five standard errors for each of 17 means: a false alarm once in 100,000 times.
    bound = 5 * results.std(0) / np.sqrt(NUM_KEYS) + 1e-6 * np.abs(v).max()
    assert (np.abs(results.mean(0) - v) <= bound).all()
    assert (results.std(0) > 0).sum() >= 8  # else the test would say nothing


@pytest.mark.parametrize("num_bits", [1, 2, 7, 16])
def test_uniform_levels_are_neighbours(num_bits):
    v = vector(100)
    low, high, steps = float(v.min()), float(v.max()), 2**num_bits - 1
    got = np.asarray(through(compress.uniform_quantize(num_bits), jnp.asarray(v), jax.random.key(3)), np.float64)
    level = (got - low) / (high - low) * steps
    np.testing.assert_allclose(level, np.round(level), atol=2e-6 * steps)
    assert (np.abs(got - v) <= (high - low) / steps * (1 + 1e-5) + 1e-6).all()
    assert got.min() >= low and got.max() <= high


def test_uniform_variance_is_that_of_a_coin():
    v = vector()
    results = many(compress.uniform_quantize(2), jnp.asarray(v))
    step = (v.max() - v.min()) / 3
    share = (v.astype(np.float64) - v.min()) / step % 1
    want = step**2 * share * (1 - share)
    np.testing.assert_allclose(results.var(0), want, atol=6 * step**2 / 4 / np.sqrt(NUM_KEYS))


def test_chunks_have_ranges_of_their_own():
    v = np.concatenate([np.linspace(0, 1, 4), np.linspace(100, 101, 4), [7.0, 7.0]]).astype(np.float32)
    got = np.asarray(through(compress.uniform_quantize(1, chunk_size=4), jnp.asarray(v), jax.random.key(0)))
    assert set(got[:4]) <= {0.0, 1.0} and set(got[4:8]) <= {100.0, 101.0} and set(got[8:]) == {7.0}


@pytest.mark.parametrize("num_levels", [1, 2, 16])
def test_qsgd_variance_stays_below_its_bound(num_levels):
    v = vector(64)
    results = many(compress.qsgd(num_levels), jnp.asarray(v))
    squared = float((v.astype(np.float64) ** 2).sum())
    error = ((results - v) ** 2).sum(1)
    bound = min(64 / num_levels**2, 8 / num_levels) * squared
    assert error.mean() <= bound
    t = num_levels * np.abs(v.astype(np.float64)) / np.sqrt(squared)
    share = t - np.floor(t)
    want = squared / num_levels**2 * (share * (1 - share)).sum()  # exact
    np.testing.assert_allclose(error.mean(), want, atol=5 * error.std() / np.sqrt(NUM_KEYS))


def test_qsgd_levels_are_multiples_of_the_norm():
    v = vector(50)
    got = np.asarray(through(compress.qsgd(8), jnp.asarray(v), jax.random.key(0)), np.float64)
    level = got / (np.sqrt((v.astype(np.float64) ** 2).sum()) / 8)
    np.testing.assert_allclose(level, np.round(level), atol=1e-5)
    assert (got * v >= 0).all()


def test_terngrad_frequencies():
    v = vector()
    results = many(compress.terngrad(), jnp.asarray(v))
    top = np.abs(v).max()
    assert set(np.unique(np.abs(results))) == {0.0, float(top)}
    share = np.abs(v) / top
    hits = (results != 0).mean(0)
    assert (np.abs(hits - share) <= 5 * np.sqrt(share * (1 - share) / NUM_KEYS) + 1e-6).all()


def test_terngrad_clips_at_deviations():
    v = np.zeros(100, np.float32)
    v[0] = 50.0
    v[1:] = 0.1 * np.arange(99)
    results = many(compress.terngrad(clip=2.5), jnp.asarray(v), 64)
    np.testing.assert_allclose(np.abs(results).max(), 2.5 * v.astype(np.float64).std(), rtol=1e-5)


def test_sign_is_contractive_to_the_letter():
    v = np.append(vector(33), [0.0, -0.0]).astype(np.float32)
    got = np.asarray(through(compress.sign(), jnp.asarray(v), jax.random.key(0)), np.float64)
    v = v.astype(np.float64)
    np.testing.assert_allclose(got, np.where(v < 0, -1, 1) * np.abs(v).mean(), rtol=1e-6)
    want = (v**2).sum() - np.abs(v).sum() ** 2 / len(v)
    np.testing.assert_allclose(((got - v) ** 2).sum(), want, rtol=1e-5)


def tree():
    rng = np.random.default_rng(2)
    shapes = {"matrix": (4, 9), "vector": (3,), "scalar": (), "empty": (0, 4)}
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


def check_as_it_was(delta, got):
    assert jax.tree.structure(got) == jax.tree.structure(delta)
    for a, b in zip(jax.tree.leaves(delta), jax.tree.leaves(got), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert np.isfinite(np.asarray(b, np.float64)).all()


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["leaf", "model"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("name", ["uniform_3", "uniform_chunks", "qsgd_4", "terngrad", "sign"])
def test_shapes_and_dtypes_come_back(name, dtype, scope):
    makers = {
        "uniform_3": lambda: compress.uniform_quantize(3, scope=scope),
        "uniform_chunks": lambda: compress.uniform_quantize(3, chunk_size=5, scope=scope),
        "qsgd_4": lambda: compress.qsgd(4, scope=scope),
        "terngrad": lambda: compress.terngrad(scope=scope),
        "sign": lambda: compress.sign(scope=scope),
    }
    delta = jax.tree.map(lambda x: x.astype(dtype), tree())
    check_as_it_was(delta, jax.jit(lambda d: through(makers[name](), d, jax.random.key(0)))(delta))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_wide_floats_come_back_wide(name, x64):
    v = jnp.asarray(np.random.default_rng(0).normal(size=50) * 1e150, jnp.float64)
    got = through(ALL[name](), v, jax.random.key(0))
    assert got.dtype == jnp.float64 and bool(jnp.isfinite(got).all())
    if name == "uniform_16":
        assert float(jnp.abs(got - v).max()) <= float(v.max() - v.min()) / (2**16 - 1) * (1 + 1e-9)


@pytest.mark.parametrize("name", ALL)
def test_the_short_way_gives_the_same_numbers_and_bits(name):
    compressor = ALL[name]()
    delta, key = tree() | {"long": jnp.asarray(vector(700))}, jax.random.key(5)
    after, state, count = jax.jit(
        lambda d, k: (*compressor.roundtrip(d, (), k)[:2], compressor.roundtrip(d, (), k)[2]())
    )(delta, key)
    compressed = jax.jit(compressor.compress)(delta, (), key)[0]
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(jax.jit(compressor.decompress)(compressed)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert state == () and int(count) == int(compressor.bits(compressed))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_jit_vmap_and_keys(name):
    compressor = ALL[name]()
    rows = jnp.asarray(np.random.default_rng(4).normal(size=(5, 40)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 5)
    alone = np.stack([through(compressor, v, k) for v, k in zip(rows, keys, strict=True)])
    jitted = np.stack([jax.jit(lambda v, k: through(compressor, v, k))(v, k) for v, k in zip(rows, keys, strict=True)])
    mapped = jax.jit(jax.vmap(lambda v, k: through(compressor, v, k)))(rows, keys)
    np.testing.assert_allclose(alone, jitted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(alone, mapped, rtol=1e-6, atol=1e-6)
    if name != "sign":
        again = through(compressor, rows[0], keys[1])
        assert not np.array_equal(again, alone[0])


@pytest.mark.parametrize("value", [0.0, 3.0, -2.5, 1e38, -3.4e38, 1e-30])
@pytest.mark.parametrize("name", ["uniform_1", "uniform_3", "uniform_16", "uniform_chunks", "terngrad", "sign"])
def test_equal_numbers_arrive_as_they_are(name, value):
    v = np.full(12, value, np.float32)
    got = np.asarray(through(ALL[name](), jnp.asarray(v), jax.random.key(0)))
    np.testing.assert_allclose(got, v, rtol=1e-6, atol=24 * TINY if name == "sign" else 0)


@pytest.mark.parametrize("name", ALL)
def test_zeros_arrive_as_zeros(name):
    assert not np.asarray(through(ALL[name](), jnp.zeros(9), jax.random.key(0))).any()


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e37, 3e38])
@pytest.mark.parametrize("name", ALL)
def test_huge_and_tiny_numbers(name, scale):
    unit = np.random.default_rng(3).uniform(-1, 1, size=40).astype(np.float32)
    unit[:2] = [-1, 1]
    compressor = ALL[name]()
    if name.startswith("qsgd") and not 1e-12 < scale < 1e18:  # squares are no floats
        got = np.asarray(through(compressor, jnp.asarray(unit * np.float32(scale)), jax.random.key(2)))
        assert not np.isfinite(got).any() if scale > 1 else not got.any()
        return
    want = np.asarray(through(compressor, jnp.asarray(unit), jax.random.key(2)), np.float64) * scale
    got = np.asarray(through(compressor, jnp.asarray(unit * np.float32(scale)), jax.random.key(2)), np.float64)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ALL)
def test_what_is_not_finite_stays_so(name, bad):
    v = vector(20)
    v[3] = bad
    compressor = ALL[name]()
    assert not np.isfinite(through(compressor, jnp.asarray(v), jax.random.key(0))).all()
    assert not np.isfinite(compressor.roundtrip(jnp.asarray(v), (), jax.random.key(0))[0]).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compress.uniform_quantize(0), r"num_bits must lie within \[1, 16\], got 0"),
        (lambda: compress.uniform_quantize(17), r"num_bits must lie within \[1, 16\], got 17"),
        (lambda: compress.uniform_quantize(4, chunk_size=0), "chunk_size must be at least 1, got 0"),
        (lambda: compress.qsgd(0), r"num_levels must lie within \[1, 32768\], got 0"),
        (lambda: compress.terngrad(clip=0.0), "clip must be above 0, got 0.0"),
        (lambda: compress.sign(scope="layer"), "scope must be one of"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_integers_are_refused():
    with pytest.raises(TypeError, match="delta must hold floats, got int32 for 'n'"):
        compress.sign(scope="model").compress({"n": jnp.arange(3)}, (), jax.random.key(0))
