"""Which rows a masked metric reads."""

import jax
import jax.numpy as jnp


def presence(weights: jax.Array | None, num_rows: int, *, name: str) -> jax.Array:
    """Tells the present rows from the absent.

    Args:
      weights: `[num_rows]` bool, or numbers that are positive where the row is present; `None` for all present.
      num_rows: rows of the metric's input.
      name: the argument's name, for the error.

    Returns:
      `[num_rows]` bool.

    Raises:
      ValueError: if `weights` is not `[num_rows]`.

    Example:
      >>> presence(jnp.array([0.0, 2.5]), 2, name="mask").tolist()
      [False, True]
    """
    if weights is None:
        return jnp.ones(num_rows, bool)
    if weights.shape != (num_rows,):
        raise ValueError(f"{name} must have the shape {(num_rows,)}, got {weights.shape}.")
    return weights if weights.dtype == jnp.bool_ else weights > 0
