"""Rules on the lengths of updates, `cge` and `norm_clip`, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cedarjax.core.mixture import Mixture
from cedarjax.robust.cge import cge
from cedarjax.robust.norm_clip import norm_clip


def tree_of(rows, dtype=jnp.float32):
    return {"a": jnp.asarray(rows[:, :4].reshape(-1, 2, 2), dtype), "b": jnp.asarray(rows[:, 4:], dtype)}


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in jax.tree.leaves(tree)])


def aggregate(rule, updates, weights=None):
    return jax.jit(rule.update)(updates, rule.init(None), weights=weights)


def shortest(rows, weights, f):
    """The mean of the shortest, and who they are."""
    here = [i for i in range(len(rows)) if weights[i] > 0 and np.isfinite(rows[i]).all()]
    chosen = sorted(sorted(here, key=lambda i: (np.linalg.norm(rows[i]), i))[: len(here) - f])
    return weights[chosen] @ rows[chosen] / weights[chosen].sum(), chosen


def clipped(rows, weights, max_norm):
    here = [i for i in range(len(rows)) if weights[i] > 0 and np.isfinite(rows[i]).all()]
    if not here:
        return np.zeros(rows.shape[1])
    factors = np.array([min(1, max_norm / max(np.linalg.norm(rows[i]), 1e-300)) for i in here])
    return (weights[here] * factors) @ rows[here] / weights[here].sum()


ROWS = np.random.default_rng(0).normal(size=(7, 9)).astype(np.float32).astype(np.float64)
ROWS[2], ROWS[5] = 0, ROWS[1]
CGE, CLIP = cge(2), norm_clip(2.5)
CGE_UPDATE, CLIP_UPDATE = jax.jit(CGE.update), jax.jit(CLIP.update)


@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.5, 7.0]), min_size=7, max_size=7),
    st.lists(st.sampled_from([1.0, 1.0, 3.0, 1e5, np.nan, -np.inf]), min_size=7, max_size=7),
)
def test_against_numpy(weights, scales):
    weights, rows = np.array(weights), ROWS.copy()
    rows *= np.where(np.isfinite(scales), scales, 1)[:, None]
    rows[~np.isfinite(scales), 3] = np.array(scales)[~np.isfinite(scales)]
    here = (weights > 0) & np.isfinite(rows).all(axis=1)
    out, state = CLIP_UPDATE(tree_of(rows), CLIP.init(None), weights=jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(flat(out), clipped(rows, weights, 2.5), rtol=0, atol=3e-6)
    assert state.info.ok == here.any()
    assert state.num_nonfinite == ((weights > 0) & ~here).sum()
    out, state = CGE_UPDATE(tree_of(rows), CGE.init(None), weights=jnp.asarray(weights, jnp.float32))
    assert state.info.ok == (here.sum() >= 5)
    if here.sum() >= 5:
        wanted, chosen = shortest(rows, weights, 2)
        np.testing.assert_allclose(flat(out), wanted, rtol=0, atol=2e-6 * max(1, np.abs(wanted).max()))
        assert np.flatnonzero(state.info.coefficients).tolist() == chosen
    else:
        assert np.isfinite(flat(out)).all() and not state.info.coefficients.any()


def test_too_few_that_are_there_get_the_median():
    weights = jnp.array([1.0, 1, 0, 0, 0, 0, 1])
    out, state = aggregate(cge(2), tree_of(ROWS), weights)
    np.testing.assert_allclose(flat(out), np.median(ROWS[[0, 1, 6]], axis=0), rtol=1e-6)
    assert not state.info.ok


def test_equally_short_ones_leave_from_behind():
    rows = np.eye(6, 9)
    _, state = aggregate(cge(2), tree_of(rows))
    assert np.flatnonzero(state.info.coefficients).tolist() == [0, 1, 2, 3]
    out, _ = aggregate(cge(0), tree_of(rows))
    np.testing.assert_allclose(flat(out), rows.mean(axis=0), rtol=1e-6)
    aggregate(cge(2), tree_of(rows[:5]))  # the least that will do


def test_double_precision(x64):
    rows = np.random.default_rng(1).normal(size=(7, 9)) + 3
    for rule, wanted in ((cge(2), shortest(rows, np.ones(7), 2)[0]), (norm_clip(2.0), clipped(rows, np.ones(7), 2.0))):
        out, _ = aggregate(rule, tree_of(rows, jnp.float64))
        np.testing.assert_allclose(flat(out), wanted, rtol=1e-13)


def test_lengths_of_masked_layers_are_scaled():
    weights = {"a": jnp.array([1.0, 1, 0, 2, 1, 1, 1]), "b": jnp.array([1.0, 0, 1, 1, 1, 1, 1])}
    sent = np.stack([np.asarray(weights["a"])] * 4 + [np.asarray(weights["b"])] * 5, axis=1)
    lengths = np.sqrt((np.square(ROWS) * (sent > 0)).sum(axis=1) * 9 / (sent > 0).sum(axis=1))
    factors = np.minimum(1, 2.5 / np.maximum(lengths, 1e-300))
    out, _ = aggregate(norm_clip(2.5), tree_of(ROWS), weights)
    np.testing.assert_allclose(flat(out), (sent * factors[:, None] * ROWS).sum(axis=0) / sent.sum(axis=0), atol=1e-6)
    _, state = aggregate(cge(2), tree_of(ROWS), weights)
    kept = np.sort(np.argsort(lengths, kind="stable")[:5])
    assert np.flatnonzero(state.info.coefficients).tolist() == kept.tolist()


@pytest.mark.parametrize("rule", [cge(1), norm_clip(1.5)])
def test_rows_that_are_mixtures_of_others(rule):
    matrix = np.random.default_rng(2).dirichlet(np.ones(7), size=5).astype(np.float32)
    mixture = Mixture.of(jnp.asarray(matrix), tree_of(ROWS))
    out, state = rule.update(mixture, rule.init(None))
    wanted, want_state = rule.update(tree_of(matrix.astype(np.float64) @ ROWS), rule.init(None))
    np.testing.assert_allclose(flat(out), flat(wanted), atol=1e-6)
    np.testing.assert_allclose(state.info.coefficients, want_state.info.coefficients, atol=1e-6)


def test_gradients_of_clipping_are_finite_at_zero_and_right_elsewhere(x64):
    def loss(rows):
        return CLIP.update({"a": rows}, CLIP.init(None))[0]["a"].sum()

    assert jnp.isfinite(jax.grad(loss)(jnp.zeros((3, 2)))).all()
    rows, direction = ROWS.copy(), np.random.default_rng(0).normal(size=ROWS.shape)
    slope = jnp.vdot(jax.grad(loss)(jnp.asarray(rows)), jnp.asarray(direction))
    ahead, behind = (clipped(rows + h * direction, np.ones(7), 2.5).sum() for h in (1e-6, -1e-6))
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, rtol=1e-6)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="max_norm must be above 0"):
        norm_clip(0.0)
    with pytest.raises(ValueError, match="f must be at least 0"):
        cge(-1)
    with pytest.raises(TypeError, match="f must be an int"):
        cge(1.0)
    with pytest.raises(ValueError, match="2 \\* f < num_clients, got f = 4 and num_clients = 7"):
        cge(4).update(tree_of(ROWS), cge(4).init(None))
