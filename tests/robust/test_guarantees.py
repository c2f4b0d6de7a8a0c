"""The published bounds of robust averaging, on random and adversarial inputs, over all subsets of honest clients.

A rule is `(f, kappa)`-robust if for all sets `S` of `n - f` clients its result is as near to their mean as
`|R(x) - mean_S|^2 <= kappa / |S| sum_{i in S} |x_i - mean_S|^2` (Allouah et al., 2023).
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax import attacks, robust
from tests.robust import robust_oracles as oracles

NUM_CLIENTS, WIDTH = 9, 3


def ratio(f):
    return f / (NUM_CLIENTS - 2 * f)


RULES = {
    "trimmed_mean": (robust.trimmed_mean, lambda r: 6 * r * (1 + r)),
    "median": (lambda f: robust.median(), lambda r: 4 * (1 + r) ** 2),
    "geometric_median": (lambda f: robust.geometric_median(1e-6, 300), lambda r: 4 * (1 + r) ** 2),
    "krum": (robust.krum, lambda r: 6 * (1 + r)),
}


@pytest.fixture(autouse=True)
def fast_compilation():
    """Most of the time here is XLA's."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def compiled(name, mixed, f):
    rule = RULES[name][0](f)
    rule = robust.nnm(f, rule) if mixed else rule
    return jax.jit(lambda x: rule.update(x, rule.init(x[0]))[0])


def kappa(name, mixed, f):
    bound = RULES[name][1](ratio(f))
    return 8 * f / (NUM_CLIENTS - f) * (bound + 1) if mixed else bound


def worst(result, x, f):
    """The greatest ratio, over all sets of honest clients, of the squared error to their variance."""
    worst = 0.0
    for rows in oracles.subsets(len(x), f):
        honest = x[rows]
        variance = np.square(honest - honest.mean(axis=0)).sum(axis=1).mean()
        error = np.square(result - honest.mean(axis=0)).sum()
        rounding = (4e-6 * np.abs(honest).max() + 3e-6) ** 2  # and the smoothing of the geometric median
        worst = max(worst, max(error - rounding, 0) / max(variance, 1e-30))
    return worst


def draw(kind, rng, f):
    """`[n, D]`; the attackers, if there are any apart, come first."""
    x = rng.normal(size=(NUM_CLIENTS, WIDTH))
    bad = (np.arange(NUM_CLIENTS) < f)[:, None]
    direction = rng.normal(size=WIDTH)
    return {
        "normal": x,
        "clusters": x * 0.1 + np.where(rng.permutation(NUM_CLIENTS)[:, None] < 4, 5 * direction, 0.0),
        "three clusters": 0.01 * x + rng.integers(0, 3, NUM_CLIENTS)[:, None] * direction,
        "far out": np.where(bad, 10.0 ** rng.integers(1, 7) * direction, x),
        "collinear": rng.standard_cauchy(NUM_CLIENTS)[:, None] * direction,
        "two points": np.where(rng.permutation(NUM_CLIENTS)[:, None] < NUM_CLIENTS - f, 0.0, direction) + 0 * x,
        "geometric": (2.0 ** np.arange(NUM_CLIENTS))[:, None] * direction,
        "integers": rng.integers(-1, 2, size=x.shape) * 1.0,
        "offset": 50 + x,
    }[kind].astype(np.float32)


KINDS = [
    "normal",
    "clusters",
    "three clusters",
    "far out",
    "collinear",
    "two points",
    "geometric",
    "integers",
    "offset",
]


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", RULES)
@hypothesis.settings(max_examples=40)
@hypothesis.given(st.integers(0, 10_000), st.sampled_from(KINDS), st.sampled_from([1, 3]))
def test_error_is_bounded_by_the_spread_of_any_honest_majority(name, mixed, seed, kind, f):
    x = draw(kind, np.random.default_rng(seed), f)
    result = np.asarray(compiled(name, mixed, f)(jnp.asarray(x)), np.float64)
    assert worst(result, x.astype(np.float64), f) <= kappa(name, mixed, f)


ATTACKS = {
    "sign_flip": lambda: attacks.sign_flip(10.0),
    "gaussian": lambda: attacks.gaussian(30.0),
    "alie": attacks.alie,
    "ipm": lambda: attacks.ipm(2.0),
    "mimic": lambda: attacks.mimic(3),
    "min_max": lambda: attacks.min_max("std"),
    "min_sum": lambda: attacks.min_sum("sign"),
    "model_replacement": lambda: attacks.model_replacement(50.0),
}


@functools.cache
def poison(attack):
    byzantine = jnp.arange(NUM_CLIENTS) < 3
    made = ATTACKS[attack]()
    return jax.jit(lambda x, key: made.update(x, made.init(x[0]), byzantine=byzantine, key=key)[0])


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_attack_exceeds_the_bounds(attack):
    for seed in range(3):
        honest = jnp.asarray(1 + np.random.default_rng(seed).normal(size=(NUM_CLIENTS, WIDTH)), jnp.float32)
        x = poison(attack)(honest, jax.random.key(seed))
        for name in RULES:
            for mixed in (False, True):
                result = np.asarray(compiled(name, mixed, 3)(x), np.float64)
                found = worst(result, np.asarray(x, np.float64), 3)
                assert found <= kappa(name, mixed, 3), (name, mixed, found)


def test_the_mean_has_no_bound():
    """What the bounds are asked of can be missed."""
    x = draw("far out", np.random.default_rng(0), 3)
    assert worst(x.astype(np.float64).mean(axis=0), x.astype(np.float64), 3) > 100
