"""Every kernel against every law of its protocol; a new kernel gets all of them by one row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax import testing

NUM_CLIENTS = 6
WIDTH = 6


@pytest.fixture(autouse=True)
def fast_compilation(request):
    """Most of the time here is XLA's. What is compared with no jit is compiled as it would be for a user."""
    optimised = "jit" in request.node.name
    jax.config.update("jax_disable_most_optimizations", not optimised)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def hidden(params, x):
    return jnp.tanh(x.astype(params["one"]["kernel"].dtype) @ params["one"]["kernel"] + params["one"]["bias"][None])


def logits_fn(params, x):
    return hidden(params, x) @ params["two"]["kernel"]


def loss_fn(params, batch, key):
    """Cross entropy of a small network whose inputs are scaled by bits of the key, so that keys matter."""
    bits = (jax.random.key_data(key)[-1] % 1024).astype(batch["x"].dtype)
    logits = logits_fn(params, batch["x"] * (0.5 + bits / 512))
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def features_fn(params, x):
    return {"one": hidden(params, x), "two": logits_fn(params, x)}


def make_params(rng):
    shapes = {"one": {"kernel": (3, 4), "bias": (4,)}, "two": {"kernel": (4, 3)}}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


@functools.cache
def problem():
    """Parameters, stimuli, and six clients of unequal sizes, one of them with a single example."""
    rng = np.random.default_rng(0)
    counts = np.array([6, 4, 1, 3, 5, 2], np.int32)
    support = np.array([3, 2, 0, 1, 5, 1], np.int32)
    x = rng.normal(size=(NUM_CLIENTS, WIDTH, 3)).astype(np.float32)
    y = rng.integers(0, 3, size=(NUM_CLIENTS, WIDTH)).astype(np.int32)
    data = cj.ClientData({"x": jnp.asarray(x), "y": jnp.asarray(y)}, jnp.asarray(counts), jnp.asarray(support))
    return make_params(rng), jnp.asarray(rng.normal(size=(5, 3)), jnp.float32), data


def sgd():
    return cj.local.sgd(loss_fn, optax.sgd(0.5, momentum=0.9), batch_size=2, num_epochs=2)


def stragglers(data, key):
    return jax.random.randint(key, (), 0, 3)


def one_gradient():
    """The least that a local update can be, so that a table row of a wrapper compiles little else."""

    def update(shared, client_state, data, key):
        mask = jnp.arange(data.examples["y"].shape[0], dtype=jnp.int32) < data.num_examples
        delta = jax.grad(lambda p: cj.core.mean_loss(loss_fn, p, data.examples, mask, key))(shared)
        return cj.Upload(delta), client_state, ()

    return cj.LocalUpdate(lambda params: (), update)


def filtered(local_update, **options):
    return cj.layers.upload_filter(local_update, features_fn, problem()[1], **options)


def densely(local):
    """Low-rank updates as arrays: how many factors they have follows the padding, what they are does not."""

    def update(shared, client_state, data, key):
        upload, client_state, info = local.update(shared, client_state, data, key)
        return upload._replace(delta=cj.dense(upload.delta)), client_state, info._replace(rank=())

    return cj.LocalUpdate(local.init, update)


def low_rank_cedar():
    tx = optax.sgd(0.5, momentum=0.9)
    return densely(cj.meta.cedar(loss_fn, tx, optax.sgd(0.3), batch_size=2, representation="lowrank"))


LOCAL_UPDATES = {
    "sgd": sgd,
    "prox_stragglers": lambda: cj.local.prox(0.5, loss_fn, optax.sgd(0.5), batch_size=4, num_steps_fn=stragglers),
    "cedar": lambda: cj.meta.cedar(loss_fn, optax.sgd(0.5, momentum=0.9), optax.sgd(0.3), batch_size=2),
    "maml": lambda: cj.meta.maml(loss_fn, optax.sgd(0.5), 2, batch_size=2, query_batch_size=2),
    "fomaml": lambda: cj.meta.maml(loss_fn, optax.sgd(0.5), 2, first_order=True),
    "reptile": lambda: cj.meta.reptile(loss_fn, optax.sgd(0.5), 3, batch_size=4),
    "cedar_lowrank": low_rank_cedar,
    "filter_rcs": lambda: filtered(one_gradient(), num_skipped=1),
    "filter_bytes": lambda: filtered(one_gradient(), max_bytes=128, score="update_norm"),
    "filter_taylor": lambda: filtered(one_gradient(), num_skipped=1, score="taylor", loss_fn=loss_fn),
    "filter_random": lambda: filtered(one_gradient(), num_skipped=1, score="random"),
    "compressed": lambda: cj.compress.with_compression(one_gradient(), cj.compress.qsgd(4)),
    "compressed_told": lambda: cj.compress.with_compression(one_gradient(), cj.compress.sampled_top_k(0.25)),
    "error_feedback": lambda: cj.compress.with_error_feedback(sgd(), cj.compress.top_k(0.25)),
}


@functools.cache
def local_case(name, mesh):
    """One case a kernel, so that its laws share what they compile."""
    params, _, data = problem()
    return testing.LocalUpdateCase(LOCAL_UPDATES[name](), params, data, mesh, (jnp.bfloat16, jnp.float64))


@pytest.mark.parametrize("law", testing.LOCAL_UPDATE_LAWS)
@pytest.mark.parametrize("kernel", LOCAL_UPDATES)
def test_local_update(kernel, law, mesh):
    testing.LOCAL_UPDATE_LAWS[law](local_case(kernel, mesh))


def screening(**options):
    return cj.robust.cedar(logits_fn, problem()[1], **options)


AGGREGATORS = {
    "mean": cj.robust.mean,
    "cedar": screening,
    "cedar_undetecting": lambda: screening(detect=False, representation="raw"),
    "gaussian_then_mean": lambda: optax.chain(cj.attacks.gaussian(1.0), cj.robust.mean()),
    "mean_then_momentum": lambda: optax.chain(cj.robust.mean(), optax.sgd(0.5, momentum=0.9)),
}


@functools.cache
def aggregator_case(name, mesh):
    rng = np.random.default_rng(1)
    params = make_params(rng)
    updates = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(NUM_CLIENTS, *p.shape)), jnp.float32), params)
    weights = jnp.asarray(rng.uniform(1.0, 9.0, NUM_CLIENTS), jnp.float32)
    dtypes = (jnp.bfloat16, jnp.float64)
    return testing.AggregatorCase(AGGREGATORS[name](), updates, params, weights, mesh, dtypes)


@pytest.mark.parametrize("law", testing.AGGREGATOR_LAWS)
@pytest.mark.parametrize("kernel", AGGREGATORS)
def test_aggregator(kernel, law, mesh):
    testing.AGGREGATOR_LAWS[law](aggregator_case(kernel, mesh))


@pytest.mark.parametrize("equivariance", testing.EQUIVARIANCES)
def test_equivariances_of_the_mean(equivariance, mesh):
    testing.EQUIVARIANCES[equivariance](aggregator_case("mean", mesh))


ATTACKS = {
    "sign_flip": lambda: cj.attacks.sign_flip(5.0),
    "gaussian": lambda: cj.attacks.gaussian(1.0),
    "sign_flip_then_gaussian": lambda: optax.chain(cj.attacks.sign_flip(2.0), cj.attacks.gaussian(0.1)),
}


@functools.cache
def attack_case(name):
    updates = aggregator_case("mean", None).updates
    byzantine = jnp.array([False, True, False, False, True, False])
    return testing.AttackCase(ATTACKS[name](), updates, byzantine, (jnp.bfloat16, jnp.float64))


@pytest.mark.parametrize("law", testing.ATTACK_LAWS)
@pytest.mark.parametrize("kernel", ATTACKS)
def test_attack(kernel, law):
    testing.ATTACK_LAWS[law](attack_case(kernel))


@pytest.mark.slow
def test_jit_agrees_with_no_jit_at_three_hundred_clients():
    case = local_case("sgd", None)
    many = jax.tree.map(lambda x: jnp.tile(x, (50, *[1] * (x.ndim - 1)))[:300], case.data)
    testing.LOCAL_UPDATE_LAWS["agrees_without_jit"](case._replace(data=many))
