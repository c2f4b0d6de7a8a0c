"""Arithmetic modulo a prime against Python's integers, and what shares tell."""

import itertools
from collections import Counter

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.privacy import secure_aggregation as secure
from cedarjax.privacy.secure_aggregation import field, shamir

MERSENNE = 2**31 - 1
PRIMES = (2, 3, 65521, MERSENNE)


def numbers(prime, count=400):
    """Random elements, and all pairs of those at the edges of the limbs."""
    rng = np.random.default_rng(prime)
    edges = [0, 1, 2, 2**15 - 1, 2**15, 2**16 - 1, 2**16, 2**16 + 1, 2**30, 2**30 + 1]
    edges = sorted({e % prime for e in edges} | {prime - 1, prime - 2} | {prime - 2**15, prime - 2**16, prime // 2})
    pairs = list(itertools.product([e % prime for e in edges], repeat=2))
    pairs += rng.integers(0, prime, size=(count, 2)).tolist()
    a, b = np.array(pairs, np.uint64).T
    return a, b


def elements(x):
    return jnp.asarray(np.asarray(x, np.uint32))


@pytest.mark.parametrize("prime", PRIMES)
def test_arithmetic_is_that_of_python_integers(prime):
    a, b = numbers(prime)
    for fun, want in (
        (field.add, [(int(x) + int(y)) % prime for x, y in zip(a, b, strict=True)]),
        (field.subtract, [(int(x) - int(y)) % prime for x, y in zip(a, b, strict=True)]),
        (field.multiply, [int(x) * int(y) % prime for x, y in zip(a, b, strict=True)]),
        (field.power, [pow(int(x), int(y), prime) for x, y in zip(a, b, strict=True)]),
    ):
        got = fun(elements(a), elements(b), prime=prime)
        assert got.dtype == jnp.uint32
        assert got.tolist() == want, fun.__name__


@pytest.mark.parametrize("prime", PRIMES)
def test_inverses_and_sums_are_those_of_python_integers(prime):
    a, _ = numbers(prime)
    got = field.inverse(elements(a), prime=prime).tolist()
    assert got == [pow(int(x), -1, prime) if x else 0 for x in a]
    many = np.random.default_rng(1).integers(0, prime, size=(5000, 2))
    many[:, 1] = prime - 1
    assert field.total(elements(many), prime=prime).tolist() == [sum(map(int, x)) % prime for x in many.T]


@hypothesis.given(st.integers(0, MERSENNE - 1), st.integers(0, MERSENNE - 1))
def test_products_modulo_the_large_prime(a, b):
    assert int(field.multiply(elements(a), elements(b))) == a * b % MERSENNE


def test_draws_are_elements_and_fill_the_field():
    drawn = np.asarray(field.uniform(jax.random.key(0), (40_000,), prime=5))
    counts = np.bincount(drawn, minlength=5)
    assert counts.shape == (5,) and np.abs(counts - 8000).max() < 5 * np.sqrt(8000 * 0.8)
    large = np.asarray(field.uniform(jax.random.key(1), (40_000,)))
    assert large.max() < MERSENNE
    assert abs(large.mean() / MERSENNE - 0.5) < 5 / np.sqrt(12 * 40_000)


def test_shares_are_values_of_the_polynomial():
    rng = np.random.default_rng(2)
    secrets, points = rng.integers(0, MERSENNE, 3), np.array([5, 1, 100, 7])
    coefficients = rng.integers(0, MERSENNE, size=(2, 3))
    got = shamir.evaluate(elements(secrets), elements(coefficients), elements(points))
    want = [
        [
            (s + c1 * x + c2 * x**2) % MERSENNE
            for s, c1, c2 in zip(secrets.tolist(), *coefficients.tolist(), strict=True)
        ]
        for x in points.tolist()
    ]
    assert got.tolist() == want


@pytest.mark.parametrize("prime", [7, MERSENNE])
def test_any_threshold_shares_tell_the_secrets_and_fewer_do_not(prime):
    num_holders, threshold = 6, 3
    secrets = elements([4, prime - 1, 0, 1])
    points = jnp.arange(1, num_holders + 1, dtype=jnp.uint32)
    shares = secure.split_secret(secrets, points, threshold, jax.random.key(3), prime=prime)
    told = jax.jit(lambda s, a: secure.reconstruct_secret(s, points, a, threshold, prime=prime))
    for size in range(threshold, num_holders + 1):
        for who in itertools.combinations(range(num_holders), size):
            answered = np.isin(np.arange(num_holders), who)
            garbage = jnp.where(answered[:, None], shares, jnp.uint32(prime - 1))
            assert told(garbage, answered).tolist() == secrets.tolist()
    missed = [
        told(shares, np.isin(np.arange(num_holders), who)).tolist() != secrets.tolist()
        for who in itertools.combinations(range(num_holders), threshold - 1)
    ]
    assert all(missed)


@pytest.mark.parametrize(("prime", "threshold"), [(5, 2), (5, 3), (7, 3), (3, 2)])
def test_fewer_shares_than_the_threshold_tell_nothing(prime, threshold):
    """Over all polynomials every secret gives the same shares equally often, and with one share more it does not."""
    coefficients = np.array(list(itertools.product(range(prime), repeat=threshold - 1)), np.uint32)  # [P, t - 1]
    points = jnp.arange(1, prime, dtype=jnp.uint32)
    deal = jax.vmap(lambda secret, c: shamir.evaluate(secret[None], c[:, None], points, prime=prime)[:, 0], (None, 0))
    dealt = [np.asarray(deal(jnp.uint32(secret), jnp.asarray(coefficients))) for secret in range(prime)]
    for who in itertools.combinations(range(prime - 1), threshold - 1):
        seen = [Counter(map(tuple, shares[:, who].tolist())) for shares in dealt]
        assert all(counts == seen[0] for counts in seen)
        assert len(seen[0]) == prime ** (threshold - 1) and set(seen[0].values()) == {1}
    if threshold < prime:
        seen = [set(map(tuple, shares[:, :threshold].tolist())) for shares in dealt]
        assert not seen[0] & seen[1]


def test_shares_follow_from_the_key():
    secrets, points = elements([1, 2]), elements([1, 2, 3])
    once = secure.split_secret(secrets, points, 2, jax.random.key(0))
    assert once.tolist() == secure.split_secret(secrets, points, 2, jax.random.key(0)).tolist()
    assert once.tolist() != secure.split_secret(secrets, points, 2, jax.random.key(1)).tolist()


@pytest.mark.parametrize(
    ("threshold", "prime", "message"),
    [
        (0, MERSENNE, "threshold must be from 1 to the number of shares, 3, got 0"),
        (4, MERSENNE, "threshold must be from 1 to the number of shares, 3, got 4"),
        (2, 3, "points must be fewer than the elements of the field, got 3 and 3"),
        (2, 2**17 - 1, r"prime must be 2\^31 - 1 = 2147483647, or from 2 to 65536, got 131071"),
    ],
)
def test_errors_name_the_argument(threshold, prime, message):
    with pytest.raises(ValueError, match=message):
        secure.split_secret(elements([1]), elements([1, 2, 3]), threshold, jax.random.key(0), prime=prime)
