import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.core import batch_indices, check_positive, mean_loss, num_batches, shuffled_epochs, take_rows


def stream_of(seed, start, count, length, num_epochs):
    return shuffled_epochs(
        jax.random.key(seed), jnp.int32(start), jnp.int32(count), length=length, num_epochs=num_epochs
    )


def all_batches(stream, steps, batch_size):
    return np.stack([np.asarray(batch_indices(stream, jnp.int32(i), batch_size)) for i in range(steps)])


@hypothesis.given(st.integers(0, 99), st.integers(0, 3), st.integers(1, 6), st.integers(1, 5), st.integers(1, 3))
def test_batches_are_the_epochs_one_after_another(seed, start, count, batch_size, num_epochs):
    stream = stream_of(seed, start, count, 9, num_epochs)
    orders = np.asarray(stream.orders)[:, :count]
    for order in orders:
        assert sorted(order) == list(range(count))
    steps = num_batches(count, batch_size, num_epochs)
    assert steps == int(np.ceil(count * num_epochs / batch_size))
    # Filled up from the start of the last order.
    endless = np.concatenate([*orders, *[orders[-1]] * batch_size])
    want = start + endless[: steps * batch_size].reshape(steps, batch_size)
    np.testing.assert_array_equal(all_batches(stream, steps, batch_size), want)


def test_every_epoch_has_an_order_of_its_own():
    orders = np.asarray(stream_of(0, 0, 20, 20, 3).orders)
    assert not (orders[0] == orders[1]).all() and not (orders[1] == orders[2]).all()


def test_orders_are_uniform():
    first = jax.vmap(lambda i: shuffled_epochs(i, jnp.int32(0), jnp.int32(3), length=8, num_epochs=1).orders[0, 0])
    counts = np.bincount(first(jax.random.split(jax.random.key(0), 3000)), minlength=3)
    assert np.abs(counts - 1000).max() < 130  # five standard deviations


def test_the_width_of_the_padding_changes_nothing():
    narrow, wide = stream_of(3, 0, 5, 5, 2), stream_of(3, 0, 5, 40, 2)
    np.testing.assert_array_equal(narrow.orders, wide.orders[:, :5])


def test_an_empty_stream_stays_in_bounds():
    stream = stream_of(0, 6, 0, 6, 2)
    np.testing.assert_array_equal(all_batches(stream, 3, 4), 0)


def test_take_rows():
    examples = {"x": jnp.arange(6).reshape(3, 2), "y": jnp.arange(3)}
    got = take_rows(examples, jnp.array([2, 0], jnp.int32))
    assert got["x"].tolist() == [[4, 5], [0, 1]] and got["y"].tolist() == [2, 0]


def test_check_positive_names_the_argument():
    check_positive(batch_size=1)
    with pytest.raises(ValueError, match="num_epochs must be at least 1, got 0"):
        check_positive(batch_size=1, num_epochs=0)


def log_loss(w, batch, key):
    """NaN in value and gradient on a row of padding."""
    return jnp.mean(jnp.log(batch["x"] @ w) - batch["y"])


def test_mean_loss_and_its_gradient_do_not_see_padding():
    rng = np.random.default_rng(0)
    x, y = rng.uniform(1, 2, (6, 3)), rng.normal(size=6)
    mask = np.array([False, True, True, False, True, False])
    x[~mask], y[~mask] = np.nan, np.inf
    w = np.array([0.3, 0.5, 0.2])
    batch = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    args = (jnp.asarray(w, jnp.float32), batch, jnp.asarray(mask), jax.random.key(0))
    loss, grad = jax.value_and_grad(lambda w, *rest: mean_loss(log_loss, w, *rest))(*args)
    np.testing.assert_allclose(loss, np.mean(np.log(x[mask] @ w) - y[mask]), rtol=1e-5)
    np.testing.assert_allclose(grad, np.mean(x[mask] / (x[mask] @ w)[:, None], axis=0), rtol=1e-5)


def test_mean_loss_of_no_rows_is_zero():
    batch = {"x": jnp.ones((2, 3)), "y": jnp.ones(2)}
    loss, grad = jax.value_and_grad(lambda w: mean_loss(log_loss, w, batch, jnp.zeros(2, bool), jax.random.key(0)))(
        jnp.ones(3)
    )
    assert loss == 0 and not grad.any()


def test_mean_loss_gives_every_row_its_own_key():
    def noise(w, batch, key):
        return jax.random.normal(key, ())

    rows, mask = jnp.zeros(50), jnp.ones(50, bool)
    narrow = mean_loss(noise, None, rows, mask, jax.random.key(0))
    wide = mean_loss(noise, None, jnp.zeros(60), jnp.arange(60) < 50, jax.random.key(0))
    np.testing.assert_allclose(narrow, wide, rtol=1e-5)
    draws = jax.vmap(lambda k: jax.random.normal(k, ()))(jax.random.split(jax.random.key(0), 50))
    np.testing.assert_allclose(narrow, np.mean(draws), rtol=1e-4)
