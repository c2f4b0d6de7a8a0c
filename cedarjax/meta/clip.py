"""Clipping inside a loop that is differentiated."""

import jax
import jax.numpy as jnp
import optax

from cedarjax.core import Params, accumulator


def clip_by_global_norm(max_norm: float | jax.Array) -> optax.GradientTransformation:
    """Scales a gradient down to a norm, with a derivative everywhere.

    `g * min(1, max_norm / ||g||)`, as `optax.clip_by_global_norm`, whose derivative at `g = 0` is NaN because the norm
    has none there. Here a gradient that is not clipped passes as it is, and the norm is not differentiated.

    Args:
      max_norm: largest norm, positive. A traced scalar is allowed.

    Returns:
      An optax transformation without state, to stand before the inner optimiser:
      `optax.chain(clip_by_global_norm(1.0), optax.sgd(0.1))`.

    Raises:
      ValueError: if `max_norm` is not positive.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> clipped = lambda tx, g: tx.update(g, tx.init(g))[0]
      >>> print(jax.grad(lambda g: clipped(optax.clip_by_global_norm(1.0), g))(0.0))
      nan
      >>> print(jax.grad(lambda g: clipped(clip_by_global_norm(1.0), g))(0.0))
      1.0
    """
    if isinstance(max_norm, int | float) and not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}.")

    def init(params: Params) -> optax.EmptyState:
        return optax.EmptyState()

    def update(
        updates: Params, state: optax.EmptyState, params: Params | None = None
    ) -> tuple[Params, optax.EmptyState]:
        leaves = jax.tree.leaves(updates)
        dtype = accumulator(*leaves)
        limit = jnp.asarray(max_norm, dtype)
        squares = [jnp.square(g.astype(dtype)).sum() for g in leaves]
        sq_norm = sum(squares, start=jnp.zeros((), dtype))
        clips = sq_norm > limit**2
        scale = jnp.where(clips, limit * jax.lax.rsqrt(jnp.where(clips, sq_norm, jnp.ones((), dtype))), 1)
        return jax.tree.map(lambda g: (g.astype(dtype) * scale).astype(g.dtype), updates), state

    return optax.GradientTransformation(init, update)
