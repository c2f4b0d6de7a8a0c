"""Weiszfeld's iteration in the space of inner products against the same on the vectors, in numpy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.robust.geometric_median import geometric_median, sq_distances_to

SHAPES = {"a": (4, 3), "b": (5,)}


def tree_of(rows, dtype=jnp.float32):
    return {"a": jnp.asarray(rows[:, :12].reshape(-1, 4, 3), dtype), "b": jnp.asarray(rows[:, 12:], dtype)}


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in jax.tree.leaves(tree)])


def by_hand(rows, weights, smoothing, num_iters, start):
    point = weights @ rows / weights.sum() if start == "mean" else np.zeros(rows.shape[1])
    for _ in range(num_iters):
        shares = weights / np.maximum(np.linalg.norm(rows - point, axis=1), smoothing)
        point = shares @ rows / shares.sum()
    return point


def aggregate(rule, updates, weights=None):
    return jax.jit(rule.update)(updates, rule.init(None), weights=weights)


def inputs(name):
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(9, 17))
    if name == "outliers":
        rows[:3] += 1e3
    elif name == "one very far out":
        rows[4] *= 1e6
    elif name == "most of them equal":
        rows[2:8] = rows[1]
    elif name == "offset":
        rows += 50
    return rows


NAMES = ["plain", "outliers", "one very far out", "most of them equal", "offset"]


@pytest.mark.parametrize("start", ["mean", "zero"])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_weiszfeld_on_the_vectors(name, start):
    rows = np.asarray(inputs(name), np.float32).astype(np.float64)
    weights = np.arange(1, 10) / 3
    for smoothing, num_iters in ((0.1, 3), (1e-6, 100)):
        rule = geometric_median(smoothing, num_iters, start)
        out, state = aggregate(rule, tree_of(rows), jnp.asarray(weights, jnp.float32))
        wanted = by_hand(rows, weights, smoothing, num_iters, start)
        np.testing.assert_allclose(flat(out), wanted, rtol=0, atol=4e-6 * np.abs(wanted).max())
        assert state.info.ok and state.num_nonfinite == 0
        np.testing.assert_allclose(state.info.coefficients.sum(), 1, rtol=1e-6)


@pytest.mark.parametrize("start", ["mean", "zero"])
@pytest.mark.parametrize("name", NAMES)
def test_double_precision(x64, name, start):
    rows = inputs(name)
    out, _ = aggregate(geometric_median(0.05, 30, start), tree_of(rows, jnp.float64))
    wanted = by_hand(rows, np.ones(9), 0.05, 30, start)
    np.testing.assert_allclose(flat(out), wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())


@pytest.mark.parametrize("start", ["mean", "zero"])
def test_absent_and_broken_clients_count_for_nothing(start):
    rows = inputs("outliers").astype(np.float32)
    holed = rows.copy()
    holed[1], holed[5, 2], holed[7, 16] = np.nan, np.inf, np.nan
    weights = np.array([1, 0, 2, 1, 1, 1, 3, 1, 1], np.float32)
    rule = geometric_median(1e-6, 50, start)
    out, state = aggregate(rule, tree_of(holed), jnp.asarray(weights))
    here = [0, 2, 3, 4, 6, 8]
    wanted = by_hand(rows[here].astype(np.float64), weights[here], 1e-6, 50, start)
    np.testing.assert_allclose(flat(out), wanted, rtol=0, atol=4e-6 * np.abs(wanted).max())
    assert state.info.nonfinite.tolist() == [False] * 5 + [True, False, True, False]
    assert state.num_nonfinite == 2
    assert (state.info.coefficients[np.array([1, 5, 7])] == 0).all()


def test_layers_that_were_left_out_start_from_scaled_lengths():
    rows = inputs("plain").astype(np.float32)
    weights = {"a": jnp.ones(9), "b": jnp.ones(9).at[0].set(0)}
    out, _ = aggregate(geometric_median(1e-6, 1, "zero"), tree_of(rows), weights)
    squares = np.square(rows.astype(np.float64))
    lengths = np.sqrt([squares[0, :12].sum() * 17 / 12, *squares[1:].sum(axis=1)])
    shares = 1 / lengths / (1 / lengths).sum()
    np.testing.assert_allclose(flat(out)[:12], shares @ rows[:, :12], atol=1e-6)
    np.testing.assert_allclose(flat(out)[12:], shares[1:] @ rows[1:, 12:] / shares[1:].sum(), atol=1e-6)


@pytest.mark.parametrize("start", ["mean", "zero"])
def test_equal_updates_nobody_and_one(start):
    rule = geometric_median(start=start)
    rows = np.tile(inputs("plain")[:1], (9, 1)).astype(np.float32)
    out, _ = aggregate(rule, tree_of(rows))
    np.testing.assert_allclose(flat(out), rows[0], rtol=1e-6)
    out, state = aggregate(rule, tree_of(rows), jnp.zeros(9))
    assert not flat(out).any() and not state.info.ok
    out, _ = aggregate(rule, tree_of(rows[:1]))
    np.testing.assert_allclose(flat(out), rows[0], rtol=1e-6)


@pytest.mark.parametrize("start", ["mean", "zero"])
def test_gradients_go_through_the_steps(x64, start):
    rule = geometric_median(0.05, 4, start)
    rows, direction = inputs("plain"), np.random.default_rng(0).normal(size=(9, 17))
    target = np.random.default_rng(1).normal(size=17)

    def loss(rows):
        return jnp.asarray(target) @ rule.update({"a": rows}, rule.init(None))[0]["a"]

    slope = jnp.vdot(jax.jit(jax.grad(loss))(jnp.asarray(rows)), jnp.asarray(direction))
    ahead, behind = (target @ by_hand(rows + h * direction, np.ones(9), 0.05, 4, start) for h in (1e-6, -1e-6))
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["mean", "zero"])
@pytest.mark.parametrize("rows", [np.zeros((4, 3)), np.ones((4, 3)), np.eye(4, 3)])
def test_gradients_are_finite_where_distances_vanish(rows, start):
    rule = geometric_median(num_iters=3, start=start)
    slope = jax.jit(jax.grad(lambda x: rule.update({"a": x}, rule.init(None))[0]["a"].sum()))
    grad = slope(jnp.asarray(rows, jnp.float32))
    assert jnp.isfinite(grad).all()


def test_distances_keep_their_digits_next_to_a_client():
    rows = np.random.default_rng(0).normal(size=(4, 6))
    coefficients = np.array([1 - 3e-5, 1e-5, 1e-5, 1e-5])
    got = sq_distances_to(jnp.asarray(rows @ rows.T, jnp.float32), jnp.asarray(coefficients, jnp.float32))
    wanted = np.square(rows - coefficients @ rows).sum(axis=1)
    np.testing.assert_allclose(got[0], wanted[0], rtol=0.02)  # |x|^2 times rounding would be a thousand times more
    np.testing.assert_allclose(got[1:], wanted[1:], rtol=1e-5)


@pytest.mark.parametrize("wrong", [{"smoothing": 0.0}, {"num_iters": 0}, {"start": "median"}])
def test_arguments_are_checked(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be"):
        geometric_median(**wrong)
