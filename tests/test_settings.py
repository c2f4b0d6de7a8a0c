"""The settings that every other test relies on are really in force."""

import jax
import jax.numpy as jnp
import optax
import pytest


def test_implicit_promotion_is_refused():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)
    with pytest.raises(ValueError, match="dtype promotion"):
        jnp.ones(3, jnp.float32) + jnp.ones(3, jnp.int32)


@pytest.mark.standard_promotion
def test_the_marker_lets_adam_step_and_keeps_ranks_strict():
    tx = optax.adam(0.1)
    step, _ = tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
    assert step.dtype == jnp.float32
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)


def test_x64_is_on_where_it_is_asked_for(x64):
    assert jnp.ones(3).dtype == jnp.float64


def test_x64_is_off_elsewhere():
    assert jnp.ones(3).dtype == jnp.float32


def test_the_mesh_has_automatic_axes(mesh):
    assert mesh.axis_names == ("clients",)
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,)
    assert len(set(mesh.devices.flat)) == 4
