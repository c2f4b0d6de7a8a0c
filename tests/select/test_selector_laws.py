"""Every selector against every law of the contract; a new one gets all of them by one row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cedarjax as cj
from cedarjax.core.dataset import ABSENT_ID

N, C = 6, 3


def read(info):
    return info["loss"]


def trace():
    return np.array([[1, 1, 0, 1, 1, 0], [0, 1, 1, 0, 1, 1]], bool)


SELECTORS = {
    "uniform": lambda: cj.select.uniform(C),
    "weighted": lambda: cj.select.weighted(C, jnp.array([1.0, 2.0, 0.0, 4.0, 1.0, 0.5])),
    "ranked": lambda: cj.select.ranked(C, jnp.array([1.0, 2.0, 0.0, 4.0, 1.0, jnp.nan])),
    "bernoulli": lambda: cj.select.bernoulli(0.5, C),
    "power_of_choice": lambda: cj.select.power_of_choice(C, 5, jnp.arange(1.0, 7.0), loss_fn=read),
    "importance": lambda: cj.select.importance(C, signal_fn=read),
    "importance_unbiased": lambda: cj.select.importance(C, unbiased=True, signal_fn=read),
    "available": lambda: cj.select.available(cj.select.power_of_choice(C, 5, loss_fn=read), trace()),
}
every_selector = pytest.mark.parametrize("name", SELECTORS)


def three_rounds(selector, key, available):
    """Selections and the last state; each place tells a loss that depends on who is in it."""
    state, selections = selector.init(N), []
    for r in range(3):
        selection, state = selector.select(state, jax.random.fold_in(key, r), available)
        state = selector.observe(state, selection, {"loss": (selection.client_id % 5).astype(jnp.float32)})
        selections.append(selection)
    return selections, state


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


@pytest.mark.slow
@every_selector
def test_jit_and_no_jit_and_vmap(name):
    keys, everyone = jax.random.split(jax.random.key(0), 3), jnp.ones(N, bool)
    alone = [three_rounds(SELECTORS[name](), key, everyone) for key in keys]
    compiled = jax.jit(lambda key: three_rounds(SELECTORS[name](), key, everyone))
    for key, want in zip(keys, alone, strict=True):
        assert_same(compiled(key), want)
    together = jax.vmap(lambda key: three_rounds(SELECTORS[name](), key, everyone))(keys)
    assert_same(together, jax.tree.map(lambda *x: jnp.stack(x), *alone))


@every_selector
@pytest.mark.parametrize("mask", [[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 1], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
def test_only_those_available_each_once_at_static_places(name, mask):
    available = jnp.array(mask, bool)
    for seed in range(5):
        selections, _ = three_rounds(SELECTORS[name](), jax.random.key(seed), available)
        for client_id, weights in selections:
            assert client_id.shape == weights.shape == (C,)
            assert client_id.dtype == jnp.int32 and weights.dtype == jnp.float32
            assert np.isfinite(weights).all() and (weights >= 0).all()
            chosen = client_id[weights > 0].tolist()
            assert len(set(chosen)) == len(chosen) and all(mask[i] for i in chosen)
            assert (client_id[weights == 0] == ABSENT_ID).all()


@every_selector
def test_the_state_keeps_its_shape_in_a_scan(name):
    selector, everyone = SELECTORS[name](), jnp.ones(N, bool)

    def one(state, key):
        selection, state = selector.select(state, key, everyone)
        return selector.observe(state, selection, {"loss": jnp.ones(C)}), selection

    state, selections = jax.lax.scan(one, selector.init(N), jax.random.split(jax.random.key(0), 4))
    assert jax.tree.structure(state) == jax.tree.structure(selector.init(N)) and selections.client_id.shape == (4, C)


@every_selector
def test_the_dtypes_with_64_bits(name, x64):
    selections, state = three_rounds(SELECTORS[name](), jax.random.key(0), jnp.ones(N, bool))
    assert all(s.client_id.dtype == jnp.int32 and s.weights.dtype == jnp.float32 for s in selections)
    assert all(leaf.dtype in (jnp.int32, jnp.float32) for leaf in jax.tree.leaves(state))


@every_selector
def test_broken_reports_do_no_harm(name):
    selector, everyone = SELECTORS[name](), jnp.ones(N, bool)
    state = selector.init(N)
    for r in range(3):
        selection, state = selector.select(state, jax.random.key(r), everyone)
        state = selector.observe(state, selection, {"loss": jnp.array([jnp.nan, jnp.inf, -jnp.inf])})
    assert np.isfinite(selection.weights).all()
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(state))


EVERYBODY = np.ones(N, bool)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cj.select.uniform(0), "num_selected must be at least 1, got 0"),
        (lambda: cj.select.uniform(7), r"num_selected must satisfy 1 <= num_selected <= 6 \(all clients\), got 7"),
        (lambda: cj.select.weighted(2, [1.0, 2.0]), r"weights must have shape \[N\] = \[6\], got \(2,\)"),
        (lambda: cj.select.ranked(2, np.float32(1.0)), r"scores must have shape \[N\] = \[6\], got \(\)"),
        (lambda: cj.select.bernoulli(-0.5, 2), "probability must satisfy 0 <= probability <= 1, got -0.5"),
        (lambda: cj.select.bernoulli(0.5, 0), "max_selected must be at least 1, got 0"),
        (lambda: cj.select.bernoulli(0.5, 9), "max_selected must satisfy 1 <= max_selected <= 6"),
        (lambda: cj.select.bernoulli(np.zeros(3), 2), r"probability must have shape \[N\] = \[6\], got \(3,\)"),
        (lambda: cj.select.power_of_choice(3, 2), "num_selected <= num_candidates, got 3 and 2"),
        (lambda: cj.select.power_of_choice(2, 8), "num_candidates must satisfy 1 <= num_candidates <= 6"),
        (lambda: cj.select.power_of_choice(2, 3, [1.0]), r"weights must have shape \[N\] = \[6\], got \(1,\)"),
        (lambda: cj.select.importance(7), "num_selected must satisfy 1 <= num_selected <= 6"),
        (lambda: cj.select.importance(7, unbiased=True), "num_selected must satisfy 1 <= num_selected <= 6"),
        (lambda: cj.select.importance(2, uniform_share=1.5), "uniform_share must satisfy 0 <= uniform_share <= 1"),
        (lambda: cj.select.importance(2, uniform_share=0, unbiased=True), "uniform_share must be positive if unbiased"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        selector = make()
        selector.select(selector.init(N), jax.random.key(0), jnp.asarray(EVERYBODY))
