"""Attacks on updates: flagged rows are overwritten, all others keep every bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cedarjax.attacks import gaussian, sign_flip

BYZANTINE = jnp.array([False, True, False, True, False])


def make_updates(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {"a": (5, 40, 50), "b": [(5,), (5, 2000)]}
    return jax.tree.map(lambda s: rng.normal(size=s).astype(dtype), shapes, is_leaf=lambda s: isinstance(s, tuple))


def attack(transform, updates, **extra):
    poisoned, state = transform.update(updates, transform.init(None), **extra)
    assert state == optax.EmptyState()
    return poisoned


def honest_rows_are_untouched(poisoned, updates):
    for got, x in zip(jax.tree.leaves(poisoned), jax.tree.leaves(updates), strict=True):
        assert got.dtype == x.dtype and got.shape == x.shape
        np.testing.assert_array_equal(got[~BYZANTINE], x[~np.asarray(BYZANTINE)])


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_sign_flip(scale):
    updates = make_updates()
    poisoned = attack(sign_flip(scale), updates, byzantine=BYZANTINE)
    honest_rows_are_untouched(poisoned, updates)
    for got, x in zip(jax.tree.leaves(poisoned), jax.tree.leaves(updates), strict=True):
        np.testing.assert_allclose(got[BYZANTINE], -scale * x[np.asarray(BYZANTINE)], rtol=1e-6)


def test_gaussian_is_noise_of_the_asked_size():
    updates = make_updates()
    poisoned = attack(gaussian(3.0), updates, byzantine=BYZANTINE, key=jax.random.key(0))
    honest_rows_are_untouched(poisoned, updates)
    a, _, b = jax.tree.leaves(poisoned)
    draws = np.stack([np.ravel(a[1]), np.ravel(a[3]), b[1], b[3]])
    # 2000 draws each: four standard errors
    np.testing.assert_allclose(draws.mean(axis=1), 0, atol=4 * 3 / np.sqrt(2000))
    np.testing.assert_allclose(draws.std(axis=1), 3, rtol=4 / np.sqrt(2 * 2000))
    correlations = np.corrcoef(draws)[np.triu_indices(4, 1)]  # rows and leaves are independent
    np.testing.assert_allclose(correlations, 0, atol=4 / np.sqrt(2000))


def test_gaussian_keys_and_padding():
    updates = make_updates()
    same, again, other = (attack(gaussian(1.0), updates, byzantine=BYZANTINE, key=jax.random.key(k)) for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, same, again)
    assert (np.asarray(same["a"])[1] != np.asarray(other["a"])[1]).mean() > 0.99
    shorter = attack(
        gaussian(1.0), jax.tree.map(lambda x: x[:4], updates), byzantine=BYZANTINE[:4], key=jax.random.key(0)
    )
    jax.tree.map(lambda s, x: np.testing.assert_array_equal(s, x[:4]), shorter, same)
    nothing = attack(gaussian(0.0), updates, byzantine=BYZANTINE, key=jax.random.key(0))
    np.testing.assert_array_equal(nothing["a"][1], 0)


@pytest.mark.parametrize("transform", [sign_flip(2.0), gaussian(2.0)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_jit_dtypes_and_honest_nan(transform, dtype):
    updates = jax.tree.map(lambda x: jnp.asarray(x, dtype), make_updates())
    extra = {"byzantine": BYZANTINE, "key": jax.random.key(0)}
    plain = attack(transform, updates, **extra)
    jitted = jax.jit(lambda u: attack(transform, u, **extra))(updates)
    for a, b, x in zip(*map(jax.tree.leaves, (plain, jitted, updates)), strict=True):
        assert a.dtype == x.dtype
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-2 if dtype == jnp.bfloat16 else 1e-5)


def test_a_broken_attacker_is_overwritten_by_noise():
    updates = {"a": np.full((5, 2), np.nan, np.float32)}
    poisoned = attack(gaussian(1.0), updates, byzantine=BYZANTINE, key=jax.random.key(0))
    np.testing.assert_array_equal(np.isfinite(poisoned["a"]).all(axis=1), BYZANTINE)


def test_in_a_chain():
    tx = optax.chain(sign_flip(), gaussian(0.0))
    updates = make_updates()
    poisoned, _ = tx.update(updates, tx.init(None), byzantine=BYZANTINE, key=jax.random.key(0), weights=jnp.ones(5))
    np.testing.assert_array_equal(poisoned["a"][1], 0)
    np.testing.assert_array_equal(poisoned["a"][0], updates["a"][0])


def test_float64_noise(x64):
    updates = jax.tree.map(np.float64, make_updates())
    poisoned = attack(gaussian(1.0), updates, byzantine=BYZANTINE, key=jax.random.key(0))
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(poisoned))


def test_what_an_attack_needs():
    updates = make_updates()
    with pytest.raises(ValueError, match=r"byzantine must be given, \[C\] bool with C = 5"):
        attack(sign_flip(), updates)
    with pytest.raises(ValueError, match="key must be given"):
        attack(gaussian(1.0), updates, byzantine=BYZANTINE)
    with pytest.raises(ValueError, match=r"byzantine must be \[C\] with C = 5.*\(4,\)"):
        attack(sign_flip(), updates, byzantine=BYZANTINE[:4])
    with pytest.raises(TypeError, match="byzantine must be bool, got float32"):
        attack(sign_flip(), updates, byzantine=jnp.ones(5))
    for factory, name in ((sign_flip, "scale"), (gaussian, "std")):
        for value in (-1.0, float("nan")):
            with pytest.raises(ValueError, match=f"{name} must be at least 0, got {value}"):
                factory(value)
