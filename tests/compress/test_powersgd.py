"""PowerSGD on a client and with averaged factors, against numpy simulations of all workers in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax import testing
from cedarjax.compress.low_rank import matrix_shape, orthogonalise, power_step
from cedarjax.compress.powersgd import powersgd, powersgd_bits, powersgd_mean, powersgd_of_mean

SHAPES = {"conv": (2, 3, 4, 6), "dense": (9, 7), "bias": (7,), "small": (2, 3), "scale": ()}


def draw(rng, *lead, dtype=np.float32):
    return {name: rng.normal(size=(*lead, *shape)).astype(dtype) for name, shape in SHAPES.items()}


def as_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


def orth(matrix):
    """Gram-Schmidt in numpy, with zeros for columns that depend on others."""
    columns = []
    for column in matrix.T:
        size = np.linalg.norm(column)
        for _ in range(2):
            column = column - sum((c * (c @ column) for c in columns), np.zeros_like(column))
        rest = np.linalg.norm(column)
        columns.append(column / rest if rest > 1e-5 * size else np.zeros_like(column))
    return np.stack(columns, axis=1)


# The step


@pytest.mark.parametrize(("rows", "rank"), [(1, 1), (8, 3), (5, 5), (3, 6)])
def test_orthogonalise(rows, rank):
    x = np.random.default_rng(rows).normal(size=(rows, rank))
    got = np.asarray(orthogonalise(jnp.asarray(x, jnp.float32)), np.float64)
    inner = got.T @ got
    kept = np.diagonal(inner) > 0.5
    assert kept.sum() == min(rows, rank)
    np.testing.assert_allclose(inner, np.diag(kept.astype(float)), atol=1e-5)
    np.testing.assert_allclose(got @ got.T @ x, x, atol=2e-4)  # the same span


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_orthogonalise_columns_of_zeros_and_copies(scale):
    x = np.array([[1.0, 0.0, 2.0, 1.0], [2.0, 0.0, 4.0, 0.0], [3.0, 0.0, 6.0, 1.0]])
    got = np.asarray(orthogonalise(jnp.asarray(scale * x, jnp.float32)))
    np.testing.assert_allclose(got, orth(x), atol=1e-6)
    assert not got[:, 1].any() and not got[:, 2].any()
    np.testing.assert_array_equal(orthogonalise(jnp.zeros((3, 2))), np.zeros((3, 2)))


def test_step_against_numpy():
    rng = np.random.default_rng(0)
    matrix, start = rng.normal(size=(12, 8)), rng.normal(size=(8, 3))
    factors, next_start = power_step(jnp.asarray(matrix, jnp.float32), jnp.asarray(start, jnp.float32))
    left = orth(matrix @ start)
    np.testing.assert_allclose(factors.left, left, atol=1e-5)
    np.testing.assert_allclose(factors.right, matrix.T @ left, atol=1e-5)
    np.testing.assert_allclose(factors.product(), left @ left.T @ matrix, atol=1e-5)
    np.testing.assert_allclose(next_start, matrix.T @ left / np.linalg.norm(matrix.T @ left, axis=0), atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_step_contracts_and_is_exact_on_low_rank(rank):
    step, rng = jax.jit(lambda matrix, start: power_step(matrix, start)[0].product()), np.random.default_rng(0)
    for _ in range(20):
        start = jnp.asarray(rng.normal(size=(6, rank)), jnp.float32)
        matrix = rng.normal(size=(10, 6)).astype(np.float32)
        error = np.linalg.norm(step(jnp.asarray(matrix), start) - matrix)
        best = np.sqrt(np.sum(np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2))
        assert best - 1e-4 <= error < np.linalg.norm(matrix)
        low = rng.normal(size=(10, rank)) @ rng.normal(size=(rank, 6))
        np.testing.assert_allclose(step(jnp.asarray(low, jnp.float32), start), low, atol=1e-3)


def test_warm_start_finds_the_best_approximation():
    rng = np.random.default_rng(1)
    u, s, vt = np.linalg.svd(rng.normal(size=(12, 9)), full_matrices=False)
    s = 2.0 ** -np.arange(9)
    matrix = (u * s) @ vt
    start, errors = jnp.asarray(rng.normal(size=(9, 2)), jnp.float32), []
    for _ in range(8):
        factors, start = power_step(jnp.asarray(matrix, jnp.float32), start)
        errors.append(np.linalg.norm(factors.product() - matrix))
    assert errors[0] > 1.05 * errors[-1]
    np.testing.assert_allclose(errors[-1], np.sqrt(np.sum(s[2:] ** 2)), rtol=1e-4)


def test_a_start_survives_zeros_and_what_is_not_finite():
    start = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)), jnp.float32)
    factors, kept = power_step(jnp.zeros((6, 5)), start)
    np.testing.assert_array_equal(factors.product(), np.zeros((6, 5)))
    np.testing.assert_array_equal(kept, start)
    for value in (jnp.nan, jnp.inf):
        factors, kept = power_step(jnp.ones((6, 5)).at[2, 3].set(value), start)
        assert not np.isfinite(factors.product()).all()
        np.testing.assert_array_equal(kept, start)
    # Of a matrix of rank one the second column is kept, so that a second direction can be found later.
    one = jnp.outer(jnp.arange(6.0), jnp.arange(5.0))
    _, kept = power_step(one, start)
    np.testing.assert_array_equal(kept[:, 1], start[:, 1])
    np.testing.assert_allclose(power_step(one + jnp.eye(6, 5), kept)[0].left.T @ jnp.ones(6) != 0, [True, True])


@pytest.mark.parametrize(
    ("shape", "rank", "want"),
    [
        ((9, 7), 3, (9, 7)),
        ((9, 7), 4, None),
        ((7,), 1, None),
        ((), 1, None),
        ((2, 2), 1, None),
        ((3, 3, 2, 5), 2, (18, 5)),
    ],
)
def test_what_is_taken_for_a_matrix(shape, rank, want):
    assert matrix_shape(shape, rank) == want


# The compressor


def test_compressor_over_rounds_against_numpy():
    compressor, rng = powersgd(2, seed=3), np.random.default_rng(0)
    params = as_jax(draw(rng))
    state = compressor.init(params)
    assert state["bias"] is None and state["small"] is None and state["scale"] is None
    starts = {name: np.asarray(state[name], np.float64) for name in ("conv", "dense")}
    for _ in range(4):
        delta = draw(rng)
        compressed, state = jax.jit(compressor.compress)(as_jax(delta), state, jax.random.key(0))
        got = compressor.decompress(compressed)
        for name, leaf in delta.items():
            want = leaf.astype(np.float64)
            if name in starts:
                matrix = want.reshape(-1, leaf.shape[-1])
                left = orth(matrix @ starts[name])
                starts[name] = matrix.T @ left
                want = (left @ starts[name].T).reshape(leaf.shape)
            assert got[name].shape == leaf.shape and got[name].dtype == jnp.float32
            np.testing.assert_allclose(got[name], want, atol=2e-5)


def test_bits_are_those_of_the_factors():
    compressor, delta = powersgd(2), as_jax(draw(np.random.default_rng(0)))
    compressed, _ = compressor.compress(delta, compressor.init(delta), jax.random.key(0))
    sizes = {name: 8 * sum(np.asarray(x).nbytes for x in jax.tree.leaves(leaf)) for name, leaf in compressed.items()}
    assert sizes["conv"] == 32 * 2 * (24 + 6) and sizes["dense"] == 32 * 2 * 16 and sizes["small"] == 32 * 6
    assert compressor.bits(compressed) == sum(sizes.values()) == powersgd_bits(delta, 2)
    mask = {name: jnp.float32(name in ("conv", "bias")) for name in SHAPES}
    assert compressor.bits(compressed, mask) == sizes["conv"] + sizes["bias"] + 8


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_dtypes(dtype, x64):
    compressor = powersgd(2)
    delta = jax.tree.map(lambda x: jnp.asarray(x, dtype), draw(np.random.default_rng(0), dtype=np.float64))
    compressed, state = compressor.compress(delta, compressor.init(delta), jax.random.key(0))
    got = compressor.decompress(compressed)
    assert {x.dtype for x in jax.tree.leaves((got, compressed))} == {jnp.dtype(dtype)}
    assert state["dense"].dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
    assert compressor.bits(compressed) == powersgd_bits(delta, 2) == 8 * dtype.dtype.itemsize * (60 + 32 + 14)
    for name in ("conv", "dense"):
        error, whole = (np.linalg.norm(np.asarray(x, np.float64)) for x in (got[name] - delta[name], delta[name]))
        assert error < whole


def test_low_rank_updates_are_sent_exactly_and_clients_are_mapped():
    compressor, rng = powersgd(2), np.random.default_rng(0)
    params = {"w": jnp.zeros((9, 7))}
    delta = {"w": jnp.asarray(rng.normal(size=(3, 9, 2)) @ rng.normal(size=(3, 2, 7)), jnp.float32)}
    state = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (3, *x.shape)), compressor.init(params))
    compressed, state = jax.vmap(lambda d, s: compressor.compress(d, s, jax.random.key(0)))(delta, state)
    np.testing.assert_allclose(jax.vmap(compressor.decompress)(compressed)["w"], delta["w"], atol=1e-4)
    low_rank = cj.core.LowRank.of((jnp.ones((1, 9)), jnp.arange(7.0)[None]))
    compressed, _ = compressor.compress({"w": low_rank}, compressor.init(params), jax.random.key(0))
    np.testing.assert_allclose(compressor.decompress(compressed)["w"], np.outer(np.ones(9), np.arange(7)), atol=1e-5)


@pytest.mark.parametrize("make", [powersgd, powersgd_mean, powersgd_of_mean, functools.partial(powersgd_bits, {})])
def test_refuses_rank_zero(make):
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        make(rank=0)


# The aggregator


class Workers:
    """Vogels et al., Algorithms 1 and 2: workers with errors of their own, and means of what they send."""

    def __init__(self, starts, num_workers, weights):
        self.starts = {name: np.asarray(start, np.float64) for name, start in starts.items() if start is not None}
        self.errors = [dict.fromkeys(self.starts, 0.0) for _ in range(num_workers)]
        self.weights = np.asarray(weights, np.float64) / np.sum(weights)

    def mean(self, values):
        return sum(w * v for w, v in zip(self.weights, values, strict=True))

    def step(self, gradients):
        out = {}
        for name in gradients[0]:
            leaves = [g[name].astype(np.float64) for g in gradients]
            if name not in self.starts:
                out[name] = self.mean(leaves)
                continue
            columns = leaves[0].shape[-1]
            matrices = [x.reshape(-1, columns) + e[name] for x, e in zip(leaves, self.errors, strict=True)]
            left = orth(self.mean([m @ self.starts[name] for m in matrices]))
            rights = [m.T @ left for m in matrices]
            self.starts[name] = self.mean(rights)
            for worker, matrix, right in zip(self.errors, matrices, rights, strict=True):
                worker[name] = matrix - left @ right.T
            out[name] = (left @ self.starts[name].T).reshape(leaves[0].shape)
        return out


@pytest.mark.parametrize("weights", [None, np.array([1.0, 5.0, 2.0, 0.5])])
def test_mean_is_the_papers_algorithm_over_all_workers(weights):
    rng, rule = np.random.default_rng(0), powersgd_mean(2)
    state = rule.init(as_jax(draw(rng)))
    workers = Workers(state.starts, 4, np.ones(4) if weights is None else weights)
    update = jax.jit(rule.update)
    for _ in range(6):
        rows = draw(rng, 4)
        want = workers.step([{name: leaf[i] for name, leaf in rows.items()} for i in range(4)])
        out, state = update(as_jax(rows), state, weights=None if weights is None else jnp.asarray(weights, jnp.float32))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), out, want)
    mean_error = workers.mean([e["dense"] for e in workers.errors])
    np.testing.assert_allclose(state.errors["dense"], mean_error, atol=5e-5)
    assert np.linalg.norm(mean_error) > 0.5  # there is something to feed back


def test_what_was_applied_and_the_error_are_what_was_sent():
    rng, rule = np.random.default_rng(0), powersgd_mean(1)
    state, sent, applied = rule.init(as_jax(draw(rng))), 0, 0
    update = jax.jit(rule.update)
    for _ in range(5):
        rows = draw(rng, 3)
        out, state = update(as_jax(rows), state)
        sent, applied = (
            sent + rows["dense"].mean(axis=0, dtype=np.float64),
            applied + np.asarray(out["dense"], np.float64),
        )
    np.testing.assert_allclose(applied + state.errors["dense"], sent, atol=1e-5)


def test_layers_that_nobody_sent_wait():
    rng, rule = np.random.default_rng(0), powersgd_mean(1)
    state = rule.init(as_jax(draw(rng)))
    _, before = jax.jit(rule.update)(as_jax(draw(rng, 3)), state)
    rows = as_jax(draw(rng, 3)) | {"dense": jnp.full((3, 9, 7), jnp.nan)}
    weights = {name: jnp.array([1.0, 2.0, 3.0]) * float(name != "dense") for name in SHAPES}
    out, after = jax.jit(rule.update)(rows, before, weights=weights)
    assert not out["dense"].any() and out["conv"].any() and after.num_nonfinite == 0
    np.testing.assert_array_equal(after.errors["dense"], before.errors["dense"])
    np.testing.assert_array_equal(after.starts["dense"], before.starts["dense"])


def test_masked_layers_and_clients_that_failed():
    rng, rule = np.random.default_rng(0), powersgd_mean(3)
    rows = draw(rng, 4)
    state = rule.init(as_jax(draw(rng)))
    weights = {name: np.array([1.0, 2.0, 3.0, 4.0]) for name in SHAPES}
    weights["dense"] = np.array([0.0, 2.0, 3.0, 0.0])
    broken = {name: leaf.copy() for name, leaf in rows.items()}
    broken["dense"][0], broken["conv"][2, 0, 0, 0, 0] = np.nan, np.inf  # the first did not send it, the third did
    out, after = jax.jit(rule.update)(
        as_jax(broken), state, weights={k: jnp.asarray(w, jnp.float32) for k, w in weights.items()}
    )
    assert after.num_nonfinite == 1
    there = np.array([True, True, False, True])
    for name in ("bias", "small"):
        np.testing.assert_allclose(
            out[name], np.average(rows[name][there], axis=0, weights=weights[name][there]), rtol=1e-5
        )
    left = orth(rows["dense"][1].astype(np.float64) @ np.asarray(state.starts["dense"], np.float64))
    np.testing.assert_allclose(out["dense"], left @ left.T @ rows["dense"][1], atol=2e-5)


def law_case(mesh):
    rng = np.random.default_rng(1)
    params, updates = as_jax(draw(rng)), as_jax(draw(rng, 6))
    weights = jnp.asarray(rng.uniform(1.0, 9.0, 6), jnp.float32)
    return testing.AggregatorCase(powersgd_mean(2), updates, params, weights, mesh, (jnp.bfloat16, jnp.float64))


@pytest.mark.parametrize("law", testing.AGGREGATOR_LAWS)
def test_laws(law, mesh):
    testing.AGGREGATOR_LAWS[law](law_case(mesh))


def test_scales_along(mesh):
    testing.EQUIVARIANCES["scale"](law_case(mesh))


def quadratic(num_clients=4):
    """Clients that are pulled to matrices of their own."""
    rng = np.random.default_rng(0)
    targets = jnp.asarray(rng.normal(size=(num_clients, 1, 8, 6)), jnp.float32)
    local = cj.local.sgd(lambda w, x, key: 0.5 * jnp.sum((w - x[0]) ** 2), optax.sgd(0.5), batch_size=1)
    ones = jnp.ones(num_clients, jnp.int32)
    data = cj.ClientData(targets, num_examples=ones, num_support=ones)
    cohort = cj.Cohort(data, weights=jnp.arange(1.0, num_clients + 1), client_id=jnp.arange(num_clients))
    mean = np.average(targets[:, 0], axis=0, weights=np.arange(1, num_clients + 1))
    return local, cohort, mean


def test_rounds_and_streamed_rounds_agree_and_arrive():
    local, cohort, mean = quadratic()
    algorithms = [
        cj.federated_round(local, optax.chain(powersgd_mean(1), optax.sgd(0.5))),
        cj.federated_round(local, optax.chain(cj.robust.mean(), powersgd_of_mean(1), optax.sgd(0.5))),
        cj.streamed_round(local, optax.chain(powersgd_of_mean(1), optax.sgd(0.5)), chunk_size=2),
    ]
    states = [algorithm.init(jnp.zeros((8, 6))) for algorithm in algorithms]
    steps = [jax.jit(algorithm.step) for algorithm in algorithms]
    for i in range(80):
        states = [step(state, cohort, jax.random.key(i))[0] for step, state in zip(steps, states, strict=True)]
        if i == 3:
            for state in states[1:]:
                np.testing.assert_allclose(state.params, states[0].params, atol=1e-5)
            assert np.linalg.norm(states[0].params - mean) > 0.1
    for state in states:
        np.testing.assert_allclose(state.params, mean, atol=0.02)


def test_on_a_mesh(mesh):
    local, cohort, _ = quadratic(8)
    states = []
    for map_fn in (cj.core.cohort_map(), cj.core.cohort_map(mesh=mesh)):
        algorithm = cj.federated_round(local, optax.chain(powersgd_mean(1), optax.sgd(0.5)), map_fn)
        state = algorithm.init(jnp.zeros((8, 6)))
        for i in range(3):
            state, _, _ = jax.jit(algorithm.step)(state, cohort, jax.random.key(i))
        states.append(state.params)
    np.testing.assert_allclose(states[1], states[0], atol=1e-5)


def test_behind_error_feedback_nothing_is_lost():
    local, cohort, _ = quadratic()
    sending = cj.compress.with_error_feedback(local, powersgd(1))
    data, params = jax.tree.map(lambda x: x[0], cohort.data), jnp.zeros((8, 6))
    state, update, arrived = sending.init(params), jax.jit(sending.update), 0
    delta = local.update(params, local.init(params), data, jax.random.key(0))[0].delta
    for i in range(8):
        upload, state, info = update(params, state, data, jax.random.key(i))
        arrived = arrived + np.asarray(upload.delta, np.float64)
        assert np.linalg.matrix_rank(upload.delta, rtol=1e-4) == 1
    np.testing.assert_allclose(arrived + state.error, 8 * delta, atol=1e-4)
    assert info.uploaded_bits == 32 * 14 and np.linalg.norm(state.error) < 4 * np.linalg.norm(delta)
