"""Compressed uploads: what arrives, what is remembered, and that nothing is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax import compress

SHAPES = {"one": {"bias": (3,), "kernel": (4, 3)}, "two": {"kernel": (9,)}}
FULL = 4 * 24


def like(make):
    return jax.tree.map(make, SHAPES, is_leaf=lambda s: isinstance(s, tuple))


def zeros():
    return like(jnp.zeros)


def told(mask_of=lambda data: None, dtype=None):
    """A local update that uploads what its data say, and counts its rounds."""

    def update(shared, state, data, key):
        delta = data["delta"] if dtype is None else jax.tree.map(lambda x: x.astype(dtype), data["delta"])
        return cj.Upload(delta, mask_of(data)), state + 1, {"key": jax.random.key_data(key)[-1]}

    return cj.LocalUpdate(lambda params: jnp.zeros((), jnp.int32), update)


def dyadic(rng):
    """Small multiples of 1/8, of which float32 adds thousands without rounding."""
    return like(lambda s: jnp.asarray(rng.integers(-64, 65, size=s) / 8, jnp.float32))


def run(local, rounds):
    state, uploads, infos, update = local.init(zeros()), [], [], jax.jit(local.update)
    for i, data in enumerate(rounds):
        upload, state, info = update(zeros(), state, data, jax.random.key(i))
        uploads.append(upload)
        infos.append(info)
    return uploads, state, infos


def total(trees):
    return jax.tree.map(lambda *leaves: np.sum(np.stack(leaves).astype(np.float64), 0), *trees)


EXACT = {
    "top_k": lambda: compress.top_k(0.25),
    "sampled_top_k": lambda: compress.sampled_top_k(0.25),
    "random_k": lambda: compress.random_k(0.25, scale=False),
    "top_k_whole": lambda: compress.top_k(0.25, scope="model"),
}


@pytest.mark.parametrize("name", EXACT)
def test_nothing_is_lost(name):
    rng = np.random.default_rng(0)
    rounds = [{"delta": dyadic(rng)} for _ in range(12)]
    uploads, state, infos = run(compress.with_error_feedback(told(), EXACT[name]()), rounds)
    want, sent = total([r["delta"] for r in rounds]), total([u.delta for u in uploads])
    for a, b, e in zip(*map(jax.tree.leaves, (want, sent, state.error)), strict=True):
        assert np.abs(e).max() > 0
        np.testing.assert_array_equal(b, a - np.asarray(e, np.float64))
    assert int(state.client_state) == 12
    assert all(int(info.full_bytes) == FULL for info in infos)


@pytest.mark.parametrize("make", [compress.sign, lambda: compress.uniform_quantize(2), lambda: compress.qsgd(2)])
def test_nothing_is_lost_to_rounding(make):
    rng = np.random.default_rng(1)
    rounds = [{"delta": dyadic(rng)} for _ in range(8)]
    uploads, state, _ = run(compress.with_error_feedback(told(), make()), rounds)
    want, sent = total([r["delta"] for r in rounds]), total([u.delta for u in uploads])
    for a, b, e in zip(*map(jax.tree.leaves, (want, sent, state.error)), strict=True):
        np.testing.assert_allclose(b, a - np.asarray(e, np.float64), atol=1e-4)


@pytest.mark.parametrize("num_layers", [None, 20])
def test_masked_layers_send_nothing_and_wait(num_layers):
    rng = np.random.default_rng(2)
    names = [("one", "bias"), ("one", "kernel"), ("two", "kernel")]
    rounds = []
    for _ in range(10):
        bits = rng.integers(0, 2, size=3).astype(np.float32)
        mask = {"one": {"bias": bits[0], "kernel": bits[1]}, "two": {"kernel": bits[2]}}
        mask = jax.tree.map(jnp.float32, mask)
        delta = jax.tree.map(lambda m, d: jnp.where(m > 0, d, 0.0), mask, dyadic(rng))  # as a filter leaves it
        rounds.append({"delta": delta, "mask": mask})
    local = compress.with_error_feedback(told(lambda data: data["mask"]), compress.top_k(0.25), num_layers=num_layers)
    state, update = local.init(zeros()), jax.jit(local.update)
    sent = []
    for i, data in enumerate(rounds):
        before = state.error
        upload, state, info = update(zeros(), state, data, jax.random.key(i))
        jax.tree.map(np.testing.assert_array_equal, upload.mask, data["mask"])
        bits = 8 * (1 if num_layers is None else 3)
        for a, b in names:
            if float(data["mask"][a][b]) == 0:
                assert not np.asarray(upload.delta[a][b]).any()
                np.testing.assert_array_equal(state.error[a][b], before[a][b])
            else:
                size = before[a][b].size
                bits += max(1, round(0.25 * size)) * (int(np.ceil(np.log2(size))) + 32)
        assert int(info.uploaded_bits) == bits and int(info.uploaded_bytes) == -(-bits // 8)
        sent.append(upload.delta)
    want = total([r["delta"] for r in rounds])
    for a, b, e in zip(*map(jax.tree.leaves, (want, total(sent), state.error)), strict=True):
        np.testing.assert_array_equal(b, a - np.asarray(e, np.float64))


def test_behind_a_filter():
    params = like(lambda s: jnp.asarray(np.random.default_rng(0).normal(size=s), jnp.float32))
    names = ("one", "two")
    filtered = cj.layers.upload_filter(
        told(), lambda p, x: {n: x @ p[n]["kernel"].reshape(-1, 3)[:3] for n in names}, jnp.eye(3),
        num_skipped=1, score="update_norm",
    )  # fmt: skip
    local = compress.with_error_feedback(filtered, compress.sign(), num_layers=2)
    state = local.init(params)
    delta = dyadic(np.random.default_rng(1))
    for i in range(3):
        upload, state, info = jax.jit(local.update)(params, state, {"delta": delta}, jax.random.key(i))
    kept = {"one": 15 + 2 * 32, "two": 9 + 32}
    want = 8 + sum(bits for name, bits in kept.items() if float(jax.tree.leaves(upload.mask[name])[0]) > 0)
    assert int(info.uploaded_bits) == want and want < 8 + sum(kept.values())
    assert isinstance(info.local, cj.layers.FilterInfo) and isinstance(state.client_state, cj.layers.FilterState)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["top_k", "random_k"])
def test_a_failed_round_is_uploaded_as_such_and_forgotten(name, bad):
    rng = np.random.default_rng(3)
    good, more = dyadic(rng), dyadic(rng)
    spoilt = jax.tree.map(lambda x: x, good)
    spoilt["one"]["kernel"] = good["one"]["kernel"].at[1, 1].set(bad)
    local = compress.with_error_feedback(told(), EXACT[name]())
    uploads, state, _ = run(local, [{"delta": good}, {"delta": spoilt}])
    assert not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(uploads[1].delta))
    before = run(local, [{"delta": good}])[1]
    jax.tree.map(np.testing.assert_array_equal, state.error, before.error)
    uploads, state, _ = run(local, [{"delta": good}, {"delta": spoilt}, {"delta": more}])
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((uploads[2].delta, state.error)))


def test_without_a_memory():
    delta = dyadic(np.random.default_rng(4))
    local = compress.with_compression(told(), compress.uniform_quantize(4))
    uploads, state, infos = run(local, [{"delta": delta}] * 3)
    assert state == compress.CompressionState(3, ())
    assert int(infos[0].uploaded_bits) == 4 * 24 + 3 * 64 and int(infos[0].uploaded_bytes) == 36
    values = np.stack([np.asarray(u.delta["two"]["kernel"]) for u in uploads])
    assert values.std(0).max() > 0  # new keys, new draws
    masked = compress.with_compression(told(lambda data: data["mask"]), compress.uniform_quantize(4))
    mask = jax.tree.map(jnp.float32, {"one": {"bias": 0.0, "kernel": 1.0}, "two": {"kernel": 0.0}})
    uploads, _, infos = run(masked, [{"delta": delta, "mask": mask}])
    assert not np.asarray(uploads[0].delta["one"]["bias"]).any() and np.asarray(uploads[0].delta["one"]["kernel"]).any()
    assert int(infos[0].uploaded_bits) == 8 + 4 * 12 + 64
    spoilt = jax.tree.map(lambda x: x.at[0].set(jnp.nan), delta)
    uploads, _, _ = run(local, [{"delta": spoilt}])
    assert not np.isfinite(uploads[0].delta["two"]["kernel"]).all()


@pytest.mark.parametrize("wrap", [compress.with_compression, compress.with_error_feedback])
def test_wrapping_changes_no_draws_and_keeps_share_and_model(wrap):
    inner = told()._replace(share=lambda params: params["two"], model=lambda shared, state: {"two": shared, "n": state})

    def update(shared, state, data, key):
        upload, state, info = told().update(shared, state, data, key)
        return upload._replace(delta=upload.delta["two"]), state, info

    local = wrap(inner._replace(update=update), compress.top_k(1.0))
    data, key = {"delta": dyadic(np.random.default_rng(5))}, jax.random.key(8)
    shared = local.share(zeros())
    upload, state, info = local.update(shared, local.init(zeros()), data, key)
    assert int(info.local["key"]) == int(jax.random.key_data(key)[-1])
    jax.tree.map(np.testing.assert_array_equal, upload.delta, data["delta"]["two"])
    assert int(local.model(shared, state)["n"]) == 1


def test_what_rounding_to_narrow_leaves_loses_is_remembered():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), zeros())
    local = compress.with_error_feedback(told(dtype=jnp.bfloat16), compress.top_k(1.0))
    state = local.init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.error)} == {jnp.dtype(jnp.float32)}
    state = state._replace(error=jax.tree.map(lambda x: x + 2.0**-12, state.error))
    upload, state, _ = local.update(params, state, {"delta": like(jnp.ones)}, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(upload.delta)} == {jnp.dtype(jnp.bfloat16)}
    for leaf in jax.tree.leaves(state.error):
        np.testing.assert_array_equal(leaf, 2.0**-12)


def test_low_rank_deltas_are_written_out():
    rng = np.random.default_rng(6)
    w, x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 4), (6, 5), (6, 4)))
    data = cj.ClientData({"x": x, "y": y}, jnp.int32(6), jnp.int32(3))

    def loss_fn(params, batch, key):
        return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)

    def one(representation):
        local = cj.local.sgd(loss_fn, optax.sgd(0.1), batch_size=2, representation=representation)
        local = compress.with_error_feedback(local, compress.top_k(0.3))
        return local.update({"w": w}, local.init({"w": w}), data, jax.random.key(0))[0].delta["w"]

    np.testing.assert_allclose(one("lowrank"), one("dense"), rtol=1e-5, atol=1e-6)


def test_a_whole_round_runs_over_clients():
    local = cj.local.sgd(lambda w, x, key: 0.5 * jnp.sum((w - x[0]) ** 2), optax.sgd(1.0), batch_size=1)
    sending = compress.with_error_feedback(local, compress.top_k(0.5))
    algorithm = cj.federated_round(sending, optax.chain(cj.robust.mean(), optax.sgd(1.0)), cj.cohort_map(2))
    params, count = jnp.zeros(4), jnp.ones(5, jnp.int32)
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(5, 1, 4)), jnp.float32)
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (5, *x.shape)), algorithm.init_client(params))
    cohort = cj.Cohort(cj.ClientData(rows, count, count), jnp.ones(5), jnp.arange(5, dtype=jnp.int32), state)
    after, client_state, info = jax.jit(algorithm.step)(algorithm.init(params), cohort, jax.random.key(0))
    kept = np.where(np.abs(rows[:, 0]) >= np.sort(np.abs(rows[:, 0]), 1)[:, 2:3], rows[:, 0], 0)
    np.testing.assert_allclose(after.params, kept.mean(0), rtol=1e-5, atol=1e-6)
    assert info.local.uploaded_bits.tolist() == [68] * 5
    np.testing.assert_allclose(client_state.error, kept - rows[:, 0], atol=1e-6)


def test_no_error_when_everything_is_sent_has_no_error():
    delta = dyadic(np.random.default_rng(7))
    _, state, _ = run(compress.with_error_feedback(told(), compress.top_k(1.0)), [{"delta": delta}] * 2)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.error))


def test_a_mask_of_layers_needs_vectors_of_layers():
    local = compress.with_compression(
        told(lambda data: jax.tree.map(lambda x: jnp.float32(1.0), data["delta"])), compress.sign(scope="model")
    )
    with pytest.raises(ValueError, match="mask must be None for a compressor of the whole model"):
        run(local, [{"delta": zeros()}])
