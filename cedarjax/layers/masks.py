"""Which layers a client uploads: all but the least changed, or as many as a byte budget carries.

Reference: You et al., `A framework reforming personalized Internet of Things by federated meta-learning
<https://doi.org/10.1038/s41467-025-59217-z>`_, 2025, skips a number of layers. Layers have unequal sizes, so that
skipping the least changed one often saves next to nothing; a budget of bytes is the more useful knob.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def least_changed(change: jax.Array, num_skipped: int) -> jax.Array:
    """Upload mask that leaves out the layers of least change.

    Args:
      change: `[L]`; NaN counts as the largest.
      num_skipped: layers to leave out, `0 <= num_skipped < L`.

    Returns:
      `[L]` float32, 1 = upload, with exactly `num_skipped` zeros. Of equal layers the one of lower index is skipped
      first.

    Raises:
      ValueError: if `change` is not a vector or `num_skipped` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> least_changed(jnp.array([0.3, 0.1, 0.1, jnp.nan]), num_skipped=1)
      Array([1., 0., 1., 1.], dtype=float32)
    """
    change = jnp.asarray(change)
    if change.ndim != 1:
        raise ValueError(f"change must be [L], got the shape {change.shape}.")
    if not 0 <= num_skipped < change.shape[0]:
        raise ValueError(
            f"num_skipped must satisfy 0 <= num_skipped < num_layers, got {num_skipped} and {change.shape[0]}."
        )
    skipped = jnp.argsort(change, stable=True)[:num_skipped]
    return jnp.ones(change.shape, jnp.float32).at[skipped].set(0.0)


def within_budget(priority: jax.Array, layer_bytes: Sequence[int], budget: jax.Array | int) -> jax.Array:
    """Upload mask filled greedily: in order of falling priority, every layer that still fits into the budget.

    A layer too large for what is left is passed over, and smaller ones after it may still fit. The layer of highest
    priority is uploaded whenever it fits into the whole budget.

    Args:
      priority: `[L]`, higher first; NaN counts as the highest, of equal layers the one of lower index comes first.
      layer_bytes: `L` Python ints, bytes of each layer.
      budget: bytes, a Python int or an int32 scalar.

    Returns:
      `[L]` float32, 1 = upload; the bytes of the uploaded layers never exceed `budget`.

    Raises:
      ValueError: if the lengths differ, or a size or a Python `budget` lies outside `[0, 2^31)`.

    Example:
      >>> import jax.numpy as jnp
      >>> within_budget(jnp.array([0.1, 0.9, 0.5]), layer_bytes=(10, 60, 50), budget=80)
      Array([1., 1., 0.], dtype=float32)
    """
    priority = jnp.asarray(priority)
    if priority.shape != (len(layer_bytes),):
        raise ValueError(
            f"priority must be [L] with L = len(layer_bytes) = {len(layer_bytes)}, got the shape {priority.shape}."
        )
    for i, size in enumerate(layer_bytes):
        if not 0 <= size < 2**31:
            raise ValueError(f"layer_bytes must lie within [0, 2^31), got {size} at {i}.")
    if isinstance(budget, int) and not 0 <= budget < 2**31:
        raise ValueError(f"budget must lie within [0, 2^31), got {budget}.")
    sizes = jnp.asarray(layer_bytes, jnp.int32)
    ranked = jnp.where(jnp.isnan(priority), jnp.inf, priority)
    order = jnp.argsort(-ranked, stable=True)

    def take(left: jax.Array, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        fits = sizes[layer] <= left
        return jnp.where(fits, left - sizes[layer], left), fits

    _, taken = jax.lax.scan(take, jnp.asarray(budget, jnp.int32), order)
    return jnp.zeros(priority.shape, jnp.float32).at[order].set(taken.astype(jnp.float32))
