import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cedarjax.core import LowRank
from cedarjax.core.columns import block_width, map_columns, mixed, on_cpu, walk
from cedarjax.core.mixture import Mixture

SHAPES = {"wide": (5, 29), "exact": (64,), "none": (0,), "one": (), "small": (65,), "pair": (2, 3)}


def make_updates(count=3, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(count, *shape)).astype(dtype) for name, shape in SHAPES.items()}


def span(block):
    """A function of columns that no leaf can change for another."""
    return block.max(axis=0) - 2 * block.min(axis=0)


def check(got, updates, dtype=np.float32):
    for name, x in updates.items():
        assert got[name].shape == SHAPES[name] and got[name].dtype == dtype
        np.testing.assert_array_equal(got[name], span(x))


@pytest.mark.parametrize("block", [3 * 64, 3 * 70, 2**17])
def test_blocks_of_any_width(block, monkeypatch):
    monkeypatch.setattr("cedarjax.core.columns._BLOCK_ON_CPU", block)
    updates = make_updates()
    for run in (map_columns, jax.jit(map_columns, static_argnums=0)):
        check(run(span, jax.tree.map(jnp.asarray, updates)), updates)


def test_no_block_is_wider_than_the_width(monkeypatch):
    """Memory does not grow with the parameters."""
    monkeypatch.setattr("cedarjax.core.columns._BLOCK_ON_CPU", 3 * 64)
    widths = []
    map_columns(
        lambda block: widths.append(block.shape) or span(block), {"a": jnp.ones((3, 1000)), "b": jnp.ones((3, 64))}
    )
    assert set(widths) == {(3, 64)}
    assert block_width(3) == 64 and block_width(1) <= 3 * 64 < 2 * block_width(1) and block_width(10**9) == 64
    assert on_cpu() and block_width(3, factor=4) == 4 * 64


def test_small_leaves_share_a_walk():
    calls = []
    updates = {str(i): jnp.full((2, 3), float(i)) for i in range(40)}
    got = map_columns(lambda block: calls.append(block.shape) or block[0], updates)
    assert calls == [(2, 120)]
    assert all((got[str(i)] == i).all() for i in range(40))


def test_dtypes_do_not_mix():
    updates = {
        "a": jnp.ones((2, 3), jnp.bfloat16),
        "b": jnp.full((2, 4), 2.0),
        "c": jnp.full((2, 2), 3.0, jnp.bfloat16),
    }
    seen = []
    got = map_columns(lambda block: seen.append(block.dtype) or block.sum(axis=0), updates)
    assert sorted(map(str, seen)) == ["bfloat16", "float32"]
    assert [got[k].dtype for k in "abc"] == [jnp.bfloat16, jnp.float32, jnp.bfloat16]
    assert [float(got[k][0]) for k in "abc"] == [2.0, 4.0, 6.0]


def test_a_wider_answer_is_given_in_the_dtype_of_the_updates():
    got = map_columns(lambda block: block.astype(jnp.float32).mean(axis=0), {"a": jnp.ones((2, 3), jnp.bfloat16)})
    assert got["a"].dtype == jnp.bfloat16


def test_double_precision(x64):
    updates = make_updates(dtype=np.float64)
    check(map_columns(span, jax.tree.map(jnp.asarray, updates)), updates, np.float64)


def test_factors():
    rng = np.random.default_rng(1)
    factors = rng.normal(size=(3, 2, 5)).astype(np.float32), rng.normal(size=(3, 2, 4)).astype(np.float32)
    bias = rng.normal(size=(3, 7)).astype(np.float32)
    got = map_columns(span, {"a": LowRank.of(tuple(map(jnp.asarray, factors))), "b": jnp.asarray(bias)})
    np.testing.assert_allclose(got["a"], span(np.einsum("crm,crn->cmn", *factors)), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got["b"], span(bias))


@pytest.mark.parametrize("num_rows", [2, 5])
def test_mixtures_block_by_block(num_rows, monkeypatch):
    monkeypatch.setattr("cedarjax.core.columns._BLOCK_ON_CPU", 5 * 64)
    updates = make_updates()
    updates["wide"][1] = np.nan
    updates["small"][1] = np.inf
    matrix = np.random.default_rng(2).uniform(size=(num_rows, 3)).astype(np.float32)
    matrix[:, 1] = 0
    mixture = Mixture.of(jnp.asarray(matrix), jax.tree.map(jnp.asarray, updates))
    got = map_columns(span, mixture)
    for name, x in updates.items():
        want = span(np.tensordot(matrix[:, [0, 2]], x[[0, 2]], axes=1))
        np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-5)


def test_several_parts():
    first, second = {"a": jnp.array([[1.0, 2.0], [3.0, 4.0]])}, {"a": jnp.array([[10.0, 20.0]])}
    matrices = (jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), jnp.array([[0.0], [1.0], [2.0]]))
    mixture = Mixture(matrices, (first, second), jnp.array([1.0, 2.0, 2.0]))
    got = map_columns(lambda block: block.sum(axis=0), mixture)
    assert got["a"].tolist() == [1 + 13 + 20, 2 + 24 + 40]
    block = mixed(matrices, [first["a"], second["a"]])
    assert block.tolist() == [[1.0, 2.0], [13.0, 24.0], [20.0, 40.0]]


@pytest.mark.parametrize("count", [8, 6])
@pytest.mark.parametrize("block", [8 * 64, 2**17])
def test_on_a_mesh(count, block, mesh, monkeypatch):
    """Six clients do not divide over four devices: the compiler's own way, the same numbers."""
    monkeypatch.setattr("cedarjax.core.columns._BLOCK_ON_CPU", block)
    updates = make_updates(count)
    placed = jax.tree.map(jnp.asarray, updates)
    if count % mesh.size == 0:
        placed = jax.device_put(placed, NamedSharding(mesh, P(mesh.axis_names)))
    check(jax.device_get(jax.jit(lambda u: map_columns(span, u, mesh=mesh))(placed)), updates)
    matrix = jnp.asarray(np.random.default_rng(3).uniform(size=(5, count)), jnp.float32)
    got = jax.jit(lambda u: map_columns(span, Mixture.of(matrix, u), mesh=mesh))(placed)
    want = map_columns(span, Mixture.of(matrix, jax.tree.map(jnp.asarray, updates)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_walk_ends_where_the_columns_end():
    rows = jnp.arange(14.0).reshape(2, 7)
    assert walk(lambda a, b: a[0] + b[1], [rows, rows], 3).tolist() == (rows[0] + rows[1]).tolist()
    assert walk(lambda a: a[0], [rows], 7).tolist() == rows[0].tolist()
