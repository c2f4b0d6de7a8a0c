"""The covariance filter against the same on the covariance matrix itself, in numpy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.robust.caf import caf


def by_hand(rows, weights, f, max_over):
    """The filtered mean and the number of steps."""
    n, kept, best, least, steps = len(rows), np.ones(len(rows)), weights @ rows / weights.sum(), np.inf, 0
    while kept.sum() > n - 2 * f + 1e-9 and steps < 10_000:
        shares = kept * weights / (kept * weights).sum()
        mean = shares @ rows
        values, vectors = np.linalg.eigh(((rows - mean) * shares[:, None]).T @ (rows - mean))
        if values[-1] < least:
            best, least = mean, values[-1]
        away = np.square((rows - mean) @ vectors[:, -1])
        farthest = away.max() if max_over == "all" else away[kept > 0].max()
        if farthest < 1e-20:
            break
        kept, steps = kept * np.where(away > farthest * (1 - 1e-7), 0, 1 - away / farthest), steps + 1
    return best, steps


def aggregate(rule, rows, weights=None, dtype=jnp.float32):
    out, state = jax.jit(rule.update)({"a": jnp.asarray(rows, dtype)}, rule.init(None), weights=weights)
    return np.asarray(out["a"], np.float64), state


def inputs(kind, seed):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(10, 6)) * np.array([3, 2, 1, 1, 1, 0.5])
    if kind == "shifted":
        rows[:3] += 4
    elif kind == "far":
        rows[[1, 7]] *= 12
    elif kind == "colluding":
        rows[6:9] = rows[6] * 5
    elif kind == "offset":
        rows += 30
    return rows.astype(np.float32).astype(np.float64)


KINDS = ["normal", "shifted", "far", "colluding", "offset"]


@pytest.mark.parametrize("max_over", ["all", "kept"])
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_covariance_matrix(kind, max_over):
    weights = np.array([1, 2, 1, 1, 0.5, 1, 1, 3, 1, 1])
    plain, weighted = caf(3, max_over=max_over), caf(2, max_over=max_over)
    for seed in range(4):
        rows = inputs(kind, seed)
        for rule, f, w in ((plain, 3, np.ones(10)), (weighted, 2, weights)):
            wanted, _ = by_hand(rows, w, f, max_over)
            out, state = aggregate(rule, rows, jnp.asarray(w, jnp.float32))
            np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
            assert state.info.ok


@pytest.mark.parametrize("max_over", ["all", "kept"])
@pytest.mark.parametrize("kind", KINDS)
def test_double_precision(x64, kind, max_over):
    rows = inputs(kind, 7)
    wanted, steps = by_hand(rows, np.ones(10), 3, max_over)
    out, _ = aggregate(caf(3, max_over=max_over), rows, dtype=jnp.float64)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())
    assert 1 < steps and (max_over == "all" or steps <= 10)


def test_measured_against_the_kept_it_is_quick_however_far_out_a_client_is():
    rows = inputs("normal", 0)
    rows[2, 3] = 1e9
    out, state = aggregate(caf(1, max_over="kept"), rows)
    assert state.info.coefficients[2] == 0 and np.abs(out).max() < 5
    out, state = aggregate(caf(1), rows)
    assert state.info.coefficients[2] == 0 and np.abs(out).max() < 5


@pytest.mark.slow
@pytest.mark.parametrize("max_over", ["all", "kept"])
@pytest.mark.parametrize("f", [0, 2])
def test_equal_updates_and_no_attackers_give_the_mean(f, max_over):
    rows, rule = np.full((6, 3), 1 / 3), caf(f, max_over=max_over)
    np.testing.assert_allclose(aggregate(rule, rows)[0], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(aggregate(rule, np.zeros((6, 3)))[0], 0)
    rows = inputs("normal", 0)[:6]
    np.testing.assert_allclose(aggregate(caf(0, max_over=max_over), rows)[0], rows.mean(axis=0), atol=1e-6)


def test_scales_from_tiny_to_huge():
    rows = inputs("shifted", 1)
    wanted, _ = by_hand(rows, np.ones(10), 3, "all")
    for scale in (1e-15, 1e15):
        out, _ = aggregate(caf(3), rows * scale)
        np.testing.assert_allclose(out / scale, wanted, atol=2e-5 * np.abs(wanted).max())


def test_absent_and_broken_clients():
    rows = inputs("shifted", 2)
    broken = rows.copy()
    broken[4], broken[8, 0] = np.nan, np.inf
    weights = np.array([1, 1, 1, 1, 0, 2, 1, 1, 1, 1.0])
    here = [0, 1, 2, 3, 5, 6, 7, 9]
    out, state = aggregate(caf(2), broken, jnp.asarray(weights, jnp.float32))
    wanted, _ = by_hand(rows[here], weights[here], 2, "all")
    np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    assert state.num_nonfinite == 1 and not state.info.coefficients[np.array([4, 8])].any()


def test_too_few_that_are_there_get_the_median():
    rows = inputs("normal", 3)[:6]
    out, state = aggregate(caf(2), rows, jnp.array([1.0, 1, 0, 1, 0, 1]))
    np.testing.assert_allclose(out, np.median(rows[[0, 1, 3, 5]], axis=0), rtol=1e-6)
    assert not state.info.ok


def test_gradients_take_the_coefficients_as_given():
    rule, rows = caf(2), jnp.asarray(inputs("shifted", 0), jnp.float32)
    grad = jax.jit(jax.grad(lambda x: rule.update({"a": x}, rule.init(None))[0]["a"][0]))(rows)
    coefficients = aggregate(rule, rows)[1].info.coefficients
    np.testing.assert_allclose(grad[:, 0], coefficients, rtol=1e-6)
    assert not grad[:, 1:].any()


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="max_over must be 'all' or 'kept', got 'some'"):
        caf(1, max_over="some")
    with pytest.raises(ValueError, match="f must be at least 0"):
        caf(-1)
    with pytest.raises(ValueError, match="2 \\* f < num_clients, got f = 5 and num_clients = 10"):
        aggregate(caf(5), inputs("normal", 0))
