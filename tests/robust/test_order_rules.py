"""Median, trimmed mean, MeaMed and Phocas against their definitions."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax import robust
from cedarjax.robust.order import (
    mean_around_median,
    mean_around_trimmed_mean,
    mean_of_nearest,
    median_of,
    nearest_shares,
    trimmed_mean_of,
)
from tests.robust import robust_oracles as oracles

NUM_CLIENTS, WIDTH = 9, 7
KINDS = ["normal", "ties", "equal", "scales", "offset", "outliers"]
RULES = {
    "median": (lambda f: robust.median(), lambda x, w, f: oracles.median(x, w)),
    "trimmed_mean": (robust.trimmed_mean, oracles.trimmed_mean),
    "meamed": (robust.meamed, oracles.meamed),
    "phocas": (robust.phocas, oracles.phocas),
}
COLUMN_RULES = {
    "median": lambda block, w, f: median_of(block, w),
    "trimmed_mean": trimmed_mean_of,
    "meamed": mean_around_median,
    "phocas": mean_around_trimmed_mean,
}


@pytest.fixture(autouse=True)
def fast_compilation(request):
    """Most of the time here is XLA's; the definitions are checked on what a user would run."""
    jax.config.update("jax_disable_most_optimizations", "definition" not in request.node.name)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(name, f, x, weights):
    rule = RULES[name][0](f)
    out, state = rule.update(x, rule.init(x[0]), weights=weights)
    return out, state.info.ok, state.num_nonfinite


def draw(kind, rng, count=NUM_CLIENTS):
    shape = (count, WIDTH)
    normal = rng.normal(size=shape)
    return {
        "normal": normal,
        "ties": rng.integers(-2, 3, size=shape) / 4,
        "equal": np.broadcast_to(normal[:1], shape),
        "scales": normal * 10.0 ** rng.integers(-6, 6, size=WIDTH),
        "offset": 1000 + normal,
        "outliers": np.where(np.arange(count)[:, None] < 2, rng.choice([-1e30, 1e30], size=shape), normal),
    }[kind].astype(np.float32)


def compare(got, x, w, f, name, tol=2e-6):
    want = RULES[name][1](x.astype(np.float64), w.astype(np.float64), f)
    kept = np.sort(np.abs(x), axis=0)[: len(x) - f].max(axis=0)  # attackers are not what rounding is measured by
    error = np.abs(np.asarray(got, np.float64) - want)
    assert (error <= tol * np.maximum(kept, 1e-30)).all(), (error / kept, kept)


@pytest.mark.parametrize("name", RULES)
@hypothesis.settings(max_examples=40)
@hypothesis.given(st.integers(0, 10_000), st.sampled_from(KINDS), st.integers(5, NUM_CLIENTS), st.booleans())
def test_definition_on_the_clients_that_are_present(name, seed, kind, num_present, weighted):
    """Two attackers, any number of present clients that is enough, equal weights or not."""
    rng = np.random.default_rng(seed)
    x = draw(kind, rng)
    there = rng.permutation(NUM_CLIENTS) < num_present
    there[:2] |= kind == "outliers"
    weights = (rng.integers(1, 5, NUM_CLIENTS) if weighted else np.full(NUM_CLIENTS, 3)) * there
    want_of = x[there], weights[there]
    bad = rng.choice([np.nan, np.inf, -np.inf, 1e38], size=(NUM_CLIENTS, WIDTH))
    x = np.where(there[:, None], x, bad).astype(np.float32)
    got, ok, num_nonfinite = run(name, 2, x, weights.astype(np.float32))
    assert ok and num_nonfinite == 0
    compare(got, *want_of, 2, name)


@pytest.mark.parametrize("name", RULES)
def test_rows_that_are_not_finite_are_absent(name):
    x = draw("normal", np.random.default_rng(0))
    x[2, 3], x[6, 0] = np.nan, -np.inf
    got, ok, num_nonfinite = run(name, 2, x, jnp.ones(NUM_CLIENTS))
    assert ok and num_nonfinite == 2
    compare(got, np.delete(x, (2, 6), axis=0), np.ones(7), 2, name)


@hypothesis.given(st.integers(0, 10_000), st.sampled_from(KINDS))
def test_median_with_whole_weights_is_that_of_repeated_rows(seed, kind):
    rng = np.random.default_rng(seed)
    x, repeats = draw(kind, rng), rng.integers(0, 4, NUM_CLIENTS)
    repeats[4] = 1
    got, _, _ = run("median", 0, x, repeats.astype(np.float32))
    want = np.median(np.repeat(x.astype(np.float64), repeats, axis=0), axis=0)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.1, 1 / 3, 7e-9, 3e8])
def test_median_of_balanced_weights_whatever_their_scale(scale):
    """Weights that should cut the mass in half need not do so to the last bit."""
    x = np.tile(2.0 ** np.arange(NUM_CLIENTS, dtype=np.float32)[:, None], WIDTH)  # 1, 2, 4, 8, ...
    for weights, want in (
        ([1.0] * 6, 6.0),
        ([0.7, 0.2, 0.1, 0.3, 0.3, 0.4], 6.0),
        ([0.7, 0.2, 0.2, 0.3, 0.3, 0.4], 4.0),
    ):
        got, _, _ = run("median", 2, x, scale * jnp.array(weights + [0.0] * 3))
        assert (got == want).all()


@pytest.mark.parametrize("name", ["trimmed_mean", "meamed", "phocas"])
@hypothesis.settings(max_examples=15)
@hypothesis.given(st.integers(0, 10_000), st.sampled_from(KINDS[:-1]), st.booleans())
def test_without_attackers_it_is_the_mean(name, seed, kind, weighted):
    rng = np.random.default_rng(seed)
    x = draw(kind, rng)
    weights = rng.uniform(1, 3, NUM_CLIENTS) if weighted else np.ones(NUM_CLIENTS)
    got, _, _ = run(name, 0, x, weights.astype(np.float32))
    np.testing.assert_allclose(got, oracles.mean(x, weights), rtol=0, atol=2e-6 * np.abs(x).max())


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("num_present", [1, 2, 3, 4])
def test_too_few_by_values_give_the_median_and_say_so(name, num_present):
    rng = np.random.default_rng(num_present)
    x = draw("normal", rng)
    for weights in (np.ones(NUM_CLIENTS), rng.integers(1, 4, NUM_CLIENTS)):
        there = rng.permutation(NUM_CLIENTS) < num_present
        got, ok, _ = run(name, 2, np.where(there[:, None], x, np.nan), (weights * there).astype(np.float32))
        assert bool(ok) == (name == "median")
        np.testing.assert_allclose(got, oracles.median(x[there].astype(np.float64), weights[there]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_nobody_gives_zeros_and_says_so(name):
    got, ok, num_nonfinite = run(name, 2, np.full((NUM_CLIENTS, WIDTH), np.nan, np.float32), jnp.ones(NUM_CLIENTS))
    assert not ok and num_nonfinite == NUM_CLIENTS and not np.any(got)


@pytest.mark.parametrize("name", ["trimmed_mean", "meamed", "phocas"])
def test_too_few_by_shape(name):
    make = RULES[name][0]
    with pytest.raises(ValueError, match=r"f must satisfy 2 \* f < num_clients, got f = 2 and num_clients = 4\."):
        jax.eval_shape(lambda x: make(2).update(x, make(2).init(x))[0], jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="f must be at least 0, got -1"):
        make(-1)
    for bad in (1.0, True, None):
        with pytest.raises(TypeError, match="f must be an int"):
            make(bad)


@pytest.mark.parametrize("name", ["meamed", "phocas"])
def test_of_numbers_equally_far_those_below_come_first(name):
    column = np.float32([9.0, 2.0, 4.0, 3.0, 2.5])  # the centre is 3 either way; 2 and 4 are as far
    x = np.tile(np.append(column, [np.nan] * 4)[:, None], WIDTH).astype(np.float32)
    for weights, want in (([1.0] * 5, 2.5), ([2.0, 2.0, 2.0, 2.0, 4.0], 2.5), ([2.0, 3.0, 9.0, 9.0, 3.0], 81 / 30)):
        got, _, _ = run(name, 2, x, jnp.array(weights + [0.0] * 4))
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_meamed_is_a_window_of_the_sorted_column():
    """Of the windows of `n - f` numbers, the first whose farther end is nearest to the median."""
    x = draw("normal", np.random.default_rng(5)).astype(np.float64)
    for f in (1, 2, 4):
        for column, got in zip(np.sort(x, axis=0).T, oracles.meamed(x, np.ones(NUM_CLIENTS), f), strict=True):
            middle = np.median(column)
            farther = [max(middle - column[j], column[j + NUM_CLIENTS - f - 1] - middle) for j in range(f + 1)]
            start = int(np.argmin(farther))
            np.testing.assert_allclose(got, column[start : start + NUM_CLIENTS - f].mean(), rtol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_numbers_beside_huge_ones_keep_their_digits(name):
    """A sum less its extremes would lose them."""
    column = np.float32([3e38, 1, 2, 3, 4, 5, 6, 7, -3e38])
    got, ok, _ = run(name, 2, np.tile(column[:, None], WIDTH), jnp.ones(NUM_CLIENTS))
    assert ok
    np.testing.assert_allclose(got, 4.0, rtol=1e-6)


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(name, x, weights, direction):
    def along(x):
        value = COLUMN_RULES[name](x, weights, 2)
        return value @ direction, value

    gradient, value = jax.grad(along, has_aux=True)(x)
    return value, gradient


@pytest.mark.slow
@pytest.mark.parametrize("name", COLUMN_RULES)
def test_gradient_is_that_of_the_definition(name):
    """By finite differences, with the centre and the choice held where they are."""
    rng = np.random.default_rng(3)
    x = draw("normal", rng)
    x[4] = np.nan
    there = np.arange(NUM_CLIENTS) != 4
    direction = rng.normal(size=WIDTH)
    wide = x[there].astype(np.float64)
    for weights in (np.ones(8), rng.integers(1, 4, 8).astype(np.float64)):
        centre = {"meamed": oracles.median(wide, weights), "phocas": oracles.trimmed_mean(wide, weights, 2)}.get(name)

        def definition(x, weights=weights, centre=centre):
            if centre is None:
                return RULES[name][1](x, weights, 2)
            return oracles.mean_of_nearest(x, weights, centre, 6)

        want = np.zeros_like(wide)
        for i in range(8):
            step = np.zeros_like(wide)
            step[i] = 1e-6
            want[i] = (definition(wide + step) - definition(wide - step)) / 2e-6 * direction
        given = np.insert(weights, 4, 0).astype(np.float32)
        _, got = value_and_grad(name, x, given, jnp.asarray(direction, jnp.float32))
        np.testing.assert_allclose(got[there], want, atol=1e-5)
        assert not np.any(got[4])


@pytest.mark.parametrize("name", COLUMN_RULES)
def test_shares_of_ties_and_of_too_few(name):
    """The gradients along a column add up to 1, and weigh its numbers to the value."""
    ties = np.random.default_rng(0).integers(0, 2, size=(NUM_CLIENTS, WIDTH)).astype(np.float32)
    for x, weights in (
        (ties, np.ones(NUM_CLIENTS)),
        (ties, np.arange(1.0, 10.0)),
        (0 * ties, np.ones(NUM_CLIENTS)),
        (ties + np.arange(9)[:, None], np.array([1.0, 3.0, 2.0] + [0.0] * 6)),
        (ties + np.arange(9)[:, None], np.array([1.0, 1.0] + [0.0] * 7)),
    ):
        value, shares = value_and_grad(name, x.astype(np.float32), weights.astype(np.float32), jnp.ones(WIDTH))
        np.testing.assert_allclose(shares.sum(axis=0), 1, rtol=1e-6)
        assert (np.asarray(shares) >= 0).all() and not np.any(shares[weights == 0])
        np.testing.assert_allclose((shares * x).sum(axis=0), value, rtol=1e-6)


def test_gradient_through_a_rule():
    """Through the whole aggregator, absent clients included."""
    rule = robust.trimmed_mean(1)
    x = {"a": jnp.array([[1.0, 9.0], [2.0, 3.0], [4.0, 7.0], [900.0, 5.0], [jnp.nan, 1.0]])}
    got = jax.jit(jax.grad(lambda x: rule.update(x, rule.init(x))[0]["a"].sum()))(x)["a"]
    np.testing.assert_allclose(got, [[0, 0], [0.5, 0], [0.5, 0.5], [0, 0.5], [0, 0]], atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_a_batch_of_cohorts(name):
    rng = np.random.default_rng(6)
    x = np.stack([draw(kind, rng) for kind in ("normal", "ties", "offset")])
    weights = np.stack([np.ones(NUM_CLIENTS), rng.integers(1, 4, NUM_CLIENTS), (np.arange(NUM_CLIENTS) < 7) * 1.0])
    got, ok, _ = jax.vmap(functools.partial(run, name, 2))(x, jnp.asarray(weights, jnp.float32))
    assert ok.all()
    for one, rows, w in zip(got, x, weights, strict=True):
        compare(one, rows[w > 0], w[w > 0], 2, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_half_precision_is_ranked_and_averaged_wide(name):
    x = jnp.asarray(draw("normal", np.random.default_rng(7)), jnp.bfloat16)
    got, _, _ = run(name, 2, x, jnp.ones(NUM_CLIENTS))
    assert got.dtype == jnp.bfloat16
    want = RULES[name][1](np.asarray(x, np.float64), np.ones(NUM_CLIENTS), 2)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("weighted", [False, True])
def test_double_precision(name, weighted, x64):
    rng = np.random.default_rng(8)
    x = rng.normal(size=(NUM_CLIENTS, WIDTH))
    weights = rng.uniform(1, 2, NUM_CLIENTS) if weighted else np.ones(NUM_CLIENTS)
    got, _, _ = run(name, 2, jnp.asarray(x), jnp.asarray(weights))
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, RULES[name][1](x, weights, 2), rtol=0, atol=1e-12)


def test_a_centre_may_be_given():
    x = np.random.default_rng(9).normal(size=(NUM_CLIENTS, WIDTH)).astype(np.float32)
    centre = np.linspace(-3, 3, WIDTH).astype(np.float32)
    for weights in (np.ones(NUM_CLIENTS), np.arange(1.0, 10.0)):
        w = jnp.asarray(weights, jnp.float32)
        got = mean_of_nearest(jnp.asarray(x), w, jnp.asarray(centre), jnp.array(4.0))
        want = oracles.mean_of_nearest(x.astype(np.float64), weights, centre.astype(np.float64), 4)
        np.testing.assert_allclose(got, want, rtol=0, atol=4e-6)
        shares = nearest_shares(jnp.asarray(x), w, jnp.asarray(centre), jnp.array(4.0))
        np.testing.assert_allclose((shares * x).sum(axis=0), want, rtol=0, atol=4e-6)
        assert ((np.asarray(shares) > 0).sum(axis=0) == 4).all()


def test_layers_that_clients_left_out():
    rng = np.random.default_rng(10)
    x = {"a": draw("normal", rng), "b": draw("normal", rng)[:, :2]}
    masks = {"a": np.array([1, 1, 1, 0, 1, 1, 1, 1, 1.0]), "b": np.array([0, 1, 0, 1, 2, 0, 1, 2, 1.0])}
    rule = robust.trimmed_mean(1)
    unread = {k: jnp.asarray(np.where(masks[k][:, None] > 0, x[k], np.nan)) for k in x}
    weights = {k: jnp.asarray(m, jnp.float32) for k, m in masks.items()}
    got, state = jax.jit(rule.update)(unread, rule.init(x), weights=weights)
    assert state.info.ok and state.num_nonfinite == 0
    for k in x:
        there = masks[k] > 0
        want = oracles.trimmed_mean(x[k][there].astype(np.float64), masks[k][there], 1)
        np.testing.assert_allclose(got[k], want, rtol=0, atol=5e-6)
