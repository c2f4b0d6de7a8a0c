import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.robust import rlr, rsa, sign_majority

NUM_CLIENTS, WIDTH = 7, 6


def run(rule, x, weights):
    out, state = rule.update(x, rule.init(x[0]), weights=weights)
    return out, state.info.ok, state.num_nonfinite


RULES = {
    "sign_majority": (sign_majority(), lambda x, w: np.sign(w @ np.sign(x))),
    "rlr": (rlr(3), lambda x, w: w @ x / w.sum() * np.where(np.abs(np.sign(x).sum(axis=0)) >= 3, 1, -1)),
    "rsa": (rsa(0.25), lambda x, w: 0.25 * (w @ np.sign(x))),
}
COMPILED = {name: jax.jit(lambda x, w, rule=rule: run(rule, x, w)) for name, (rule, _) in RULES.items()}


@pytest.mark.parametrize("name", RULES)
@hypothesis.given(st.integers(0, 10_000), st.booleans())
def test_definition(name, seed, weighted):
    rng = np.random.default_rng(seed)
    x = (rng.integers(-2, 3, size=(NUM_CLIENTS, WIDTH)) * rng.uniform(0.5, 2, size=WIDTH)).astype(np.float32)
    bad = rng.random(NUM_CLIENTS) < 0.2
    weights = rng.integers(0, 4, NUM_CLIENTS) if weighted else np.ones(NUM_CLIENTS)
    sent = np.where(bad[:, None], rng.choice([np.nan, np.inf], size=(NUM_CLIENTS, 1)), x).astype(np.float32)
    out, ok, num_nonfinite = COMPILED[name](sent, weights.astype(np.float32))
    there = (weights > 0) & ~bad
    assert bool(ok) == there.any() and num_nonfinite == (bad & (weights > 0)).sum()
    want = RULES[name][1](x[there].astype(np.float64), weights[there].astype(np.float64)) if there.any() else 0.0
    np.testing.assert_allclose(out, np.broadcast_to(want, WIDTH), rtol=1e-5, atol=1e-6)


def test_a_draw_is_zero_and_zeros_do_not_vote():
    x = jnp.array([[1.0, 0.0, 0.0, -0.0], [-9.0, 0.0, 5.0, 0.0]])
    out, _, _ = run(sign_majority(), x, jnp.ones(2))
    assert out.tolist() == [0.0, 0.0, 1.0, 0.0]


def test_one_client_moves_a_coordinate_by_its_vote():
    x = np.random.default_rng(0).normal(size=(NUM_CLIENTS, WIDTH)).astype(np.float32)
    rule = rsa(0.5)
    before = run(rule, x, jnp.ones(NUM_CLIENTS))[0]
    x[3] = 1e30
    assert np.abs(run(rule, x, jnp.ones(NUM_CLIENTS))[0] - before).max() <= 1.0


def test_threshold_of_zero_is_the_mean():
    x = np.random.default_rng(1).normal(size=(NUM_CLIENTS, WIDTH)).astype(np.float32)
    np.testing.assert_allclose(run(rlr(0), x, jnp.ones(NUM_CLIENTS))[0], x.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(run(rlr(8.0), x, jnp.ones(NUM_CLIENTS))[0], -x.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", RULES)
def test_dtype_is_kept_and_votes_are_counted_wide(name, dtype):
    x = jnp.ones((300, 2), dtype)  # a bfloat16 sum of ones stops at 256
    out, _, _ = run(RULES[name][0], x, jnp.ones(300))
    assert out.dtype == dtype
    np.testing.assert_allclose(out.astype(jnp.float32), {"rsa": 75.0}.get(name, 1.0), rtol=2e-6)


def test_double_precision(x64):
    x = np.random.default_rng(2).normal(size=(NUM_CLIENTS, WIDTH))
    for name, (rule, oracle) in RULES.items():
        out, _, _ = run(rule, jnp.asarray(x), jnp.ones(NUM_CLIENTS))
        assert out.dtype == jnp.float64, name
        np.testing.assert_allclose(out, oracle(x, np.ones(NUM_CLIENTS)), rtol=0, atol=1e-14)


def test_arguments():
    with pytest.raises(ValueError, match="threshold must be at least 0, got -1"):
        rlr(-1)
    with pytest.raises(ValueError, match="penalty must be above 0, got 0"):
        rsa(0)
    with pytest.raises(ValueError, match="threshold must be at least 0, got nan"):
        rlr(float("nan"))
