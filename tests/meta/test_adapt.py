"""Adaptation at deployment."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cedarjax.core import ClientData
from cedarjax.meta import adapt


def loss_fn(w, batch, key):
    return 0.5 * jnp.mean((w - batch) ** 2)


def client():
    return ClientData(jnp.array([1.0, 5.0, 9.0, jnp.nan]), jnp.int32(3), jnp.int32(2))


def test_parameters_really_move_along_the_closed_form():
    run = adapt(loss_fn, optax.sgd(0.25), 6, eval_fn=lambda w, data: w)
    adapted, history = run(jnp.float32(0.0), client(), jax.random.key(0))
    expected = 3.0 * (1 - 0.75 ** np.arange(7))  # the support mean is 3; the query row and the padding are not read
    np.testing.assert_allclose(history, expected, rtol=1e-6)
    np.testing.assert_allclose(adapted, expected[-1], rtol=1e-6)


def test_history_is_none_without_eval_fn_and_zero_steps_change_nothing():
    adapted, history = adapt(loss_fn, optax.sgd(0.25), 0)(jnp.float32(2.0), client(), jax.random.key(0))
    assert history is None and float(adapted) == 2.0
    _, history = adapt(loss_fn, optax.sgd(0.25), 0, eval_fn=lambda w, data: w)(
        jnp.float32(2.0), client(), jax.random.key(0)
    )
    np.testing.assert_array_equal(history, [2.0])


@pytest.mark.parametrize("max_support", [2, 3, 50])
def test_a_bound_on_the_support_changes_no_number(max_support):
    plain, bound = (
        adapt(loss_fn, optax.sgd(0.25), 3, max_support=m)(jnp.float32(0.0), client(), jax.random.key(0))[0]
        for m in (None, max_support)
    )
    np.testing.assert_allclose(plain, bound, rtol=1e-6)


def test_batches_come_from_the_support_set():
    run = adapt(loss_fn, optax.sgd(1.0), 8, batch_size=1, eval_fn=lambda w, data: w)
    _, history = run(jnp.float32(0.0), client(), jax.random.key(0))
    assert set(np.asarray(history[1:]).tolist()) == {1.0, 5.0}


def test_vmapped_clients_adapt_on_their_own():
    data = jax.tree.map(lambda x: jnp.stack([x, x]), client())
    data = data._replace(num_support=jnp.array([1, 2], jnp.int32))
    run = adapt(loss_fn, optax.sgd(1.0), 1)
    adapted = jax.jit(jax.vmap(lambda d: run(jnp.float32(0.0), d, jax.random.key(0))[0]))(data)
    np.testing.assert_allclose(adapted, [1.0, 3.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": -1}, "num_steps must be at least 0, got -1"),
        ({"num_steps": 1, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_steps": 1, "max_support": 0}, "max_support must be at least 1, got 0"),
    ],
)
def test_bad_counts_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        adapt(loss_fn, optax.sgd(0.1), **options)
