import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.core import Cohort, LowRank, batch_indices, finite_rows, shuffled_epochs
from cedarjax.core.lowrank import keep, reduce
from cedarjax.core.rounds import client_keys

BATCH = 2


def fast(flag):
    jax.config.update("jax_disable_most_optimizations", flag)


@pytest.fixture(autouse=True)
def fast_compilation():
    """Most of the time here is XLA's. What is compared at many clients is compiled as it would be for a user."""
    fast(True)
    yield
    fast(False)


def draw(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def random_updates(rng, count, rank=2, dtype=jnp.float32):
    """Two matrices by their factors, one of them by two pairs, and a vector."""
    one = LowRank.of(*[(draw(rng, count, rank, 9, dtype=dtype), draw(rng, count, rank, 8, dtype=dtype))])
    pairs = [(draw(rng, count, rank, 8, dtype=dtype), draw(rng, count, rank, 3, dtype=dtype)) for _ in range(2)]
    return {"one": one, "two": LowRank.of(*pairs), "bias": draw(rng, count, 8, dtype=dtype)}


def assert_close(got, want, rtol=1e-5, atol=1e-5):
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, path
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * max(1.0, np.abs(b).max(initial=0)), err_msg=str(path))


# The node.


def test_a_node_is_the_sum_of_its_products():
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(k, 4)), rng.normal(size=(k, 3))) for k in (2, 1)]
    node = LowRank.of(*[(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)) for a, b in pairs])
    assert node.shape == (4, 3) and node.ndim == 2 and node.rank == 3 and node.dtype == jnp.float32
    np.testing.assert_allclose(node.dense(), sum(a.T @ b for a, b in pairs), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(node.left.T @ node.right, node.dense(), rtol=1e-5, atol=1e-6)
    assert node.astype(jnp.bfloat16).dense().dtype == jnp.bfloat16
    with jax.enable_x64(True):
        wide = node.astype(jnp.float64)
        assert wide.dtype == wide.dense().dtype == jnp.float64
    many = jax.tree.map(lambda x: jnp.stack([x, x, x]), node)
    assert many.shape == (3, 4, 3) and many.ndim == 3 and many.rank == 3
    np.testing.assert_allclose(many.dense()[1], node.dense(), rtol=1e-6)


def test_rows_that_are_not_kept_are_zero():
    updates = random_updates(np.random.default_rng(0), 3)
    updates = jax.tree.map(lambda x: x.at[1].set(jnp.nan) if x.ndim > 1 else x, updates)
    kept = {name: keep(jnp.array([True, False, True]), x) for name, x in updates.items()}
    dense = cj.dense(kept)
    for name, x in dense.items():
        assert isinstance(kept[name], LowRank) == isinstance(updates[name], LowRank)
        np.testing.assert_array_equal(x[1], 0)
        np.testing.assert_array_equal(x[jnp.array([0, 2])], cj.dense(updates)[name][jnp.array([0, 2])])


# Arithmetic on the leaves.

LEAFWISE = {
    "scale": optax.scale(-1.0),
    "clip": optax.clip(0.1),
    "clip_by_global_norm": optax.clip_by_global_norm(0.1),
    "cast": optax.stateless(lambda u, p: jax.tree.map(lambda x: x.astype(jnp.float32), u)),
    "where": optax.stateless(lambda u, p: jax.tree.map(lambda x: jnp.where(x > 0, 2 * x, x), u)),
}


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", LEAFWISE)
def test_arithmetic_on_the_factors_is_refused(name):
    updates = random_updates(np.random.default_rng(0), 3)
    tx = optax.chain(LEAFWISE[name], cj.robust.mean())
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        jax.eval_shape(lambda u: tx.update(u, tx.init(None), None, weights=jnp.ones(3)), updates)


@pytest.mark.standard_promotion
def test_arithmetic_on_dense_updates_is_right():
    updates = random_updates(np.random.default_rng(0), 3)
    tx = optax.chain(optax.stateless(lambda u, p: cj.dense(u)), LEAFWISE["scale"], cj.robust.mean())
    got, _ = tx.update(updates, tx.init(None), None, weights=jnp.ones(3))
    assert_close(got, jax.tree.map(lambda x: -x.mean(axis=0), cj.dense(updates)))


@pytest.mark.parametrize("reader", [cj.dense, cj.gram, cj.sq_norms, lambda u: cj.weighted_sum(jnp.ones(3), u)])
def test_every_reader_finds_arithmetic_out(reader):
    updates = jax.tree.map(lambda x: jnp.ones(x.shape), random_updates(np.random.default_rng(0), 3))
    with pytest.raises(TypeError, match="changed leaf by leaf while they are low-rank, use core.dense first"):
        reader(updates)


KEEPS_BOOL = {
    "add": lambda x: x + x,
    "multiply": lambda x: x * x,
    "abs": jnp.abs,
    "maximum": lambda x: jnp.maximum(x, x[:1]),
}


@pytest.mark.parametrize("name", KEEPS_BOOL)
def test_arithmetic_that_keeps_a_bool_is_refused(name):
    with pytest.raises(TypeError):
        jax.eval_shape(
            lambda u: cj.gram(jax.tree.map(KEEPS_BOOL[name], u)), random_updates(np.random.default_rng(0), 3)
        )


def test_inner_products_on_a_mesh_find_arithmetic_out(mesh):
    updates = jax.tree.map(lambda x: jnp.ones(x.shape), random_updates(np.random.default_rng(0), 4))
    with pytest.raises(TypeError):
        jax.eval_shape(lambda u: cj.gram(u, mesh=mesh), updates)


# Reductions over clients, against those of the dense updates.


@pytest.fixture(params=["factors", "blocks", "many_blocks"])
def updates(request, monkeypatch):
    """Both ways to take inner products: `R^2 (m + n) = 68` is less than `m n = 72` for a rank of 2, and not of 4."""
    if request.param == "many_blocks":
        monkeypatch.setattr(reduce, "_BLOCK", 200)
    return random_updates(np.random.default_rng(1), 5, rank=2 if request.param == "factors" else 4)


def float64(updates):
    return {name: np.asarray(x, np.float64).reshape(5, -1) for name, x in cj.dense(updates).items()}


def test_inner_products(updates):
    rows = np.concatenate(list(float64(updates).values()), axis=1)
    np.testing.assert_allclose(cj.gram(updates), rows @ rows.T, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(cj.sq_norms(updates), (rows**2).sum(axis=1), rtol=1e-5)


def test_inner_products_in_blocks_of_clients(monkeypatch):
    monkeypatch.setattr(reduce, "_BLOCK", 64)  # batches of 3 clients
    updates = random_updates(np.random.default_rng(1), 5)
    assert_close(cj.gram(updates), cj.gram(cj.dense(updates)), atol=1e-4)


@pytest.mark.parametrize("per_leaf", [False, True])
@pytest.mark.parametrize("bad", [None, jnp.nan, jnp.inf])
def test_sums_over_clients(updates, bad, per_leaf):
    c = np.array([0.5, -2.0, 0.0, 3.0, 1.0])
    other = np.array([1.0, 0.0, 0.0, -1.0, 0.5])
    want = {
        name: np.tensordot(other if per_leaf and name == "two" else c, x, 1) for name, x in float64(updates).items()
    }
    if bad is not None:
        updates = jax.tree.map(lambda x: x.at[2].set(bad) if jnp.issubdtype(x.dtype, jnp.inexact) else x, updates)
    c, other = jnp.asarray(c, jnp.float32), jnp.asarray(other, jnp.float32)
    coefficients = {"one": c, "two": other, "bias": c} if per_leaf else c
    got = cj.weighted_sum(coefficients, updates)
    for name, x in got.items():
        np.testing.assert_allclose(x.reshape(-1), want[name], rtol=1e-4, atol=1e-4)
    assert got["one"].shape == (9, 8) and got["two"].shape == (8, 3)
    weights = jax.tree.map(jnp.abs, coefficients)
    dense = jax.tree.map(lambda x: x.at[2].set(0), cj.dense(updates))
    assert_close(cj.weighted_mean(updates, weights), cj.weighted_mean(dense, weights), atol=1e-4)


def test_rows_that_are_not_finite(updates):
    poisoned = {
        "one": jax.tree.map(lambda x: x, updates["one"]),
        "two": updates["two"].map(lambda x: x.at[1, 0, 0].set(jnp.nan), lambda x: x.at[3, -1, -1].set(jnp.inf)),
        "bias": updates["bias"],
    }
    assert finite_rows(poisoned).tolist() == [True, False, True, False, True] and finite_rows(updates).all()
    rule = cj.robust.mean()
    weights = jnp.array([1.0, 5.0, 2.0, 1.0, 1.0])
    got, state = rule.update(poisoned, rule.init(None), None, weights=weights)
    want, _ = rule.update(cj.dense(updates), rule.init(None), None, weights=jnp.array([1.0, 0.0, 2.0, 0.0, 1.0]))
    assert state.num_nonfinite == 2
    assert_close(got, want)


def test_a_product_that_overflows_is_not_finite():
    huge = LowRank.of((jnp.full((2, 1, 3), 1e30), jnp.full((2, 1, 3), 1e30)))
    assert not finite_rows({"w": huge}).any()


def test_absent_clients_and_layers(updates):
    rule, dense = cj.robust.mean(), cj.dense(updates)
    ones = jnp.ones(5)
    weights = {"one": ones.at[0].set(0), "two": ones * 0, "bias": ones.at[3].set(0)}
    poisoned = {**updates, "one": jax.tree.map(lambda x: x.at[0].set(jnp.nan) if x.ndim > 1 else x, updates["one"])}
    got, _ = rule.update(poisoned, rule.init(None), None, weights=weights)
    want, _ = rule.update(dense, rule.init(None), None, weights=weights)
    assert_close(got, want)
    assert not got["two"].any()


@pytest.mark.parametrize("count", [8, 6])
def test_reductions_on_a_mesh(mesh, count):
    updates = random_updates(np.random.default_rng(1), count)
    c = jnp.arange(count, dtype=jnp.float32)

    def both(updates, c, mesh=None):
        return cj.gram(updates, mesh=mesh), cj.weighted_sum(c, updates, mesh=mesh)

    got = jax.jit(functools.partial(both, mesh=mesh))(updates, c)
    assert_close(got, both(cj.dense(updates), c), atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_sums_in_other_dtypes(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        updates = random_updates(np.random.default_rng(1), 5, dtype=dtype)
        wide = {name: x.astype(jnp.float32) for name, x in updates.items()}
        weights = jnp.array([1.0, 2.0, 3.0, 0.5, 1.0], jnp.float32)
        got, want = cj.weighted_mean(updates, weights), cj.weighted_mean(cj.dense(wide), weights)
        tolerance = 0.02 if dtype == jnp.bfloat16 else 1e-6
        for name, x in got.items():
            assert x.dtype == dtype
            np.testing.assert_allclose(np.asarray(x, np.float64), want[name], rtol=tolerance, atol=tolerance)
        assert cj.gram(updates).dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)


@pytest.mark.parametrize("attack", [cj.attacks.sign_flip(3.0), cj.attacks.gaussian(0.5)], ids=["sign_flip", "gaussian"])
def test_attacks(attack):
    updates = random_updates(np.random.default_rng(2), 5)
    tx = optax.chain(attack, cj.robust.mean())

    def run(updates, key):
        byzantine = jnp.array([True, False, False, True, False])
        return tx.update(updates, tx.init(None), None, weights=jnp.ones(5), byzantine=byzantine, key=key)[0]

    got, want = jax.jit(lambda updates, key: (run(updates, key), run(cj.dense(updates), key)))(
        updates, jax.random.key(0)
    )
    assert_close(got, want)


@pytest.mark.parametrize("masked", [False, True])
def test_screening(masked):
    rng = np.random.default_rng(3)
    updates = random_updates(rng, 5)
    params = jax.tree.map(lambda x: draw(rng, *x.shape[1:]), cj.dense(updates))
    stimuli = draw(rng, 6, 9)

    def logits_fn(params, x):
        return jnp.tanh(x @ params["one"] + params["bias"][None]) @ params["two"]

    rule = cj.robust.cedar(logits_fn, stimuli)
    weights = jnp.array([1.0, 2.0, 0.0, 3.0, 1.0])
    if masked:
        weights = {"one": weights, "two": weights.at[0].set(0), "bias": weights}

    def run(updates):
        return rule.update(updates, rule.init(params), params, weights=weights)

    got, want = jax.jit(lambda updates: (run(updates), run(cj.dense(updates))))(updates)
    assert_close(got, want, rtol=1e-4)


# Against plain numpy.


def network(params, batch, key):
    hidden = jnp.tanh(batch["x"] @ params["one"] + params["bias"][None])
    logits = hidden @ params["two"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def numpy_sgd(params, x, y, batches, rate, momentum):
    """Two layers by hand, in float64: what was sent, and the losses."""
    start = {name: value.copy() for name, value in params.items()}
    params, speed, losses = dict(params), {name: np.zeros_like(p) for name, p in params.items()}, []
    for rows in batches:
        a, labels, count = x[rows], y[rows], len(rows)
        hidden = np.tanh(a @ params["one"] + params["bias"])
        logits = hidden @ params["two"]
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        losses.append(-np.log(p[np.arange(count), labels]).mean())
        d_logits = (p - np.eye(p.shape[1])[labels]) / count
        d_hidden = (d_logits @ params["two"].T) * (1 - hidden**2)
        grads = {"one": a.T @ d_hidden, "bias": d_hidden.sum(axis=0), "two": hidden.T @ d_logits}
        for name, g in grads.items():
            speed[name] = momentum * speed[name] + g
            params[name] = params[name] - rate * speed[name]
    return {name: start[name] - params[name] for name in params}, losses


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_against_numpy(momentum):
    rng = np.random.default_rng(5)
    count, length, batch_size = 10, 12, 4
    params = {"one": rng.normal(size=(7, 6)), "bias": rng.normal(size=6), "two": rng.normal(size=(6, 5))}
    x, y = rng.normal(size=(length, 7)), rng.integers(0, 5, length)
    x[count:] = np.nan
    data = cj.ClientData(
        {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.int32)}, jnp.int32(count), jnp.int32(2)
    )
    local = cj.local.sgd(network, optax.sgd(0.3, momentum=momentum), batch_size=batch_size, representation="lowrank")
    key = jax.random.key(3)
    single = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    upload, _, info = jax.jit(local.update)(single, (), data, key)
    stream = shuffled_epochs(jax.random.split(key, 3)[0], jnp.int32(0), jnp.int32(count), length=length, num_epochs=1)
    batches = [np.asarray(batch_indices(stream, jnp.int32(t), batch_size)) for t in range(3)]
    want, losses = numpy_sgd(params, x, y, batches, 0.3, momentum)
    for name, x in cj.dense(upload.delta).items():
        np.testing.assert_allclose(x, want[name], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(info.loss, np.mean(losses), rtol=1e-5)
    assert info.num_steps == 3
    assert {name: int(rank) for name, rank in info.rank.items()} == {"one": 12, "bias": 0, "two": 12}
    assert upload.delta["one"].left.shape == (12, 7) and upload.delta["one"].right.shape == (12, 6)
    assert upload.delta["two"].left.shape == (12, 6) and upload.delta["two"].right.shape == (12, 5)
    assert isinstance(upload.delta["bias"], jax.Array)


# Many clients.

MANY = 304


@functools.cache
def federation(count, width=4, inputs=7, hidden=6):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, width + 1, count)
    x = rng.normal(size=(count, width, inputs))
    x[np.arange(width)[None] >= sizes[:, None]] = np.nan
    examples = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(rng.integers(0, 3, (count, width)), jnp.int32)}
    data = cj.ClientData(examples, jnp.asarray(sizes, jnp.int32), jnp.asarray(sizes // 2, jnp.int32))
    params = {"one": draw(rng, inputs, hidden), "bias": draw(rng, hidden), "two": draw(rng, hidden, 3)}
    return params, Cohort(data, jnp.asarray(sizes, jnp.float32), jnp.arange(count, dtype=jnp.int32))


def make_local(representation, loss_fn=network, **options):
    return cj.local.sgd(
        loss_fn, optax.sgd(0.1, momentum=0.9), batch_size=BATCH, representation=representation, **options
    )


def work(representation, map_fn, params, cohort):
    keys = client_keys(jax.random.key(1), cohort.client_id)
    upload, state, info = map_fn(make_local(representation).update, params, (), cohort.data, keys)
    return cj.dense(upload.delta), state, info


@pytest.mark.slow
def test_layouts_of_three_hundred_clients(mesh):
    """XLA:CPU has computed NaN for such programs, jitted and with many clients only."""
    params, cohort = federation(MANY)
    dense, _, dense_info = work("dense", cj.cohort_map(), params, cohort)
    layouts = {
        "not jitted": functools.partial(work, "lowrank", cj.cohort_map()),
        "jit": jax.jit(functools.partial(work, "lowrank", cj.cohort_map())),
        "chunks": jax.jit(functools.partial(work, "lowrank", cj.cohort_map(37))),
        "mesh": jax.jit(functools.partial(work, "lowrank", cj.cohort_map(mesh=mesh))),
    }
    for name, run in layouts.items():
        fast(name not in ("jit", "mesh"))
        delta, state, info = run(params, cohort)
        assert state == () and all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(delta)), name
        assert_close(delta, dense, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(info.loss, dense_info.loss, rtol=1e-5)
        np.testing.assert_array_equal(info.num_steps, dense_info.num_steps)
        np.testing.assert_array_equal(info.rank["one"], 2 * BATCH)


# Rounds.


def features_fn(params, x):
    hidden = jnp.tanh(x @ params["one"] + params["bias"][None])
    return {"one": hidden, "two": hidden @ params["two"]}


def logits_fn(params, x):
    return features_fn(params, x)["two"]


def cedar_local(representation):
    local = cj.meta.cedar(network, optax.sgd(0.1), optax.sgd(0.2), batch_size=BATCH, representation=representation)
    stimuli = draw(np.random.default_rng(8), 5, 7)
    return cj.layers.upload_filter(local, features_fn, stimuli, num_skipped=1)


def server(rule):
    return optax.chain(cj.attacks.sign_flip(2.0), rule, optax.sgd(0.7, momentum=0.5))


ROUNDS = {
    "loop": lambda r, mesh: cj.federated_round(
        make_local(r), optax.chain(cj.robust.mean(), optax.sgd(1.0)), cj.cohort_map(1)
    ),
    "on_a_mesh": lambda r, mesh: cj.federated_round(
        make_local(r), optax.chain(cj.robust.mean(), optax.sgd(1.0)), cj.cohort_map(2, mesh=mesh)
    ),
    "attacked": lambda r, mesh: cj.federated_round(make_local(r), server(cj.robust.mean()), cj.cohort_map(3)),
    "streamed": lambda r, mesh: cj.streamed_round(make_local(r), optax.sgd(1.0), chunk_size=3),
    "streamed_on_a_mesh": lambda r, mesh: cj.streamed_round(make_local(r), optax.sgd(1.0), chunk_size=2, mesh=mesh),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUNDS)
def test_rounds(name, mesh):
    """One round with absent clients that hold NaN."""
    params, cohort = federation(8)
    absent = jnp.array([False, True, False, False, False, False, True, False])
    x = jnp.where(absent[:, None, None], jnp.nan, cohort.data.examples["x"])
    cohort = cohort._replace(
        data=cohort.data._replace(examples={**cohort.data.examples, "x": x}),
        weights=jnp.where(absent, 0, cohort.weights),
        byzantine=jnp.arange(8) == 3,
    )

    def both(params, cohort, key):
        results = []
        for representation in ("dense", "lowrank"):
            algorithm = ROUNDS[name](representation, mesh)
            state, client_state, info = algorithm.step(algorithm.init(params), cohort, key)
            local = info.local._replace(rank=())
            results.append((state, client_state, jax.tree.map(lambda x: x[~absent], local), info.server))
        return results

    absent = np.asarray(absent)
    want, got = jax.jit(both)(params, cohort, jax.random.key(2))
    assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(got[0].params))


@pytest.mark.slow
def test_a_whole_run_of_cedar():
    """Low-rank meta updates, layers that are left out, screening; rounds in one scan, the state donated."""
    rng, (params, _) = np.random.default_rng(4), federation(8)
    examples = {"x": rng.normal(size=(24, 7)).astype(np.float32), "y": rng.integers(0, 3, 24).astype(np.int32)}
    dataset = cj.data.federated_dataset(examples, np.repeat(np.arange(6), [5, 4, 2, 3, 6, 4]))
    dataset = cj.data.split_support_query(dataset, order="keep")
    results = []
    for representation in ("dense", "lowrank"):
        rule = cj.robust.cedar(logits_fn, draw(np.random.default_rng(9), 6, 7))
        algorithm = cj.federated_round(cedar_local(representation), optax.chain(rule, optax.sgd(1.0)))
        run = jax.jit(functools.partial(cj.run_rounds, algorithm, num_rounds=3, num_clients=4), donate_argnums=1)
        state = cj.init_run(algorithm, dataset, jax.tree.map(jnp.copy, params))
        state, history, _ = run(dataset, state, jax.random.key(0))
        local = history.info.local
        results.append((state, history._replace(info=history.info._replace(local=local._replace(local=())))))
    assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


# What is compiled.


def shapes_of(jaxpr):
    """Shapes of all values of a program, inner programs included."""
    found = set()
    for eqn in jaxpr.eqns:
        found |= {tuple(v.aval.shape) for v in eqn.outvars if hasattr(v.aval, "shape")}
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found |= shapes_of(inner)
    return found


BIG = {"width": 4, "inputs": 61, "hidden": 53}


@pytest.mark.parametrize(
    "make",
    [
        make_local,
        lambda r: cj.meta.maml(network, optax.sgd(0.1), 2, batch_size=1, query_batch_size=2, representation=r),
        lambda r: cj.meta.cedar(network, optax.sgd(0.1), optax.sgd(0.2), batch_size=2, representation=r),
    ],
    ids=["sgd", "maml", "cedar"],
)
def test_no_client_has_a_matrix_of_its_own(make):
    count = 17
    params, cohort = federation(count, **BIG)
    matrices = {count * math.prod(params[name].shape) for name in ("one", "two")}

    def mean(representation):
        def run(params, cohort):
            keys = client_keys(jax.random.key(1), cohort.client_id)
            upload, _, _ = cj.cohort_map()(make(representation).update, params, (), cohort.data, keys)
            return cj.weighted_mean(upload.delta, cohort.weights), cj.sq_norms(upload.delta)

        return {math.prod(shape) for shape in shapes_of(jax.make_jaxpr(run)(params, cohort).jaxpr)}

    assert matrices <= mean("dense")
    assert not matrices & mean("lowrank")


def test_memory_of_a_streamed_round():
    params, cohort = federation(64, width=4, inputs=200, hidden=150)
    memory = {}
    for representation in ("dense", "auto"):
        algorithm = cj.streamed_round(make_local(representation), optax.sgd(1.0), chunk_size=32)
        lowered = jax.jit(algorithm.step).lower(algorithm.init(params), cohort, jax.random.key(0))
        memory[representation] = lowered.compile().memory_analysis().temp_size_in_bytes
    assert memory["auto"] < memory["dense"] / 5
    assert memory["auto"] < 32 * 200 * 150 * 4  # one matrix a client of a chunk
