"""A scan of at most `max_steps` steps of which a client does its own number.

The scan has a static length, so it differentiates and lowers well; a step beyond a client's count is skipped by
`lax.cond`. Mapped in a loop the skipped steps cost nothing, vmapped they become a select. Where one step is the most,
it is always a select.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

Carry = TypeVar("Carry")


def masked_scan(
    step_fn: Callable[[Carry, jax.Array], tuple[Carry, jax.Array]],
    carry: Carry,
    num_steps: jax.Array | int,
    max_steps: int,
) -> tuple[Carry, jax.Array]:
    """Applies `step_fn` `num_steps` times.

    Args:
      step_fn: `(carry, step) -> (carry, loss)` with `step` an int32 scalar counted from 0 and `loss` a float scalar.
      carry: what the steps change.
      num_steps: int32 scalar; clipped to `[0, max_steps]`. A Python int makes the scan exactly that long.
      max_steps: static bound.

    Returns:
      The last carry, and the mean of the losses over the steps that were done (0 when there was none).
    """
    if isinstance(num_steps, int):
        carry, losses = jax.lax.scan(step_fn, carry, jnp.arange(min(num_steps, max_steps), dtype=jnp.int32))
        return carry, losses.mean() if num_steps else jnp.zeros((), jnp.float32)

    if max_steps == 1:  # a select fuses with the step, a branch does not
        after, loss = step_fn(carry, jnp.zeros((), jnp.int32))
        done = num_steps > 0
        carry = jax.tree.map(lambda new, old: jax.lax.select(done, new, old), after, carry)
        return carry, jax.lax.select(done, loss, jnp.zeros_like(loss))

    loss_type = jax.eval_shape(step_fn, carry, jnp.zeros((), jnp.int32))[1]

    def step(carry: Carry, index: jax.Array) -> tuple[Carry, jax.Array]:
        skip = jnp.zeros(loss_type.shape, loss_type.dtype)
        return jax.lax.cond(index < num_steps, step_fn, lambda c, _: (c, skip), carry, index)

    carry, losses = jax.lax.scan(step, carry, jnp.arange(max_steps, dtype=jnp.int32))
    done = jnp.clip(num_steps, 1, max(max_steps, 1)).astype(losses.dtype)
    return carry, losses.sum() / done
