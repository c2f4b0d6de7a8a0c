"""Reptile against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cedarjax.core import ClientData
from cedarjax.meta import reptile


def loss_fn(w, x, key):
    return 0.5 * jnp.mean((w - x) ** 2)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_displacement_on_a_quadratic(num_steps):
    """All examples equal `c`: `theta - theta_m = (1 - (1 - rate)^m) (theta - c)`."""
    data = ClientData(jnp.full((6,), 3.0).at[5].set(jnp.nan), jnp.int32(5), jnp.int32(2))
    upload, _, _ = reptile(loss_fn, optax.sgd(0.2), num_steps, batch_size=2).update(
        jnp.float32(1.0), (), data, jax.random.key(0)
    )
    np.testing.assert_allclose(upload.delta, (1 - 0.8**num_steps) * (1.0 - 3.0), rtol=1e-6)


def test_steps_do_not_depend_on_the_size_of_the_data():
    local = reptile(loss_fn, optax.sgd(0.2), 3, batch_size=2)
    deltas = [
        local.update(jnp.float32(0.0), (), ClientData(jnp.ones(8), jnp.int32(n), jnp.int32(1)), jax.random.key(0))[
            0
        ].delta
        for n in (1, 8)
    ]
    np.testing.assert_allclose(deltas, -(1 - 0.8**3), rtol=1e-6)


def test_support_and_query_are_both_read():
    data = ClientData(jnp.array([0.0, 8.0]), jnp.int32(2), jnp.int32(1))
    upload, _, info = reptile(loss_fn, optax.sgd(1.0), 1, batch_size=2).update(
        jnp.float32(0.0), (), data, jax.random.key(0)
    )
    assert float(upload.delta) == -4.0 and float(info.loss) == 16.0


@pytest.mark.parametrize("options", [{"num_steps": 0, "batch_size": 1}, {"num_steps": 1, "batch_size": 0}])
def test_bad_counts_are_named(options):
    name = next(k for k, v in options.items() if v == 0)
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        reptile(loss_fn, optax.sgd(0.1), **options)
