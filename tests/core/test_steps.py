import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cedarjax.core import masked_scan


def double(carry, step):
    """Loss is the carry before the step."""
    return 2 * carry, carry + 0 * step.astype(carry.dtype)


@pytest.mark.parametrize(("num_steps", "done"), [(0, 0), (1, 1), (3, 3), (5, 5), (9, 5), (-2, 0)])
def test_a_traced_count_is_clipped_and_masks_the_rest(num_steps, done):
    carry, loss = jax.jit(lambda n: masked_scan(double, jnp.float32(1), n, 5))(jnp.int32(num_steps))
    assert carry == 2**done
    np.testing.assert_allclose(loss, np.mean([2.0**i for i in range(done)]) if done else 0.0)


@pytest.mark.parametrize("num_steps", [0, 2, 7])
def test_a_python_count_is_the_length_of_the_scan(num_steps):
    done = min(num_steps, 5)
    carry, loss = masked_scan(double, jnp.float32(1), num_steps, 5)
    assert carry == 2**done
    np.testing.assert_allclose(loss, np.mean([2.0**i for i in range(done)]) if done else 0.0)


def test_no_room_for_steps():
    carry, loss = masked_scan(double, jnp.float32(3), jnp.int32(4), 0)
    assert carry == 3 and loss == 0


def test_steps_are_counted_and_skipped_ones_may_be_undefined():
    def step(carry, index):
        return carry + jnp.log(3.0 - index.astype(jnp.float32)), carry  # NaN from step 4 on

    total, _ = jax.vmap(lambda n: masked_scan(step, jnp.float32(0), n, 8))(jnp.array([1, 2, 3]))
    np.testing.assert_allclose(total, [np.log(3), np.log(6), np.log(6)], rtol=1e-6)


def test_gradients_run_through_the_steps_that_were_done():
    grad = jax.grad(lambda x, n: masked_scan(double, x, n, 6)[0])
    assert [float(grad(1.0, jnp.int32(n))) for n in (0, 2, 6)] == [1, 4, 64]
