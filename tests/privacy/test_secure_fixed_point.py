"""Fixed point against numpy in double precision."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.privacy import secure_aggregation as secure
from cedarjax.privacy.secure_aggregation.fixed_point import check_fixed_point

NUM_KEYS = 4096


def integers(x, clip, bits):
    """The definition, in double precision."""
    largest = 2 ** (bits - 1) - 1
    return np.round(np.clip(np.asarray(x, np.float64), -clip, clip) * largest / clip).astype(np.int64)


@pytest.mark.parametrize(("clip", "bits"), [(1.0, 8), (0.1, 16), (1000.0, 12), (3.0, 2)])
def test_encoding_is_its_definition(clip, bits):
    x = np.random.default_rng(0).uniform(-1.5 * clip, 1.5 * clip, size=2000).astype(np.float32)
    # Where double precision is within a float32's rounding of a tie, either side is right.
    scaled = np.clip(x.astype(np.float64), -clip, clip) * (2 ** (bits - 1) - 1) / clip
    clear = np.abs(scaled - np.floor(scaled) - 0.5) > 2.0**-21 * 2**bits
    got = np.asarray(secure.encode(jnp.asarray(x), clip, bits))
    assert got.dtype == np.uint32 and clear.mean() > 0.9
    np.testing.assert_array_equal(got[clear], integers(x, clip, bits)[clear] % 2**32)


@pytest.mark.parametrize("bits", [2, 3, 16, 24])
def test_zero_and_the_ends_are_exact(bits):
    x = jnp.array([0.0, 2.5, -2.5, 9.0, -9.0], jnp.float32)
    back = secure.decode(secure.encode(x, 2.5, bits), 2.5, bits, jnp.float32)
    np.testing.assert_allclose(back, [0.0, 2.5, -2.5, 2.5, -2.5], rtol=2e-7)
    assert back[0] == 0.0


@hypothesis.given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 40), st.just(3)), elements=st.floats(-2, 2, width=32)),
    st.integers(2, 24),
    st.booleans(),
    st.floats(0.01, 1.5),
)
def test_a_decoded_sum_keeps_its_bound(x, bits, stochastic, clip):
    draws = jax.random.uniform(jax.random.key(x.shape[0]), x.shape, jnp.float32) if stochastic else None
    encoded = np.asarray(secure.encode(jnp.asarray(x), clip, bits, draws))
    total = encoded.sum(axis=0, dtype=np.uint32)  # modulo 2^32
    got = np.asarray(secure.decode(jnp.asarray(total), clip, bits, jnp.float32), np.float64)
    want = np.clip(x.astype(np.float64), -clip, clip).sum(axis=0)
    assert np.abs(got - want).max() <= secure.error_bound(clip, bits, x.shape[0], stochastic=stochastic)


def test_the_bound_is_half_a_step():
    """So that it is not met by being loose: the worst number comes within 1 % of it."""
    clip, bits = 1.0, 10
    x = jnp.linspace(-1, 1, 100_001, dtype=jnp.float32)
    back = np.asarray(secure.decode(secure.encode(x, clip, bits), clip, bits, jnp.float32), np.float64)
    worst, bound = np.abs(back - np.asarray(x, np.float64)).max(), secure.error_bound(clip, bits, 1)
    assert 0.99 * bound < worst <= bound
    assert bound == pytest.approx(0.5 / 511, rel=1e-3)


def test_stochastic_rounding_is_right_in_the_mean():
    clip, bits = 1.0, 4  # a step of 1/7
    x = jnp.array([0.0, 0.03, -0.61, 0.999, 1.0, -1.0, 0.5, -0.05], jnp.float32)
    keys = jax.random.split(jax.random.key(0), NUM_KEYS)

    def once(key):
        draws = jax.random.uniform(key, x.shape, jnp.float32)
        return secure.decode(secure.encode(x, clip, bits, draws), clip, bits, jnp.float32)

    back = np.asarray(jax.vmap(once)(keys), np.float64)
    error = back.mean(axis=0) - np.asarray(x, np.float64)
    # Each is one of two neighbours: a standard deviation of at most half a step; the level is that of 5 of them.
    assert (np.abs(error) <= 5 * 0.5 / 7 / np.sqrt(NUM_KEYS) + 1e-6).all()
    assert set(np.unique(np.round(back[:, 1] * 7).astype(int))) == {0, 1}
    np.testing.assert_array_equal(np.unique(back[:, 0]), [0.0])
    assert np.abs(np.abs(back[:, 4:6]) - 1).max() < 1e-6


def test_a_sum_as_large_as_allowed_has_one_meaning():
    count, bits = 65_537, 16
    check_fixed_point(1.0, bits, count)
    for sign in (1.0, -1.0):
        one = int(secure.encode(jnp.float32(sign), 1.0, bits))
        total = jnp.uint32(one * count % 2**32)
        assert float(secure.decode(total, 1.0, bits, jnp.float32)) == pytest.approx(sign * count, rel=1e-6)


def test_wider_floats_are_encoded_in_their_own_precision(x64):
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, 1000))
    np.testing.assert_array_equal(secure.encode(x, 1.0, 24), integers(x, 1.0, 24) % 2**32)
    assert secure.decode(secure.encode(x, 1.0, 24), 1.0, 24, jnp.float64).dtype == jnp.float64
    low = secure.encode(x.astype(jnp.bfloat16), 1.0, 8)
    np.testing.assert_array_equal(low, integers(x.astype(jnp.bfloat16).astype(jnp.float64), 1.0, 8) % 2**32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (1.0, 16, 65_538),
            r"num_bits must satisfy n \* \(2\^num_bits - 1\) < 2\^32, .* = 16 for n = 65538",
        ),
        ((1.0, 24, 257), "num_bits = 24 for n = 257"),
        ((1.0, 1), "num_bits must be from 2 to 24, got 1"),
        ((1.0, 25), "num_bits must be from 2 to 24, got 25"),
        ((0.0, 8), "clip must be positive and finite, got 0.0"),
        ((float("nan"), 8), "clip must be positive and finite, got nan"),
        ((float("inf"), 8), "clip must be positive and finite, got inf"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_fixed_point(*arguments)
