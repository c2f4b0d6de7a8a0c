"""Quantisers of rotated vectors: DRIVE, EDEN and uniform levels against numpy and the papers' numbers."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

from cedarjax.compress.drive import drive, sign_code
from cedarjax.compress.eden import eden, normal_code
from cedarjax.compress.hadamard import rotate, rotate_back
from cedarjax.compress.lloyd_max import normal_codebook
from cedarjax.compress.packing import unpack_bits
from cedarjax.compress.rotated import RotatedPayload, block_shape, rotated_quantize, uniform_code

NUM_KEYS = 4096

COMPRESSORS = {
    "uniform_2": functools.partial(rotated_quantize, 2),
    "uniform_5": functools.partial(rotated_quantize, 5),
    "drive": drive,
    "drive_min_mse": functools.partial(drive, scaling="min_mse"),
    "eden_1": functools.partial(eden, 1),
    "eden_2": functools.partial(eden, 2),
    "eden_3": functools.partial(eden, 3),
    "eden_7": functools.partial(eden, 7),
}


def normal(length, seed=0):
    return np.random.default_rng(seed).normal(size=length).astype(np.float32)


def heavy(length, seed=0):
    return np.random.default_rng(seed).standard_t(2, size=length).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def restored(compressor, x, keys):
    return jax.vmap(lambda key: compressor.decompress(compressor.compress(x, (), key)[0]))(keys)


def estimates(compressor, x, num_keys=NUM_KEYS):
    return np.asarray(restored(compressor, jnp.asarray(x), jax.random.split(jax.random.key(1), num_keys)), np.float64)


def nmse(compressor, x, num_keys):
    return np.mean(np.sum((estimates(compressor, x, num_keys) - x) ** 2, axis=1)) / np.sum(x.astype(np.float64) ** 2)


# The codebook


def lloyd(num_bits):
    """Levels by a root finder, cell by cell, with scipy's integrals."""
    half = 2 ** (num_bits - 1)

    def gap(levels):
        bounds = np.concatenate([[0], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        mass = np.diff(stats.norm.cdf(bounds))
        return levels - -np.diff(stats.norm.pdf(bounds)) / mass

    return optimize.fsolve(gap, np.linspace(0.1, 2.5, half), xtol=1e-13)


@pytest.mark.parametrize("num_bits", [1, 2, 3, 4])
def test_codebook_solves_its_definition(num_bits):
    np.testing.assert_allclose(normal_codebook(num_bits), lloyd(num_bits), rtol=1e-9)


@pytest.mark.parametrize(
    ("num_bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009501), (5, 0.002505)]
)
def test_codebook_leaves_the_published_distortion(num_bits, distortion):
    levels = np.array(normal_codebook(num_bits))
    bounds = np.concatenate([[0], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    mass = np.diff(stats.norm.cdf(bounds))
    np.testing.assert_allclose(1 - 2 * np.sum(mass * levels**2), distortion, rtol=2e-3)


@pytest.mark.parametrize("num_bits", range(1, 9))
def test_codebook_increases_and_each_level_is_the_mean_of_its_cell(num_bits):
    levels = np.array(normal_codebook(num_bits))
    bounds = np.concatenate([[0], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    means = [stats.truncnorm.mean(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    assert len(levels) == 2 ** (num_bits - 1) and (np.diff(levels) > 0).all()
    np.testing.assert_allclose(levels, means, rtol=1e-9)


# The codes, against numpy


def test_drive_code_against_its_formula():
    y = normal((3, 64)).astype(np.float64)
    for scaling, want in (
        ("unbiased", np.sum(y**2, axis=1) / np.sum(np.abs(y), axis=1)),
        ("min_mse", np.mean(np.abs(y), axis=1)),
    ):
        codes, scales = sign_code(scaling).quantise(jnp.asarray(y, jnp.float32), jax.random.key(0))
        np.testing.assert_array_equal(codes, y < 0)
        np.testing.assert_allclose(scales[:, 0], want, rtol=1e-6)
        got = sign_code(scaling).dequantise(codes, scales)
        np.testing.assert_allclose(got, np.sign(y) * want[:, None], rtol=1e-6)


@pytest.mark.parametrize("num_bits", [1, 2, 4, 5, 8])
def test_eden_code_against_its_formula(num_bits):
    y = normal((3, 128)).astype(np.float64)
    book = np.array(normal_codebook(num_bits))
    book = np.concatenate([-book[::-1], book])
    rms = np.sqrt(np.mean(y**2, axis=1, keepdims=True))
    nearest = book[np.argmin(np.abs((y / rms)[:, :, None] - book), axis=2)]
    for scaling, scale in (
        ("unbiased", np.sum(y**2, axis=1) / np.sum(y * nearest, axis=1)),
        ("min_mse", np.sum(y * nearest, axis=1) / np.sum(nearest**2, axis=1)),
    ):
        code = normal_code(num_bits, scaling)
        codes, scales = code.quantise(jnp.asarray(y, jnp.float32), jax.random.key(0))
        assert codes.dtype == jnp.uint32 and int(codes.max()) < 2**num_bits
        np.testing.assert_allclose(scales[:, 0], scale, rtol=1e-5)
        np.testing.assert_allclose(code.dequantise(codes, scales), nearest * scale[:, None], rtol=1e-5)


def test_uniform_code_against_its_formula():
    y = normal((4, 64)).astype(np.float64)
    code = uniform_code(3)
    codes, scales = code.quantise(jnp.asarray(y, jnp.float32), jax.random.key(0))
    low, high = y.min(axis=1, keepdims=True), y.max(axis=1, keepdims=True)
    np.testing.assert_allclose(scales, np.concatenate([low, high], axis=1), rtol=1e-6)
    places = (y - low) / (high - low) * 7
    assert (np.abs(np.asarray(codes) - places) < 1 + 1e-4).all() and int(codes.max()) == 7
    np.testing.assert_allclose(code.dequantise(codes, scales), low + np.asarray(codes) * (high - low) / 7, atol=1e-5)


@pytest.mark.parametrize("scaling", ["unbiased", "min_mse"])
def test_eden_of_one_bit_is_drive(scaling):
    one, other = (estimates(c, normal(500), 2) for c in (drive(scaling=scaling), eden(1, scaling=scaling)))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_drive_is_the_rotated_signs_rotated_back():
    x = normal(200)
    compressor = drive(block_size=256, num_rotations=1)
    compressed, _ = compressor.compress(jnp.asarray(x), (), jax.random.key(0))
    padded = np.concatenate([x, np.zeros(56, np.float32)])
    y = np.asarray(rotate(jnp.asarray(padded)[None], compressed.payload.seed), np.float64)
    signs = np.sign(y) * np.sum(y**2) / np.sum(np.abs(y))
    want = rotate_back(jnp.asarray(signs, jnp.float32), compressed.payload.seed)[0, :200]
    np.testing.assert_allclose(compressor.decompress(compressed), want, atol=1e-5)


# Bias and error


@pytest.mark.parametrize("name", ["uniform_2", "drive", "eden_2", "eden_3"])
@pytest.mark.parametrize("draw", [normal, heavy])
def test_unbiased(name, draw):
    x = draw(600)
    got = estimates(COMPRESSORS[name](), x)
    scores = (got.mean(axis=0) - x) / (got.std(axis=0) / np.sqrt(NUM_KEYS))
    assert np.abs(scores).max() < 5.5  # 600 means; a false alarm in one of 50,000 runs
    assert np.sqrt(np.mean(scores**2)) < 1.15


def test_one_rotation_is_not_enough_for_a_few_large_numbers():
    x = np.zeros(128, np.float32)
    x[:2] = [1.0, 0.5]
    bias = {
        rotations: np.linalg.norm(estimates(drive(num_rotations=rotations), x).mean(axis=0) - x) / np.linalg.norm(x)
        for rotations in (1, 2)
    }
    assert bias[1] > 0.45 and bias[2] < 0.03


def test_min_mse_is_shorter_by_what_it_loses():
    x = normal(4096)
    got = estimates(drive(scaling="min_mse", block_size=4096), x, 64)
    along = got @ x / (x.astype(np.float64) @ x)
    np.testing.assert_allclose(along.mean(), 2 / np.pi, rtol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compressor", "want"),
    [
        (drive(block_size=4096), np.pi / 2 - 1),
        (drive(block_size=4096, num_rotations=1), np.pi / 2 - 1),
        (drive(), np.pi / 2 - 1),
        (drive(scaling="min_mse", block_size=4096), 1 - 2 / np.pi),
        (eden(2, block_size=4096), 0.117482 / (1 - 0.117482)),
        (eden(3, block_size=4096), 0.034548 / (1 - 0.034548)),
        (eden(4, block_size=4096), 0.009501 / (1 - 0.009501)),
        (eden(4, block_size=4096, scaling="min_mse"), 0.009501),
    ],
)
def test_error_of_a_long_vector_is_the_papers(compressor, want):
    np.testing.assert_allclose(nmse(compressor, normal(4096), 128), want, rtol=0.03)


def test_rotated_levels_err_less_than_their_range_allows():
    x = normal(1000)
    compressor = rotated_quantize(4, block_size=1024)
    y = np.asarray(rotate(jnp.pad(jnp.asarray(x), (0, 24))[None], jnp.uint32(0)))
    # A rounding to one of two levels at a distance h has a variance of h^2 / 4 at most, and h^2 / 6 on average.
    step = (y.max() - y.min()) / 15
    assert nmse(compressor, x, 64) * np.sum(x**2) < 1.3 * 1000 * step**2 / 6


def test_rotation_pays_where_few_numbers_are_large():
    x = np.zeros(1024, np.float32)
    x[:2] = [100.0, -40.0]  # none of the four levels is near 0
    x[2:] = 0.1 * normal(1022)
    code = uniform_code(2)

    def plain(key):
        return code.dequantise(*code.quantise(jnp.asarray(x)[None], key))[0]

    unrotated = np.asarray(jax.jit(jax.vmap(plain))(jax.random.split(jax.random.key(0), 64)))
    without = np.mean(np.sum((unrotated - x) ** 2, axis=1)) / np.sum(x**2)
    assert without > 20 > 1 > nmse(rotated_quantize(2, num_rotations=2), x, 64)


# What fedjax makes of the same vectors, from `goldens/make_fedjax.py`

FEDJAX = {
    "rotated_uniform_4": functools.partial(rotated_quantize, 2),
    "rotated_uniform_16": functools.partial(rotated_quantize, 4),
    "drive": drive,
}


@functools.cache
def goldens():
    with np.load(Path(__file__).parent / "goldens/fedjax.npz") as file:
        return dict(file)


@pytest.mark.parametrize("case", ["normal", "tail", "offset"])
@pytest.mark.parametrize("name", FEDJAX)
def test_agrees_with_fedjax_in_distribution(name, case):
    x = goldens()[f"{case}/vector"]
    mean, variance, errors = (goldens()[f"{case}/{name}/{what}"] for what in ("mean", "variance", "errors"))
    got = estimates(FEDJAX[name](block_size=2**20, num_rotations=1), x)
    count, other = len(got), len(errors)
    spread = np.sqrt(got.var(axis=0) / count + variance / other) + 1e-6 * np.abs(x).max()
    assert np.abs((got.mean(axis=0) - mean) / spread).max() < 5
    fourth = np.mean((got - got.mean(axis=0)) ** 4, axis=0)
    spread = np.sqrt((fourth - got.var(axis=0) ** 2) * (1 / count + 1 / other)) + 1e-5 * np.square(x).max()
    assert np.abs((got.var(axis=0) - variance) / spread).max() < 5
    own = np.sum((got - x) ** 2, axis=1) / np.sum(x.astype(np.float64) ** 2)
    np.testing.assert_allclose(
        own.mean(), errors.mean(), atol=5 * np.sqrt(own.var() / count + errors.var() / other) + 1e-5
    )
    # The same distribution, not only the same moments; errors of DRIVE take few values, equal up to rounding.
    assert stats.ks_2samp(own.round(4), errors.astype(np.float64).round(4)).pvalue > 1e-4


# What is sent


def serialised_bits(compressed):
    """Length of the fields one after another, codes without gaps."""
    if not isinstance(compressed.payload, RotatedPayload):
        return 8 * len(np.asarray(compressed.payload).tobytes())
    fields = [np.asarray(field).tobytes() for field in compressed.payload]
    return 8 * len(b"".join(fields))


@pytest.mark.parametrize("length", [1, 5, 65, 1000])
@pytest.mark.parametrize("name", ["uniform_5", "drive", "eden_3"])
def test_bits_are_those_of_the_payload(name, length):
    compressor = COMPRESSORS[name]()
    x = {"a": jnp.asarray(normal(length)), "b": jnp.asarray(heavy(70)).reshape(7, 10)}
    compressed, state = jax.jit(compressor.compress)(x, (), jax.random.key(0))
    sizes = {name: serialised_bits(leaf) for name, leaf in compressed.items()}
    assert state == () and compressor.bits(compressed) == sum(sizes.values())
    assert compressor.bits(compressed, {"a": jnp.float32(0), "b": jnp.float32(1)}) == sizes["b"] + 8
    assert sizes["a"] <= 32 * length
    got = compressor.decompress(compressed)
    assert jax.tree.map(lambda v: (v.shape, v.dtype), got) == jax.tree.map(lambda v: (v.shape, v.dtype), x)


def test_short_vectors_are_sent_as_they_are():
    for length, dtype in ((0, jnp.float32), (1, jnp.float32), (4, jnp.float32), (7, jnp.bfloat16)):
        x = jnp.asarray(normal(length), dtype)
        compressed, _ = drive().compress(x, (), jax.random.key(0))
        np.testing.assert_array_equal(drive().decompress(compressed), x)
        assert drive().bits(compressed) == 8 * length * jnp.dtype(dtype).itemsize
    assert isinstance(drive().compress(jnp.zeros(5), (), jax.random.key(0))[0].payload, RotatedPayload)


@pytest.mark.parametrize("length", [1, 64, 65, 127, 128, 129, 600, 1025, 3000, 4097, 100_000])
@pytest.mark.parametrize("num_bits", [1, 4])
def test_default_blocks_are_the_shortest(length, num_bits):
    def bits(size):
        return -(-length // size) * (num_bits * size + 32)

    num_blocks, size = block_shape(length, num_bits, 1)
    assert (num_blocks - 1) * size < length <= num_blocks * size
    assert bits(size) == min(bits(2**k) for k in range(7, 18)) or (size == 64 and length <= 64)
    assert block_shape(length, num_bits, 1, block_size=2**20) == (1, 2 ** (length - 1).bit_length())
    assert block_shape(length, num_bits, 1, block_size=16) == (-(-length // 16), 16) or length == 1


def test_codes_that_fill_no_word_count_as_what_they_are():
    compressed, _ = drive(block_size=16).compress(jnp.asarray(normal(12)), (), jax.random.key(0))
    assert compressed.payload.codes.shape == (1,)
    assert drive(block_size=16).bits(compressed) == 16 + 32 + 32


def test_blocks_have_their_own_scales():
    x = np.concatenate([normal(256), 1000 * normal(256, 1)])
    compressor = drive(block_size=256)
    compressed, _ = compressor.compress(jnp.asarray(x), (), jax.random.key(0))
    scales = np.asarray(compressed.payload.scales)
    assert scales.shape == (2, 1) and scales[1] > 500 * scales[0]
    got = np.asarray(compressor.decompress(compressed))
    assert np.sum((got - x)[:256] ** 2) < np.sum(x[:256] ** 2)


@pytest.mark.parametrize("name", ["uniform_2", "drive", "eden_3"])
def test_roundtrip_is_compress_and_decompress(name):
    compressor = COMPRESSORS[name]()
    x = {"a": jnp.asarray(normal(700)), "b": jnp.asarray(normal(3))}
    compressed, _ = compressor.compress(x, (), jax.random.key(5))
    got, _, bits_fn = compressor.roundtrip(x, (), jax.random.key(5))
    jax.tree.map(np.testing.assert_array_equal, got, compressor.decompress(compressed))
    mask = {"a": jnp.float32(1), "b": jnp.float32(0)}
    assert bits_fn() == compressor.bits(compressed) and bits_fn(mask) == compressor.bits(compressed, mask)


def test_entropy_of_the_codes():
    x = jnp.asarray(normal(512))
    for compressor, num_bits in ((eden(4), 4), (drive(), 1)):
        compressed, _ = jax.jit(compressor.compress)(x, (), jax.random.key(0))
        codes = np.asarray(unpack_bits(compressed.payload.codes, num_bits, 512))
        shares = np.unique(codes, return_counts=True)[1] / 512
        overhead = 32 + 32 * compressed.payload.scales.size
        want = -512 * np.sum(shares * np.log2(shares)) + overhead
        np.testing.assert_allclose(compressor.entropy_bits(compressed), want, rtol=1e-5)
        assert float(compressor.entropy_bits(compressed)) <= int(compressor.bits(compressed))
    short, _ = drive().compress(x[:3], (), jax.random.key(0))
    assert drive().entropy_bits(short) == 96


# Edges


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uniform_5", "drive", "eden_3", "eden_7"])
def test_zeros_stay_zeros(name):
    compressor = COMPRESSORS[name]()
    np.testing.assert_array_equal(estimates(compressor, np.zeros((3, 100), np.float32), 1), np.zeros((1, 3, 100)))


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["uniform_5", "drive", "drive_min_mse", "eden_3", "eden_7"])
def test_what_is_not_finite_stays_so(name, value):
    compressor = COMPRESSORS[name]()
    for length in (3, 100):
        x = normal(length)
        x[2] = value
        assert not np.isfinite(estimates(compressor, x, 1)).all()


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("name", ["uniform_5", "drive", "eden_3", "eden_7"])
def test_squares_that_overflow_do_not_matter(name, scale):
    compressor = COMPRESSORS[name]()
    x = normal(300)
    want = estimates(compressor, x, 4)
    got = estimates(compressor, (scale * x).astype(np.float32), 4) / scale
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max() or name.startswith("uniform")
    assert np.isfinite(got).all() and np.sum((got - x) ** 2) < 4 * np.sum(x**2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
@pytest.mark.parametrize("name", ["uniform_5", "drive", "eden_3"])
def test_dtypes(name, dtype, x64):
    compressor = COMPRESSORS[name]()
    x = jnp.asarray(normal(500), dtype)
    compressed, _ = jax.jit(compressor.compress)(x, (), jax.random.key(0))
    got = jax.jit(compressor.decompress)(compressed)
    assert got.dtype == dtype and compressed.payload.scales.dtype == jnp.float32
    assert compressor.bits(compressed) == serialised_bits(compressed)
    want = np.asarray(x, np.float64)
    assert np.sum((np.asarray(got, np.float64) - want) ** 2) < 0.7 * np.sum(want**2)


@pytest.mark.parametrize("name", ["uniform_5", "eden_3"])
def test_jit_and_vmap_change_nothing(name):
    compressor = COMPRESSORS[name](scope="model")
    x = {"a": jnp.asarray(normal(100)), "b": jnp.asarray(normal((5, 30)))}
    keys = jax.random.split(jax.random.key(0), 3)

    def run(key):
        compressed, _ = compressor.compress(x, (), key)
        return compressor.decompress(compressed), compressor.bits(compressed)

    lifted = jax.jit(jax.vmap(run))(keys)
    for i in range(3):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
            jax.tree.map(lambda v, i=i: v[i], lifted),
            run(keys[i]),
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rotated_quantize(0), "num_bits must lie within .1, 16., got 0"),
        (lambda: rotated_quantize(17), "num_bits must lie within .1, 16., got 17"),
        (lambda: eden(0), "num_bits must be from 1 to 8, got 0"),
        (lambda: eden(2, scaling="best"), "scaling must be one of"),
        (lambda: drive(scaling="best"), "scaling must be one of"),
        (lambda: drive(block_size=100), "block_size must be None or a power of two, got 100"),
        (lambda: drive(block_size=0), "block_size must be None or a power of two, got 0"),
        (lambda: eden(1, num_rotations=0), "num_rotations must be at least 1, got 0"),
        (lambda: drive(scope="layer"), "scope"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
