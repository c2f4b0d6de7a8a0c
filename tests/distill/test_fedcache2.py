import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax import distill
from tests.distill import distill_oracles as oracles

OPTIONS = {
    "num_clients": 4, "num_classes": 3, "shape": (3,), "num_per_class": 2, "num_drawn": 5,
    "proto_tx": optax.sgd(0.5), "proto_steps": 3, "ridge": 0.1, "tau": 0.5, "batch_size": 4, "num_epochs": 2,
}  # fmt: skip


def make_group():
    return distill.Group(
        lambda p, x, key: x @ p, oracles.make_tx(), lambda p, x, key: jnp.concatenate([x, jnp.tanh(x @ p)], axis=1)
    )


def make(**options):
    return distill.fedcache2(make_group(), **OPTIONS | options)


def states_of(algorithm):
    return jax.vmap(algorithm.init_client)(jnp.stack([jnp.asarray(oracles.make_params(i)) for i in range(4)]))


def predict(features, protos, labels, ridge):
    kernel = protos @ protos.T
    strength = ridge * np.trace(kernel) / len(protos)
    return features @ protos.T @ np.linalg.inv(kernel + strength * np.eye(len(protos))) @ labels


def test_ridge_regression_by_the_formula(x64):
    """Prototypes that are not there may hold anything, and so may samples that do not count."""
    rng = np.random.default_rng(0)
    features, protos = rng.normal(size=(6, 4)), rng.normal(size=(5, 4))
    y, ys = rng.normal(size=(6, 3)), rng.normal(size=(5, 3))
    there, counted = np.array([True, True, False, True, False]), np.array([True, False, True, True, True, True])
    want = predict(features, protos[there], ys[there], 0.3)
    loss = 0.5 * ((want - y)[counted] ** 2).sum() / counted.sum()
    protos[~there], ys[~there], features[~counted], y[~counted] = np.nan, np.nan, np.nan, np.nan
    args = [jnp.asarray(a) for a in (protos, ys, there)]
    np.testing.assert_allclose(
        distill.krr_predict(jnp.asarray(features), *args, 0.3)[counted], want[counted], rtol=1e-9
    )
    got = distill.krr_loss(jnp.asarray(features), jnp.asarray(y), jnp.asarray(counted), *args, 0.3)
    np.testing.assert_allclose(got, loss, rtol=1e-9)
    nobody = distill.krr_predict(jnp.ones((2, 4)), jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.zeros(3, bool), 0.3)
    assert not nobody.any()


def test_distilling_goes_down_the_gradient_of_the_loss(x64):
    """One step against differences of the loss in numpy; many steps lower it; what is not there stays."""
    rng = np.random.default_rng(1)
    x, xs = rng.normal(size=(8, 2)), rng.normal(size=(4, 2))
    y, ys, there = np.eye(2)[rng.integers(0, 2, 8)], np.eye(2)[[0, 0, 1, 1]], np.array([True, True, True, False])

    def loss(protos):
        return 0.5 * ((predict(np.tanh(x), np.tanh(protos[there]), ys[there], 0.2) - y) ** 2).sum() / 8

    args = jnp.asarray(ys), jnp.asarray(there), jnp.tanh(jnp.asarray(x)), jnp.asarray(y), jnp.ones(8, bool)
    run = lambda n: distill.distil_prototypes(  # noqa: E731
        jnp.tanh, optax.sgd(0.3), jnp.asarray(xs), *args, ridge=0.2, num_steps=n
    )
    grads = np.zeros_like(xs)
    for i in np.ndindex(*xs.shape):
        step = np.zeros_like(xs)
        step[i] = 1e-6
        grads[i] = (loss(xs + step) - loss(xs - step)) / 2e-6
    after, losses = run(1)
    np.testing.assert_allclose(after, xs - 0.3 * grads, atol=1e-8)
    np.testing.assert_allclose(losses, [loss(xs)], rtol=1e-9)
    after, losses = run(40)
    assert loss(np.asarray(after)) < 0.9 * loss(xs)
    np.testing.assert_array_equal(after[3], xs[3])


def test_a_device_wants_its_own_classes_and_some_of_the_others():
    shares = np.array([0.7, 0.3, 0.0, 0.0])
    for tau in (0.0, 0.4, 1.0):
        want = (1 - tau) * shares + tau
        got = distill.device_centric(jnp.asarray(shares, jnp.float32), tau)
        np.testing.assert_allclose(got, want / want.sum(), rtol=1e-6)


def test_draws_are_in_proportion_whatever_the_size_of_a_class():
    """Class 1 has three times as many prototypes and is wanted four times as often."""
    labels, mask = jnp.array([0, 1, 1, 1, 2, 0]), jnp.array([True, True, True, True, True, False])
    wanted, keys = jnp.array([0.2, 0.8, 0.0]), jax.random.split(jax.random.key(0), 4000)
    draw = jax.jit(jax.vmap(lambda k: distill.sample_prototypes(k, wanted, labels, mask, 1)[0][0]))
    counts = np.bincount(draw(keys), minlength=6)
    expected = 4000 * np.array([0.2, 0.8 / 3, 0.8 / 3, 0.8 / 3])
    assert ((counts[:4] - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees, 0.1 %
    assert counts[4] == counts[5] == 0
    index, drawn = distill.sample_prototypes(keys[0], wanted, labels, mask, 8)
    assert sorted(index[drawn].tolist()) == [0, 1, 2, 3] and drawn.tolist() == [True] * 4 + [False] * 4


def test_a_client_begins_from_samples_of_its_own():
    x = jnp.arange(8.0)[:, None]
    labels, mask = jnp.array([0, 0, 0, 1, 1, 2, 2, 2]), jnp.arange(8) < 6
    protos, there = distill.init_prototypes(jax.random.key(3), x, labels, mask, num_classes=4, num_per_class=2)
    assert there.tolist() == [True, True, True, True, True, False, False, False]
    picked = protos[:, 0].tolist()
    assert set(picked[:2]) < {0.0, 1.0, 2.0} and set(picked[2:4]) == {3.0, 4.0} and picked[4:] == [5.0, 0, 0, 0]


def test_rounds_exchange_prototypes_of_others():
    algorithm = make()
    states, server, step = states_of(algorithm), algorithm.init(None), jax.jit(algorithm.step)
    counts = [np.bincount(oracles.make_data()["y"][a:b], minlength=3) for a, b in zip(
        oracles.OFFSETS[:-1], oracles.OFFSETS[1:], strict=True)]  # fmt: skip
    held = np.array([np.minimum(c, 2).sum() for c in counts])
    infos = []
    for number in range(3):
        cohort = oracles.cohort_of(oracles.make_dataset(), states, range(4))
        server, states, info = step(server, cohort, jax.random.key(number))
        infos.append(info)
    assert infos[0].num_received.tolist() == [0] * 4 and infos[1].num_received.tolist() == [5] * 4
    assert all(info.num_sent.tolist() == held.tolist() for info in infos)
    assert server.params.written.sum(axis=1).tolist() == held.tolist()
    steps = [-(-2 * (n + 5) // 4) for n in oracles.COUNTS]
    assert infos[1].num_steps.tolist() == steps
    assert jnp.isfinite(server.params.x).all() and jnp.isfinite(states.params).all()


def test_a_round_by_its_parts(x64):
    """The first round of one client: plain training, then its prototypes distilled by its trained model."""
    algorithm = make(dtype=jnp.float64)
    cohort = oracles.cohort_of(oracles.make_dataset(), states_of(algorithm), (3,))
    server, states, info = jax.jit(algorithm.step)(algorithm.init(None), cohort, jax.random.key(0))
    _, train_key, init_key, _ = jax.random.split(jax.random.fold_in(jax.random.key(0), 3), 4)
    client, data = oracles.Client(oracles.make_params(3)), oracles.make_data()
    x, y = data["x"][9:15], data["y"][9:15]
    for rows in oracles.batches(train_key, 6, 6 + 5):
        client.step(x[rows], y[rows], [None] * len(rows))
    np.testing.assert_allclose(states.params[0], client.params, rtol=1e-9)

    def features(x):
        return jnp.concatenate([x, jnp.tanh(x @ jnp.asarray(client.params))], axis=1)

    mask = jnp.ones(6, bool)
    protos, there = distill.init_prototypes(
        init_key, jnp.asarray(x), jnp.asarray(y), mask, num_classes=3, num_per_class=2
    )
    want, losses = distill.distil_prototypes(
        features, optax.sgd(0.5), protos, jnp.repeat(jnp.eye(3), 2, axis=0), there, features(jnp.asarray(x)),
        jax.nn.one_hot(y, 3), mask, ridge=0.1, num_steps=3,
    )  # fmt: skip
    np.testing.assert_array_equal(server.params.written[3], there)
    np.testing.assert_allclose(server.params.x[3][there], want[there], rtol=1e-7)
    np.testing.assert_allclose(info.krr_loss[0], losses[-1], rtol=1e-7)
    assert not server.params.written[:3].any()


@pytest.mark.parametrize("map_fn", [None, cj.cohort_map(1)])
def test_absent_clients_change_nothing_whatever_they_hold(map_fn):
    algorithm = make(map_fn=map_fn)
    step, dataset = jax.jit(algorithm.step), oracles.make_dataset()
    server, states, _ = step(
        algorithm.init(None), oracles.cohort_of(dataset, states_of(algorithm), range(4)), jax.random.key(0)
    )
    spoilt = states._replace(params=states.params.at[0].set(jnp.nan))
    cohort = oracles.cohort_of(dataset, spoilt, (0, 3, 1))
    x = cohort.data.examples["x"].at[0].set(jnp.nan)
    data = cohort.data._replace(examples={**cohort.data.examples, "x": x})
    cohort = cohort._replace(weights=cohort.weights.at[0].set(0.0), data=data)
    got = step(server, cohort, jax.random.key(5))
    want = step(server, oracles.cohort_of(dataset, states, (3, 1)), jax.random.key(5))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got[0], want[0])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), got[1], cohort.state)
    assert [x[0].item() for x in got[2]] == [0.0] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 1.5}, "0 <= tau <= 1, got 1.5"),
        ({"ridge": 0.0}, "ridge must be above 0, got 0.0"),
        ({"proto_steps": -1}, "proto_steps must be at least 0, got -1"),
        ({"num_drawn": 0}, "num_drawn must be at least 1, got 0"),
        ({"num_per_class": 0}, "num_per_class must be at least 1, got 0"),
        ({"shape": (4,)}, r"must be \[C, M, \*shape\] with shape \(4,\)"),
    ],
)
def test_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        algorithm = make(**options)
        cohort = oracles.cohort_of(oracles.make_dataset(), states_of(algorithm), range(4))
        jax.eval_shape(algorithm.step, algorithm.init(None), cohort, jax.random.key(0))
    with pytest.raises(ValueError, match="groups must have a features_fn each, got None"):
        distill.fedcache2(oracles.make_group(), **OPTIONS)
