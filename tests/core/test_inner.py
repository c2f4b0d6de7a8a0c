"""Inner products about a centre, judged by the distances that follow from them."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cedarjax.core import LowRank, dense
from cedarjax.core.inner import centered_gram, products, with_inner
from cedarjax.core.mixture import Mixture
from cedarjax.core.trees import gram

NUM_CLIENTS, SHAPES = 10, {"a": (7, 9), "b": (40,), "c": (), "d": (0,)}


def make_updates(seed=0, count=NUM_CLIENTS, offset=0.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {k: (offset + rng.normal(size=(count, *shape))).astype(dtype) for k, shape in SHAPES.items()}


def flat(updates):
    return np.concatenate(
        [np.asarray(x, np.float64).reshape(len(x), -1) for x in jax.tree.leaves(dense(updates))], axis=1
    )


def distances(gram):
    gram = np.asarray(gram, np.float64)
    return np.diag(gram)[:, None] + np.diag(gram)[None] - gram - gram.T


def check(gram, updates, present, tol=1e-5, of=None):
    """Relative error of the squared distances between the rows `of`; default: all present ones."""
    x = flat(updates)
    pairs = np.triu(np.ones((len(x), len(x)), bool), 1)
    chosen = present if of is None else of
    pairs &= chosen[:, None] & chosen[None]
    want = np.square(x[:, None] - x[None])[pairs].sum(axis=1)
    np.testing.assert_allclose(distances(gram)[pairs], want, rtol=tol)
    gram = np.asarray(gram)
    assert not gram[~present].any() and not gram[:, ~present].any()


run = jax.jit(centered_gram)
everybody = np.ones(NUM_CLIENTS, bool)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4, -3e4])
def test_a_common_offset_costs_no_digits(offset):
    updates = make_updates(offset=offset)
    check(run(updates, everybody), updates, everybody)


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("num_attackers", [1, 3, 4])
def test_attackers_far_out_cost_the_others_no_digits(num_attackers, offset):
    """They draw the mean away; a client of the bulk is found and is the centre."""
    updates = make_updates(offset=offset)
    attackers = np.isin(np.arange(NUM_CLIENTS), [2, 5, 6, 9][:num_attackers])
    for k, x in updates.items():
        rng = np.random.default_rng(len(k))
        x[attackers] = 1e7 * (1 + rng.normal(size=x[attackers].shape))
    check(run(updates, everybody), updates, everybody, of=~attackers)
    check(run(updates, everybody), updates, everybody, tol=1e-4)


@pytest.mark.parametrize("order", [(5, 0, 2), (0, 5, 9), (9, 2, 5)])
def test_attackers_at_several_scales_cost_the_others_no_digits(order):
    """One draws the centre away from another."""
    updates = make_updates(offset=0.5)
    for row, scale in zip(order, (1e7, 1e3, 1e5), strict=True):
        for x in updates.values():
            x[row] *= scale
    check(run(updates, everybody), updates, everybody, of=~np.isin(np.arange(NUM_CLIENTS), order))


@hypothesis.given(st.integers(0, 10_000), st.integers(0, NUM_CLIENTS))
def test_absent_rows_may_hold_anything(seed, num_present):
    rng = np.random.default_rng(seed)
    updates = make_updates(seed, offset=30)
    there = rng.permutation(NUM_CLIENTS) < num_present
    sent = {
        k: np.where(there.reshape(-1, *[1] * (x.ndim - 1)), x, rng.choice([np.nan, np.inf, 1e38], size=x.shape)).astype(
            np.float32
        )
        for k, x in updates.items()
    }
    check(run(sent, there), updates, there)


@pytest.mark.parametrize("block", [11 * 64 // 4, 11 * 100 // 4])
def test_blocks_of_columns(block, monkeypatch):
    """The last block reaches back, and counts its new columns only."""
    monkeypatch.setattr("cedarjax.core.columns._BLOCK_ON_CPU", block)
    rng = np.random.default_rng(1)
    shapes = {"below": (63,), "exact": (64,), "above": (65,), "many": (6, 81), "none": (0,)}
    updates = {k: (1e3 + rng.normal(size=(NUM_CLIENTS, *shape))).astype(np.float32) for k, shape in shapes.items()}
    updates["many"][4] = 1e9  # and a second time about the bulk
    check(
        centered_gram(jax.tree.map(jnp.asarray, updates), jnp.asarray(everybody)),
        updates,
        everybody,
        of=np.arange(10) != 4,
    )


def test_many_small_leaves():
    updates = {
        str(i): np.float32(1e3) + np.random.default_rng(i).normal(size=(NUM_CLIENTS, 3)).astype(np.float32)
        for i in range(30)
    }
    check(run(updates, everybody), updates, everybody)


def test_mixed_dtypes_are_accumulated_in_the_widest(x64):
    updates = {
        "half": jnp.asarray(make_updates(1)["b"], jnp.bfloat16),
        "single": jnp.asarray(make_updates(2)["a"]),
        "double": jnp.asarray(make_updates(3, dtype=np.float64)["b"]),
    }
    got = centered_gram(updates, jnp.asarray(everybody))
    assert got.dtype == jnp.float64
    check(got, updates, everybody, tol=1e-6)


def test_half_precision_is_multiplied_wide():
    updates = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), make_updates(4, offset=10))
    got = run(updates, everybody)
    assert got.dtype == jnp.float32
    check(got, updates, everybody)


def test_double_precision(x64):
    updates = make_updates(5, offset=1e4, dtype=np.float64)
    got = centered_gram(jax.tree.map(jnp.asarray, updates), jnp.asarray(everybody))
    assert got.dtype == jnp.float64
    check(got, updates, everybody, tol=1e-12)


def test_the_centre_is_the_last_row():
    """`inner` is of the rows about a centre and of the centre itself: the uncentred products follow."""
    updates = make_updates(6, offset=2)
    rows = with_inner(jax.tree.map(jnp.asarray, updates), jnp.asarray(everybody))
    x = flat(updates)
    np.testing.assert_allclose(gram(rows), x @ x.T, rtol=1e-5, atol=1e-3)
    places = rows.coordinates
    np.testing.assert_allclose(products(places, rows.inner), x @ x.T, rtol=1e-5, atol=1e-3)


def test_what_is_known_is_not_computed_again():
    rows = with_inner({"a": jnp.ones((3, 2))}, jnp.ones(3, bool))
    assert with_inner(rows, jnp.ones(3, bool)) is rows


def test_a_present_row_that_is_not_finite_shows():
    updates = {"a": jnp.array([[1.0, 2.0], [jnp.nan, 1.0], [3.0, jnp.inf], [0.0, 0.0]])}
    assert not np.isfinite(np.diag(centered_gram(updates, jnp.ones(4, bool)))[[1, 2]]).any()
    there = jnp.array([True, False, False, True])
    assert np.isfinite(centered_gram(updates, there)).all()


@pytest.mark.parametrize("num_present", [0, 1])
def test_nobody_and_one_alone(num_present):
    there = np.arange(NUM_CLIENTS) < num_present
    np.testing.assert_array_equal(run(make_updates(offset=5), there), 0.0)


def test_equal_rows_have_no_distance():
    updates = {"a": np.full((NUM_CLIENTS, 33), 0.1, np.float32), "b": np.full((NUM_CLIENTS, 7), 1e4, np.float32)}
    np.testing.assert_allclose(run(updates, everybody), 0.0, atol=1e-3)


def test_factors():
    rng = np.random.default_rng(7)
    left, right = rng.normal(size=(NUM_CLIENTS, 2, 6)), rng.normal(size=(NUM_CLIENTS, 2, 5))
    left[3] = np.nan
    updates = {"k": LowRank.of((jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32))), **make_updates(8)}
    there = np.arange(NUM_CLIENTS) != 3
    check(run(updates, there), updates, there, tol=2e-5)


@functools.cache
def on_mesh(mesh):
    return jax.jit(functools.partial(centered_gram, mesh=mesh))


@pytest.mark.parametrize("count", [8, 6])
@pytest.mark.parametrize("attacked", [False, True])
def test_on_a_mesh(count, attacked, mesh):
    updates = make_updates(9, count, offset=1e3)
    there = np.arange(count) != 1
    honest = there & (np.arange(count) != 4) if attacked else there
    for x in updates.values():
        x[1] = np.nan
        if attacked:
            x[4] = 1e7
    placed = updates
    if count % mesh.size == 0:
        placed = jax.device_put(updates, NamedSharding(mesh, P(mesh.axis_names)))
    check(on_mesh(mesh)(placed, there), updates, there, of=honest)


def test_a_vector_beside_factors_on_a_mesh(mesh):
    """A matrix known by its factors is shared out row by row, and what stands beside it in the same way."""
    rng = np.random.default_rng(10)
    left, right = (jnp.asarray(rng.normal(size=(8, 2, width)), jnp.float32) for width in (11, 3))
    updates = {"k": LowRank.of((left, right)), "b": jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)}
    vector = {"k": jnp.asarray(rng.normal(size=(11, 3)), jnp.float32), "b": jnp.ones(5)}
    placed = jax.device_put(updates, NamedSharding(mesh, P(mesh.axis_names)))

    def beside(updates, mesh=None):
        return centered_gram(Mixture.of(jnp.eye(8), updates).beside(vector), jnp.ones(9, bool), mesh=mesh)

    got = jax.jit(functools.partial(beside, mesh=mesh))(placed)
    x = np.concatenate([flat(updates), np.concatenate([np.ones(5), np.asarray(vector["k"]).ravel()])[None]])
    want = np.square(x[:, None] - x[None]).sum(axis=2)
    np.testing.assert_allclose(distances(got), want, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(distances(beside(updates)), want, rtol=1e-5, atol=1e-4)
