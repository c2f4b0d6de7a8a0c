import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from cedarjax.core import Epochs, batch_indices, in_sequence, local_training, shuffled_epochs, train_epochs
from cedarjax.core.epochs import pull_towards

LENGTH = 6


def loss_fn(params, batch, key):
    return 0.5 * jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def make_client(count):
    """A client whose padding is NaN."""
    rng = np.random.default_rng(count)
    x, y = rng.normal(size=(LENGTH, 3)), rng.normal(size=LENGTH)
    x[count:], y[count:] = np.nan, np.nan
    return cj.ClientData({"x": jnp.asarray(x), "y": jnp.asarray(y)}, jnp.int32(count), jnp.int32(0)), x, y


def make_params():
    return {"w": jnp.asarray(np.random.default_rng(9).normal(size=3))}


def descend(w, x, y, batches, rate, extra=lambda w: 0.0):
    losses = []
    for rows in batches:
        error = x[rows] @ w - y[rows]
        losses.append(0.5 * np.mean(error**2))
        w = w - rate * (x[rows].T @ error / len(rows) + extra(w))
    return w, losses


def batches_of(key, count, epochs, steps):
    """The stream itself has an oracle of its own in the tests of batches."""
    order_key = jax.random.split(key, 3)[0]
    stream = shuffled_epochs(order_key, jnp.int32(0), jnp.int32(count), length=LENGTH, num_epochs=epochs.num_epochs)
    return [np.asarray(batch_indices(stream, jnp.int32(i), epochs.batch_size)) for i in range(steps)]


@pytest.mark.parametrize(("count", "epochs", "steps"), [(6, Epochs(2), 3), (5, Epochs(2, 3), 8), (1, Epochs(4, 2), 1)])
def test_epochs_follow_the_stream(count, epochs, steps, x64):
    (data, x, y), key = make_client(count), jax.random.key(3)
    params, info = jax.jit(lambda p: train_epochs(loss_fn, optax.sgd(0.1), p, data, key, epochs))(make_params())
    want, losses = descend(np.asarray(make_params()["w"]), x, y, batches_of(key, count, epochs, steps), 0.1)
    np.testing.assert_allclose(params["w"], want, rtol=1e-10)
    np.testing.assert_allclose(info.loss, np.mean(losses), rtol=1e-10)
    assert info.num_steps == steps and info.num_steps.dtype == jnp.int32
    assert epochs.max_steps(data) == -(-LENGTH * epochs.num_epochs // epochs.batch_size)


def test_a_pull_is_added_to_every_gradient(x64):
    (data, x, y), key, epochs = make_client(5), jax.random.key(0), Epochs(2, 2)
    anchor = {"w": jnp.array([1.0, -2.0, 0.5])}
    pull = pull_towards(anchor, jnp.float32(0.7))
    params, info = train_epochs(loss_fn, optax.sgd(0.1), make_params(), data, key, epochs, pull)
    batches = batches_of(key, 5, epochs, 5)
    extra = lambda w: np.float64(np.float32(0.7)) * (w - np.asarray(anchor["w"]))  # noqa: E731
    want, losses = descend(np.asarray(make_params()["w"]), x, y, batches, 0.1, extra)
    np.testing.assert_allclose(params["w"], want, rtol=1e-10)
    np.testing.assert_allclose(info.loss, np.mean(losses), rtol=1e-10)  # without the pull


@pytest.mark.parametrize(("wanted", "steps"), [(0, 0), (2, 2), (99, 8), (-1, 0)])
def test_stragglers_do_fewer_steps_and_never_more(wanted, steps, x64):
    (data, x, y), key = make_client(5), jax.random.key(0)
    epochs = Epochs(2, 3, lambda data, key: jnp.float32(wanted))
    params, info = train_epochs(loss_fn, optax.sgd(0.1), make_params(), data, key, epochs)
    want, losses = descend(np.asarray(make_params()["w"]), x, y, batches_of(key, 5, epochs, steps), 0.1)
    np.testing.assert_allclose(params["w"], want, rtol=1e-10)
    np.testing.assert_allclose(info.loss, np.mean(losses) if losses else 0.0, rtol=1e-10)
    assert info.num_steps == steps


def test_local_training_uploads_how_far_it_came():
    (data, _, _), key, epochs = make_client(4), jax.random.key(1), Epochs(2, 2)
    local = local_training(loss_fn, optax.sgd(0.1), epochs, pull=lambda shared: pull_towards(shared, 0.5))
    params = make_params()
    upload, state, info = local.update(params, local.init(params), data, key)
    after, want = train_epochs(loss_fn, optax.sgd(0.1), params, data, key, epochs, pull_towards(params, 0.5))
    np.testing.assert_allclose(upload.delta["w"], params["w"] - after["w"], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, info, want)
    assert state == () == local.init(params) and upload.mask is None
    assert local.share(params) is params is local.model(params, ())


def test_a_sequence_is_one_round_after_another():
    """Each by a key of its own from where the last one ended, with its own state; against two rounds of each alone."""
    data, key, params = make_client(5)[0], jax.random.key(2), make_params()

    def counting(rate):
        local = local_training(loss_fn, optax.sgd(rate, momentum=0.9), Epochs(2, 2))

        def update(shared, visits, data, key):
            upload, _, info = local.update(shared, (), data, key)
            return upload, visits + 1, info

        return cj.LocalUpdate(lambda params: jnp.zeros((), jnp.int32), update)

    first, second = counting(0.1), counting(0.3)
    both = in_sequence(first, second)
    upload, state, info = jax.jit(both.update)(params, (jnp.int32(4), jnp.int32(7)), data, key)
    w = params
    for i, (local, visits) in enumerate(((first, 4), (second, 7))):
        alone, after, alone_info = local.update(w, jnp.int32(visits), data, jax.random.fold_in(key, i))
        w = jax.tree.map(jnp.subtract, w, alone.delta)
        assert state[i] == after == visits + 1
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), info[i], alone_info)
    np.testing.assert_allclose(upload.delta["w"], params["w"] - w["w"], rtol=1e-5)
    assert both.init(params) == (0, 0)


def test_a_sequence_of_low_rank_updates_is_dense():
    def matrix_loss(params, batch, key):
        return jnp.mean((batch["x"] @ params["w"]) ** 2)

    local = local_training(matrix_loss, optax.sgd(0.1), Epochs(1), representation="lowrank")
    plain = local_training(matrix_loss, optax.sgd(0.1), Epochs(1))
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)}
    data = cj.ClientData({"x": jnp.ones((2, 3))}, jnp.int32(2), jnp.int32(0))
    got = in_sequence(local, local).update(params, ((), ()), data, jax.random.key(0))[0].delta
    want = in_sequence(plain, plain).update(params, ((), ()), data, jax.random.key(0))[0].delta
    assert isinstance(got["w"], jax.Array)
    np.testing.assert_allclose(got["w"], want["w"], rtol=1e-5)


def test_a_sequence_refuses_layers_that_are_left_out():
    plain = local_training(loss_fn, optax.sgd(0.1), Epochs(2))

    def masked(shared, state, data, key):
        upload, state, info = plain.update(shared, state, data, key)
        return upload._replace(mask={"w": jnp.ones(())}), state, info

    both = in_sequence(plain, plain._replace(update=masked))
    with pytest.raises(ValueError, match="local_updates must not leave layers out"):
        both.update(make_params(), ((), ()), make_client(3)[0], jax.random.key(0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: in_sequence(), "local_updates must hold at least one update, got none"),
        (lambda: Epochs(0).checked(), "batch_size must be at least 1, got 0"),
        (lambda: Epochs(1, 0).checked(), "num_epochs must be at least 1, got 0"),
        (lambda: local_training(loss_fn, optax.sgd(0.1), Epochs(0)), "batch_size must be at least 1, got 0"),
        (lambda: local_training(loss_fn, optax.sgd(0.1), Epochs(1), representation="thin"), "representation must be"),
    ],
)
def test_options_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()
