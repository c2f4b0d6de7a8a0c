"""Encrypted sums against plain ones in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cedarjax as cj
from cedarjax.privacy import homomorphic

tenseal = pytest.importorskip("tenseal")


@pytest.fixture(scope="module")
def context():
    return homomorphic.ckks_context()


@pytest.fixture(scope="module")
def small_context():
    """1,024 numbers a ciphertext, and 11 bits for numbers above the point."""
    return homomorphic.ckks_context(poly_modulus_degree=4096, coeff_mod_bit_sizes=(37, 26, 37), scale_bits=26)


def tree(count, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        "a": jnp.asarray(rng.normal(size=(count, 60, 90)), dtype),  # more than the 4,096 of a ciphertext
        "b": jnp.asarray(rng.normal(size=(count,)), dtype),
    }


def plain(updates, weights):
    return jax.tree.map(
        lambda x: np.tensordot(np.asarray(weights, np.float64), np.asarray(x, np.float64), axes=1), updates
    )


def test_the_encrypted_sum_is_the_plain_one(context):
    updates, weights = tree(5), jnp.array([1.0, 0.25, 3.0, 12.0, 7.5])
    total, info = homomorphic.encrypted_weighted_sum(updates, weights, context=context)
    for got, want in zip(jax.tree.leaves(total), jax.tree.leaves(plain(updates, weights)), strict=True):
        assert got.shape == want.shape and got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * float(weights.sum()) * 4)
    assert context.is_private(), "the secret key is still the caller's"
    assert info.num_ciphertexts == 2 and info.plain_bytes == 4 * 5401
    assert not any(info.nonfinite)


def test_ciphertexts_are_counted_as_they_are_sent(context):
    """The ciphertext of all-random numbers does not compress: two polynomials of two primes of 8,192 coefficients."""
    info = homomorphic.encrypted_weighted_sum({"a": tree(1)["a"]}, context=context)[1]
    one = len(tenseal.ckks_vector(context, [0.5] * 4096).serialize())
    assert info.num_ciphertexts == 2
    assert info.upload_bytes == pytest.approx(2 * one, rel=0.01)
    assert info.upload_bytes > 10 * info.plain_bytes


def test_absent_and_bad_clients_are_left_out(context):
    updates = {"a": jnp.array([[1.0, 2.0], [jnp.nan, 0.0], [3.0, jnp.inf], [5.0, -7.0]])}
    total, info = homomorphic.encrypted_weighted_sum(updates, jnp.array([2.0, 0.0, 1.0, 1.0]), context=context)
    np.testing.assert_allclose(total["a"], [7.0, -3.0], atol=1e-4)
    assert info.nonfinite == [False, False, True, False]
    nobody, info = homomorphic.encrypted_weighted_sum(updates, jnp.zeros(4), context=context)
    assert nobody["a"].tolist() == [0.0, 0.0] and info.upload_bytes == info.num_ciphertexts == 0


def test_dtypes_are_kept(context, x64):
    for dtype in (jnp.bfloat16, jnp.float64):
        updates = {"a": jnp.asarray([[0.5, 2.0], [0.25, 1.0]], dtype)}
        total, _ = homomorphic.encrypted_weighted_sum(updates, context=context)
        assert total["a"].dtype == dtype
        np.testing.assert_allclose(np.asarray(total["a"], np.float64), [0.75, 3.0], atol=1e-2)


def test_the_server_cannot_read(context):
    """What it is given has no secret key, and decrypting fails."""
    public = context.copy()
    public.make_context_public()
    sent = tenseal.ckks_vector(context, [1.0, 2.0]).serialize()
    with pytest.raises(ValueError, match="secret_key|decrypt"):
        tenseal.ckks_vector_from(public, sent).decrypt()


def test_sums_that_do_not_fit_are_refused(context, small_context):
    updates = {"a": jnp.array([[100.0, -1000.0], [50.0, 900.0]])}
    want = np.array([150.0, -100.0])
    with pytest.raises(ValueError, match=r"sum_i weights_i \* max\|updates_i\| < 1024, .* got 1900"):
        homomorphic.encrypted_weighted_sum(updates, context=small_context)
    np.testing.assert_allclose(homomorphic.encrypted_weighted_sum(updates, context=context)[0]["a"], want, atol=1e-2)
    # The room is real: half of it is added up rightly.
    half, _ = homomorphic.encrypted_weighted_sum({"a": updates["a"] / 4}, context=small_context)
    np.testing.assert_allclose(half["a"], want / 4, atol=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"poly_modulus_degree": 4096}, r"at least 128 bits of security, got 4096 and \(60, 40, 60\)"),
        ({"poly_modulus_degree": 1000}, "got 1000 and"),
        ({"scale_bits": 60}, r"scale_bits must be positive and below coeff_mod_bit_sizes\[0\] = 60, got 60"),
        ({"coeff_mod_bit_sizes": (40, 40)}, r"at least 3 primes for a weighted sum, got \(40, 40\)"),
    ],
)
def test_bad_parameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        homomorphic.ckks_context(**options)


def test_wrong_arguments_are_refused(context):
    updates = {"a": jnp.ones((3, 2))}
    for weights, message in (
        (jnp.array([1.0, -1.0, 1.0]), "weights must be at least 0 and finite, got"),
        (jnp.array([1.0, jnp.nan, 1.0]), "weights must be at least 0 and finite, got"),
        (jnp.ones(2), r"weights must be \[C\] with C = 3"),
        ({"a": jnp.ones(3)}, r"weights must be one \[C\] vector"),
    ):
        with pytest.raises(ValueError, match=message):
            homomorphic.encrypted_weighted_sum(updates, weights, context=context)
    with pytest.raises(TypeError, match="updates must hold floats, got int32 for 'a'"):
        homomorphic.encrypted_weighted_sum({"a": jnp.ones((3, 2), jnp.int32)}, context=context)
    with pytest.raises(TypeError, match="rows that a pre-aggregator made"):
        homomorphic.encrypted_weighted_sum(cj.core.Mixture.of(jnp.eye(3), updates), context=context)


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tenseal", None)
    with pytest.raises(ImportError, match=r"pip install 'cedarjax\[he\]'"):
        homomorphic.ckks_context()
