import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.personal import Prototype, fedproto, nearest_prototype
from cedarjax.personal.fedproto import class_sums
from tests.personal import personal_oracles as oracles

RATE, EPOCHS, LAM = 0.2, 2, 0.8
SHAPE = {"num_classes": oracles.NUM_CLASSES + 1, "num_features": oracles.NUM_HIDDEN}  # nobody holds the last class


def labels_fn(batch):
    return batch["label"]


def kernel(lam=LAM, loss_fn=oracles.loss_fn, embed_fn=oracles.embed_fn, **options):
    options = SHAPE | {"batch_size": oracles.BATCH, "num_epochs": EPOCHS, "labels_fn": labels_fn} | options
    return fedproto(loss_fn, embed_fn, optax.sgd(RATE), lam, **options)


def client_data(i):
    return jax.tree.map(lambda x: x[0], cj.core.take_clients(oracles.make_dataset(), jnp.array([i])).data)


def prototypes(params, client):
    hidden = np.tanh(client["x"] @ params["body"])
    return {j: hidden[client["label"] == j].mean(axis=0) for j in np.unique(client["label"])}


def proto_gradient(params, client, known):
    """Of `lam sum_j |C_j - Cbar_j|^2` with respect to the body."""
    hidden = np.tanh(client["x"] @ params["body"])
    back = np.zeros_like(hidden)
    for j, mean in prototypes(params, client).items():
        if j in known:
            mine = client["label"] == j
            back[mine] = 2 * LAM * (mean - known[j]) / mine.sum()
    body = client["x"].T @ (back * (1 - hidden**2))
    return {"body": body, "norm": np.zeros(4), "head": np.zeros(4)}


def reference(uniform=False):
    """Server prototypes by class, weighted by counts; a class that nobody holds keeps its own."""
    params, clients = oracles.make_params(), oracles.make_clients()
    known, models = {}, [params] * 5
    for cohort in oracles.COHORTS:
        sums, totals = {}, {}
        for i in cohort:
            client = clients[i]
            models[i] = oracles.descend(
                models[i],
                client,
                RATE,
                oracles.num_steps(client, EPOCHS),
                extra=lambda p, c=client, k=known: proto_gradient(p, c, k),
            )
            for j, mean in prototypes(models[i], client).items():
                count = (client["label"] == j).sum() / (len(client["label"]) if uniform else 1)
                sums[j], totals[j] = sums.get(j, 0) + count * mean, totals.get(j, 0) + count
        known = known | {j: sums[j] / totals[j] for j in sums}
    return known, models


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_rounds_are_those_of_the_reference(weighting, x64):
    """By examples a prototype is the mean over all examples of the class that the round's clients hold."""
    local = kernel()
    shared, states, _ = oracles.run(local, oracles.make_params(), weighting=weighting)
    known, models = reference(uniform=weighting == "uniform")
    for j, prototype in enumerate(shared):
        np.testing.assert_allclose(prototype.known, float(j in known), atol=1e-6)
        np.testing.assert_allclose(prototype.mean, known.get(j, np.zeros(4)), rtol=1e-6, atol=1e-12)
    for i, model in enumerate(models):
        state = oracles.state_of(states, i)
        oracles.assert_close(state.personal, model, rtol=1e-6)  # the mask is float32
        oracles.assert_close(local.model(shared, state), model, rtol=1e-6)


def test_a_class_that_nobody_holds_this_round_keeps_its_prototype(x64):
    """Clients 0 and 3 hold the classes 0 and 1, client 4 holds the class 1 alone."""
    first, _, _ = oracles.run(kernel(), oracles.make_params(), cohorts=((0, 3),))
    second, _, _ = oracles.run(kernel(), oracles.make_params(), cohorts=((0, 3), (4, 4)))
    np.testing.assert_array_equal(second[0].mean, first[0].mean)
    assert (second[1].mean != first[1].mean).any() and second[2].known == 0 == second[3].known


def test_an_upload_says_which_classes_and_how_many(x64):
    """Client 2 has an example of class 2 and one of class 0."""
    local = kernel()
    params = oracles.as_arrays(oracles.make_params())
    shared = local.share(params)
    upload, state, _ = jax.jit(local.update)(shared, local.init(params), client_data(2), jax.random.key(0))
    assert [float(m.mean) for m in upload.mask] == [0.5, 0.0, 0.5, 0.0] == [float(m.known) for m in upload.mask]
    own = prototypes(jax.tree.map(np.asarray, state.personal), oracles.make_clients()[2])
    for j, mean in own.items():
        np.testing.assert_allclose(shared[j].mean - upload.delta[j].mean, mean, rtol=1e-10)
    assert not np.any(upload.delta[1].mean) and not np.any(upload.delta[3].mean)
    # Two classes of d numbers and a weight, and one bit a class.
    assert cj.layers.payload_bytes(upload.mask, shared) == 2 * 8 * (oracles.NUM_HIDDEN + 1) + 1


def test_in_the_first_round_a_client_trains_alone(x64):
    """The server knows no class, so the term is nothing."""
    local, params = kernel(), oracles.make_params()
    _, state, info = jax.jit(local.update)(
        local.share(oracles.as_arrays(params)), local.init(oracles.as_arrays(params)), client_data(4), jax.random.key(0)
    )
    client = oracles.make_clients()[4]
    oracles.assert_close(state.personal, oracles.descend(params, client, RATE, 1))
    np.testing.assert_allclose(info.loss, oracles.loss(params, client), rtol=1e-10)


def test_unknown_prototypes_are_not_read():
    local, params = kernel(), oracles.as_arrays(oracles.make_params())
    spoilt = tuple(Prototype(jnp.full(4, jnp.nan), p.known) for p in local.share(params))
    one = jax.jit(local.update)(local.share(params), local.init(params), client_data(0), jax.random.key(0))[1]
    other = jax.jit(local.update)(spoilt, local.init(params), client_data(0), jax.random.key(0))[1]
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_prototypes_are_over_all_examples_whatever_the_batches(batch_size):
    """Rows of padding hold NaN, labels of padding are in range."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 2)).astype(np.float32), rng.integers(0, 3, 9)
    x[6:] = np.nan
    data = cj.ClientData({"x": jnp.asarray(x), "y": jnp.asarray(y)}, jnp.int32(6), jnp.int32(0))
    local = fedproto(
        lambda w, batch, key: 0.0 * w, lambda w, batch: w * batch["x"], optax.sgd(0.1), 0.0,
        num_classes=3, num_features=2, batch_size=batch_size,
    )  # fmt: skip
    upload, _, _ = jax.jit(local.update)(
        local.share(jnp.float32(2.0)), local.init(jnp.float32(2.0)), data, jax.random.key(0)
    )
    for j in range(3):
        mine = y[:6] == j
        want = 2.0 * x[:6][mine].mean(axis=0) if mine.any() else np.zeros(2)
        np.testing.assert_allclose(-upload.delta[j].mean, want, rtol=1e-5)
        np.testing.assert_allclose(upload.mask[j].mean, mine.mean(), rtol=1e-6)


def test_labels_out_of_range_count_for_no_class():
    sums, counts = class_sums(jnp.ones((4, 2)), jnp.array([0, 1, 7, -1]), 2)
    assert sums.tolist() == [[1.0, 1.0], [1.0, 1.0]] and counts.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32, jnp.float32])
def test_labels_of_any_dtype(dtype):
    assert class_sums(jnp.ones((2, 1)), jnp.array([1, 1], dtype), 2)[1].tolist() == [0.0, 2.0]


def test_the_nearest_prototype_that_is_known():
    means, known = np.array([[0.0], [2.0], [5.0]]), [1.0, 0.0, 0.3]
    shared = tuple(Prototype(jnp.asarray(m, jnp.float32), jnp.float32(k)) for m, k in zip(means, known, strict=True))
    assert nearest_prototype(jnp.array([[1.9], [2.6], [9.0]]), shared).tolist() == [0, 2, 2]


def test_a_robust_rule_reads_each_class_of_its_own():
    """The median of three clients' prototypes of a class, although a fourth does not hold it."""
    local = fedproto(
        lambda w, batch, key: 0.0 * w, lambda w, batch: w * batch["x"], optax.sgd(0.1),
        num_classes=2, num_features=1, batch_size=1,
    )  # fmt: skip
    x, y = np.array([[1.0], [2.0], [100.0], [7.0]], np.float32), np.array([0, 0, 0, 1])
    dataset = cj.data.federated_dataset({"x": x, "y": y}, np.arange(4))
    algorithm = cj.federated_round(local, optax.chain(cj.robust.median(), optax.sgd(1.0)))
    cohort = cj.core.take_clients(dataset, jnp.arange(4))
    state = cj.init_run(algorithm, dataset, jnp.float32(1.0))
    server, _, _ = jax.jit(algorithm.step)(state.server, cohort._replace(state=state.clients), jax.random.key(0))
    assert [p.mean.tolist() for p in server.params] == [[2.0], [7.0]]


def test_the_strength_can_be_swept():
    params, data = oracles.as_arrays(oracles.make_params()), client_data(0)
    shared = tuple(Prototype(jnp.ones(4), jnp.ones(())) for _ in range(4))

    def personal(lam):
        local = kernel(lam)
        return jax.jit(local.update)(shared, local.init(params), data, jax.random.key(0))[1].personal

    swept = jax.vmap(personal)(jnp.array([0.0, 2.0]))
    for i, lam in enumerate([0.0, 2.0]):
        jax.tree.map(lambda s, p, i=i: np.testing.assert_allclose(s[i], p, rtol=1e-5), swept, personal(lam))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -1.0}, "lam must be at least 0, got -1.0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"num_features": 0}, "num_features must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_epochs": 0}, "num_epochs must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        kernel(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": 5}, r"embed_fn must return \[B, num_features\] = \(6, 5\), got the shape \(6, 4\)"),
        ({"labels_fn": lambda batch: batch["x"]}, r"labels_fn must return \[B\] = \(6,\), got the shape \(6, 3\)"),
    ],
)
def test_functions_that_do_not_fit(options, message):
    local, params = kernel(**options), oracles.as_arrays(oracles.make_params())
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(local.update, local.share(params), local.init(params), client_data(0), jax.random.key(0))


def test_a_streamed_round_weighs_classes_the_same(x64):
    """Fractions of a weight go through the running sums too."""
    dataset, params = oracles.make_dataset(), oracles.as_arrays(oracles.make_params())
    chain = optax.chain(cj.robust.mean(), optax.sgd(1.0))
    whole = cj.federated_round(kernel(), chain)
    streamed = cj.streamed_round(kernel(), optax.sgd(1.0), chunk_size=2)
    cohort = cj.core.take_clients(dataset, jnp.arange(5))
    cohort = cohort._replace(state=cj.init_run(whole, dataset, params).clients)
    want = jax.jit(whole.step)(whole.init(params), cohort, jax.random.key(0))[0].params
    got = jax.jit(streamed.step)(streamed.init(params), cohort, jax.random.key(0))[0].params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), got, want)
    assert [float(p.known) > 0.99 for p in got] == [True, True, True, False]
