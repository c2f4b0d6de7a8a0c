import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax import lax

import cedarjax as cj
from cedarjax.core.lowrank import LowRank

LENGTH, BATCH, NUM_STEPS = 6, 3, 2
COUNTS = np.array([6, 5, 2])


@pytest.fixture(autouse=True)
def fast_compilation():
    """Most of the time here is XLA's. What must hold when optimised is in the tests of the updates."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_clients(shape=(4,), dtype=None):
    """Three clients of unequal sizes, so that one of them skips steps; the padding is NaN."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, LENGTH, *shape))
    x[np.arange(LENGTH)[None] >= COUNTS[:, None]] = np.nan
    dtype = dtype or (jnp.float64 if jax.config.jax_enable_x64 else jnp.float32)
    y = rng.integers(0, 3, size=(3, LENGTH))
    examples = {"x": jnp.asarray(x, dtype), "y": jnp.asarray(y, jnp.int32)}
    return cj.ClientData(examples, jnp.asarray(COUNTS, jnp.int32), jnp.asarray(COUNTS // 2, jnp.int32))


def draw(shapes, dtype=None):
    rng = np.random.default_rng(1)
    dtype = dtype or (jnp.float64 if jax.config.jax_enable_x64 else jnp.float32)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), dtype), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


def assert_close(got, want, rtol, atol):
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, path
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * max(1.0, np.abs(b).max()), err_msg=str(path))


def check(make, params, data, representation="lowrank", rtol=1e-11, atol=1e-12):
    """All results are those of the dense representation; returns the ranks, one a leaf."""
    state = make("dense").init(params)

    def work(representation, params, data, keys):
        update = make(representation).update
        upload, state_after, info = jax.vmap(update, in_axes=(None, None, 0, 0))(params, state, data, keys)
        return cj.dense(upload.delta), state_after, info._replace(rank=()), upload, info.rank

    def both(*args):
        return work("dense", *args), work(representation, *args)

    keys = jax.random.split(jax.random.key(7), data.num_examples.shape[0])
    (*want, _, no_rank), (*got, upload, rank) = jax.jit(both)(params, data, keys)
    assert no_rank == ()
    assert_close(got, want, rtol, atol)
    ranks = {}
    for (path, sent), r in zip(
        jax.tree.leaves_with_path(upload.delta, is_leaf=lambda x: isinstance(x, LowRank)),
        jax.tree.leaves(rank),
        strict=True,
    ):
        name = "/".join(key.key for key in path)
        assert (r == r[0]).all() and r.dtype == jnp.int32
        assert int(r[0]) == (sent.left.shape[1] if isinstance(sent, LowRank) else 0), name
        ranks[name] = int(r[0])
    return ranks


def sgd(loss_fn, tx=None, **options):
    tx = optax.sgd(0.1, momentum=0.9) if tx is None else tx
    return lambda representation: cj.local.sgd(
        loss_fn, tx, batch_size=BATCH, **{"representation": representation, **options}
    )


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


# Models. In every row: shapes of the parameters (or a function that makes them), the loss, the rank a row of a batch
# of every parameter.


def hand_written(params, batch, key):
    return cross_entropy(jnp.tanh(batch["x"] @ params["one"] + params["bias"][None]) @ params["two"], batch["y"])


SHAPES = {"one": (4, 5), "bias": (5,), "two": (5, 3)}


@functools.cache
def flax_model(make_module):
    return cj.nn.functional(make_module)


def of_module(make_module, shape=(4,)):
    def init():
        params = flax_model(make_module).init(jax.random.key(0))
        return jax.tree.map(lambda p: p.astype(jnp.float64) if jax.config.jax_enable_x64 else p, params)

    def loss_fn(params, batch, key):
        return cross_entropy(flax_model(make_module).apply(params, batch["x"]), batch["y"])

    return init, loss_fn


def two_libraries():
    """A layer of nnx without bias, and one of linen."""
    first = flax_model(make_linear)
    last = linen.Dense(3, param_dtype=jnp.float64)

    def init():
        one = jax.tree.map(lambda p: p.astype(jnp.float64), first.init(jax.random.key(0)))
        return {"nnx": one, "linen": last.init(jax.random.key(0), jnp.ones((1, 5)))["params"]}

    def loss_fn(params, batch, key):
        hidden = jnp.tanh(first.apply(params["nnx"], batch["x"]))
        return cross_entropy(last.apply({"params": params["linen"]}, hidden), batch["y"])

    return init, loss_fn


def make_linear(rngs):
    return nnx.Linear(4, 5, use_bias=False, rngs=rngs)


def tied(params, batch, key):
    return jnp.mean(jnp.square(jnp.tanh(batch["x"] @ params["w"]) @ params["w"].T - batch["x"]))


def embedding(params, batch, key):
    return cross_entropy(jnp.tanh(params["table"][batch["y"]]) @ params["head"], batch["y"])


def recurrent(params, batch, key):
    def step(hidden, x):
        return jnp.tanh(hidden @ params["again"] + x @ params["in"]), None

    start = jnp.zeros((batch["x"].shape[0], 5), batch["x"].dtype)
    hidden, _ = lax.scan(step, start, jnp.moveaxis(batch["x"], 1, 0))
    return cross_entropy(hidden @ params["out"], batch["y"])


@jax.custom_jvp
def squash(x):
    return jnp.tanh(x)


@squash.defjvp
def squash_jvp(primals, tangents):
    y = jnp.tanh(primals[0])
    return y, tangents[0] * (1 - y * y)


@jax.custom_vjp
def straight(x):
    return jnp.maximum(x, 0.0)


straight.defvjp(lambda x: (straight(x), x), lambda x, g: (jnp.where(x > -1.0, g, jnp.zeros_like(g)),))


@jax.jit
@jax.checkpoint
def wrapped(params, batch, key):
    """Custom derivatives and dropout inside of `jax.checkpoint` inside of `jax.jit`."""
    hidden = straight(squash(batch["x"] @ params["one"]))
    kept = jax.random.bernoulli(key, 0.5, hidden.shape)
    return cross_entropy(jnp.where(kept, 2 * hidden, jnp.zeros_like(hidden)) @ params["two"], batch["y"])


def attention(params, batch, key):
    query, keys = (batch["x"] @ params[name] for name in ("query", "keys"))
    scores = jax.nn.softmax(jnp.einsum("bsk,btk->bst", query, keys))
    return cross_entropy(jnp.einsum("bst,bti->bi", scores, batch["x"]) @ params["head"], batch["y"])


def one_number_wide(params, batch, key):
    outputs = (jax.nn.relu(batch["x"] @ params["one"]) @ params["two"])[:, 0]
    return jnp.mean(jnp.square(outputs - batch["y"].astype(outputs.dtype)))


def cut_off(params, batch, key):
    return cross_entropy(jnp.tanh(batch["x"] @ lax.stop_gradient(params["one"])) @ params["two"], batch["y"])


TWO = {"one": (4, 5), "two": (5, 3)}
MODELS = {
    "nnx_mlp": (
        *of_module(lambda rngs: cj.nn.MLP(4, (5, 6), 3, rngs=rngs)),
        {
            f"{name}/{leaf}": int(leaf == "kernel")
            for name in ("block1", "block2", "head")
            for leaf in ("kernel", "bias")
        },
    ),
    "two_libraries": (*two_libraries(), {"nnx/kernel": 1, "linen/kernel": 1, "linen/bias": 0}),
    "convolution": (
        *of_module(lambda rngs: cj.nn.CNN(1, (2,), 3, num_groups=1, rngs=rngs)),
        {"block1/conv/kernel": 0, "block1/norm/scale": 0, "block1/norm/bias": 0, "head/kernel": 1, "head/bias": 0},
    ),
    "tied": ({"w": (4, 5)}, tied, {"w": 2}),
    "embedding": ({"table": (6, 5), "head": (5, 3)}, embedding, {"table": 0, "head": 1}),
    "recurrent": ({"again": (5, 5), "in": (4, 5), "out": (5, 3)}, recurrent, {"again": 0, "in": 0, "out": 1}),
    "wrapped": (TWO, wrapped, {"one": 1, "two": 1}),
    "attention": ({"query": (4, 5), "keys": (4, 5), "head": (4, 3)}, attention, {"query": 2, "keys": 2, "head": 1}),
    # The batch has as many rows as the matrix that follows: activations of the shape of a parameter.
    "one_number_wide": ({"one": (4, BATCH), "two": (BATCH, 1)}, one_number_wide, {"one": 1, "two": 1}),
    "cut_off": (TWO, cut_off, {"one": 0, "two": 1}),
}
INPUTS = {"convolution": (4, 4, 1), "recurrent": (2, 4), "attention": (2, 4)}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models(name, x64):
    shapes, loss_fn, ranks = MODELS[name]
    params = shapes() if callable(shapes) else draw(shapes)
    got = check(sgd(loss_fn), params, make_clients(INPUTS.get(name, (4,))))
    assert got == {leaf: rank * NUM_STEPS * BATCH for leaf, rank in ranks.items()}


def test_a_matrix_that_shrinks_is_sent_whole(x64):
    """A part of the received matrix is left in the difference: no factors of few rows could hold it."""

    def loss_fn(params, batch, key):
        first = params["one"] / jnp.sqrt(jnp.sum(params["one"] ** 2))
        penalty = 0.05 * jnp.sum(params["two"] ** 2)
        return cross_entropy(jnp.tanh(batch["x"] @ first) @ params["two"] @ params["three"], batch["y"]) + penalty

    shapes = {"one": (4, 5), "two": (5, 6), "three": (6, 4)}  # no batch of three rows has the shape of one of them
    ranks = check(sgd(loss_fn), draw(shapes), make_clients())
    assert ranks == {"one": 0, "two": 0, "three": NUM_STEPS * BATCH}


OPTIMISERS = {
    "nesterov": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(0.3), optax.sgd(0.5)),
    "schedule": lambda: optax.sgd(optax.linear_schedule(0.5, 0.1, 2)),
    "inject": lambda: optax.inject_hyperparams(optax.sgd, static_args="nesterov")(learning_rate=0.1, momentum=0.9),
    "chain": lambda: optax.chain(
        optax.trace(0.5), optax.normalize_by_update_norm(), optax.scale(0.5), optax.scale(-0.2)
    ),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers(name, x64):
    ranks = check(sgd(hand_written, OPTIMISERS[name]()), draw(SHAPES), make_clients())
    assert ranks == {"one": NUM_STEPS * BATCH, "bias": 0, "two": NUM_STEPS * BATCH}


def decayed(rate=0.1):
    """Weight decay of the matrices only."""
    chosen = optax.masked(optax.add_decayed_weights(rate), lambda p: jax.tree.map(lambda x: x.ndim == 2, p))
    return optax.chain(chosen, optax.sgd(0.1, momentum=0.9))


def test_weight_decay(x64):
    assert set(check(sgd(hand_written, decayed()), draw(SHAPES), make_clients()).values()) == {0}


@pytest.mark.parametrize("representation", ["lowrank", "auto"])
def test_an_optimiser_for_these_parameters(representation):
    tx = optax.partition({"a": optax.sgd(0.1), "b": optax.sgd(0.2)}, {"one": "a", "bias": "b", "two": "b"})
    check(sgd(hand_written, tx), draw(SHAPES), make_clients(), representation, rtol=1e-5, atol=1e-6)


def straggler(data, key):
    return jnp.minimum(data.num_examples // 3, 1)


LOCAL_UPDATES = {
    "prox": lambda r: cj.local.prox(
        0.7, hand_written, optax.sgd(0.1, momentum=0.9), batch_size=BATCH, num_epochs=2, representation=r
    ),
    "stragglers": lambda r: cj.local.sgd(
        hand_written, optax.sgd(0.1), batch_size=BATCH, num_steps_fn=straggler, representation=r
    ),
    "one_step": lambda r: cj.local.sgd(hand_written, optax.sgd(0.1), batch_size=LENGTH, representation=r),
    "reptile": lambda r: cj.meta.reptile(hand_written, optax.sgd(0.1), 3, batch_size=BATCH, representation=r),
    "cedar": lambda r: cj.meta.cedar(
        hand_written, optax.sgd(0.1, momentum=0.9), optax.sgd(0.2), batch_size=2, num_epochs=2, representation=r
    ),
    "maml": lambda r: cj.meta.maml(hand_written, optax.sgd(0.1), 3, representation=r),
    "maml_one_step": lambda r: cj.meta.maml(hand_written, optax.sgd(0.1), 1, remat=False, representation=r),
    "maml_batches": lambda r: cj.meta.maml(
        hand_written, decayed(), 3, batch_size=2, query_batch_size=3, representation=r
    ),
    "maml_no_remat": lambda r: cj.meta.maml(
        hand_written, optax.sgd(0.1, momentum=0.9), 3, remat=False, batch_size=2, query_batch_size=3, representation=r
    ),
    "fomaml": lambda r: cj.meta.maml(hand_written, optax.sgd(0.1), 3, first_order=True, representation=r),
    "fomaml_batches": lambda r: cj.meta.maml(
        hand_written, optax.sgd(0.1), 1, first_order=True, batch_size=2, query_batch_size=3, representation=r
    ),
}


@pytest.mark.parametrize("name", LOCAL_UPDATES)
def test_local_updates(name, x64):
    ranks = check(LOCAL_UPDATES[name], draw(SHAPES), make_clients())
    assert ranks["bias"] == 0 and ranks["one"] > 0 and ranks["two"] > 0


def test_narrow_parameters():
    """In bfloat16 the two differ by its rounding; both are near the run in float64."""
    make = sgd(hand_written, optax.sgd(optax.linear_schedule(0.5, 0.1, 3), momentum=0.5))
    params, data = draw(SHAPES, jnp.bfloat16), make_clients(dtype=jnp.bfloat16)
    ranks = check(make, params, data, rtol=0.1, atol=0.03)
    assert ranks["one"] == NUM_STEPS * BATCH


def test_auto_takes_the_cheaper():
    shapes = {"one": (40, 30), "bias": (30,), "two": (30, 3)}  # 6 * 70 <= 1200, but 6 * 33 > 90
    ranks = check(sgd(hand_written), draw(shapes), make_clients((40,)), "auto", rtol=1e-4, atol=1e-6)
    assert ranks == {"one": NUM_STEPS * BATCH, "bias": 0, "two": 0}


@pytest.mark.standard_promotion
@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.sign_sgd(0.1)], ids=["adam", "sign"])
def test_auto_is_dense_where_the_optimiser_is_not_linear(tx):
    local = sgd(hand_written, tx)("auto")
    data = jax.tree.map(lambda x: x[0], make_clients((40,)))
    params = draw({"one": (40, 30), "bias": (30,), "two": (30, 3)})
    upload, _, info = local.update(params, (), data, jax.random.key(0))
    assert {int(rank) for rank in jax.tree.leaves(info.rank)} == {0}
    assert jax.tree.structure(upload.delta) == jax.tree.structure(params)


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    ("tx", "culprit"),
    [
        (optax.adam(0.1), "'(mul|square|integer_pow)'"),
        (optax.sign_sgd(0.1), "'sign'"),
        (optax.chain(optax.clip(1.0), optax.sgd(0.1)), "'(clamp|max|min|jit)'"),
    ],
    ids=["adam", "sign", "clip"],
)
@pytest.mark.parametrize(
    "build",
    [
        lambda tx: cj.local.sgd(hand_written, tx, batch_size=1, representation="lowrank"),
        lambda tx: cj.local.prox(0.1, hand_written, tx, batch_size=1, representation="lowrank"),
        lambda tx: cj.meta.maml(hand_written, tx, 1, representation="lowrank"),
        lambda tx: cj.meta.reptile(hand_written, tx, 1, batch_size=1, representation="lowrank"),
        lambda tx: cj.meta.cedar(hand_written, optax.sgd(0.1), tx, representation="lowrank"),
        lambda tx: cj.meta.cedar(hand_written, tx, optax.sgd(0.1), representation="lowrank"),
    ],
    ids=["sgd", "prox", "maml", "reptile", "cedar_outer", "cedar_inner"],
)
def test_optimisers_that_are_refused(build, tx, culprit):
    with pytest.raises(ValueError, match=f"must be linear in the gradients .* got one that takes {culprit}"):
        build(tx)


def test_an_unknown_representation():
    with pytest.raises(ValueError, match='must be "dense", "lowrank" or "auto", got \'sparse\''):
        cj.local.sgd(hand_written, optax.sgd(0.1), batch_size=1, representation="sparse")


def test_parameters_without_a_matrix():
    def loss_fn(w, batch, key):
        return jnp.mean(jnp.square(batch["x"] @ w["w"] - w["b"]))

    params = draw({"w": (4,), "b": ()})
    local = sgd(loss_fn)("lowrank")
    data = jax.tree.map(lambda x: x[0], make_clients())
    upload, _, _ = local.update(params, (), data, jax.random.key(0))
    want, _, _ = sgd(loss_fn)("dense").update(params, (), data, jax.random.key(0))
    assert_close(upload.delta, want.delta, 1e-5, 1e-6)


@pytest.mark.parametrize("name", ["sgd", "cedar"])
def test_a_skipped_step_of_a_loss_that_is_not_defined_everywhere(name):
    """The loss divides by the length of an input; all inputs are finite, and some clients skip steps."""

    def loss_fn(params, batch, key):
        x = batch["x"] / jnp.sqrt(jnp.sum(jnp.square(batch["x"]), axis=1, keepdims=True))
        return cross_entropy(x @ params["w"], batch["y"])

    def make(representation):
        if name == "sgd":
            return sgd(loss_fn)(representation)
        return cj.meta.cedar(loss_fn, optax.sgd(0.1), optax.sgd(0.1), batch_size=1, representation=representation)

    data = make_clients()
    data = data._replace(examples=jax.tree.map(lambda x: jnp.nan_to_num(x, nan=1.0), data.examples))
    check(make, draw({"w": (4, 3)}), data, rtol=1e-4, atol=1e-6)


def test_a_step_that_is_not_done_may_not_be_finite():
    """A gradient of zero has no direction, so its step is NaN; a client that does no step does not read it."""

    def loss_fn(params, batch, key):
        return jnp.mean(jnp.square(batch["x"] @ params["w"]))

    tx = optax.chain(optax.normalize_by_update_norm(eps=0.0), optax.sgd(0.1))
    data = cj.ClientData({"x": jnp.zeros((4, 4))}, jnp.int32(4), jnp.int32(2))
    for representation in ("dense", "lowrank"):
        local = cj.local.sgd(
            loss_fn, tx, batch_size=2, num_steps_fn=lambda d, k: jnp.int32(0), representation=representation
        )
        upload, _, _ = jax.jit(local.update)(draw({"w": (4, 3)}), (), data, jax.random.key(0))
        np.testing.assert_array_equal(cj.dense(upload.delta)["w"], jnp.zeros((4, 3)))


def test_the_strength_of_the_pull_is_swept_and_differentiated():
    data, params = jax.tree.map(lambda x: x[0], make_clients()), draw(SHAPES)

    def norm(representation):
        def of(mu):
            local = cj.local.prox(mu, hand_written, optax.sgd(0.1), batch_size=BATCH, representation=representation)
            delta = local.update(params, (), data, jax.random.key(0))[0].delta
            return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(cj.dense(delta)))

        return of

    strengths = jnp.array([0.1, 2.0])
    got, want = (jax.jit(jax.vmap(jax.value_and_grad(norm(r))))(strengths) for r in ("lowrank", "dense"))
    assert_close(got, want, 1e-3, 1e-6)
