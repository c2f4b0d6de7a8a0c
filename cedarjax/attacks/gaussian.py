"""Gaussian attack: attackers send noise in place of an update.

Reference: Blanchard et al., `Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent
<https://arxiv.org/abs/1703.02757>`_, 2017, whose Gaussian workers draw every coordinate from a normal distribution of
large variance.
"""

import jax
import jax.numpy as jnp

from cedarjax.attacks.rows import overwrite_byzantine
from cedarjax.core.types import Aggregator, PyTree


def gaussian(std: float) -> Aggregator:
    """Replaces the update of every flagged client by independent draws from `N(0, std^2)`.

    Args:
      std: standard deviation of every coordinate, at least 0; with 0 attackers send nothing new.

    Returns:
      An optax transformation that keeps the client axis, reads `byzantine=` (`[C]` bool) and `key=`, and leaves other
      rows untouched. Same dtype out as in. Row `i` is drawn from a key of its own, so that rows added behind it change
      nothing.

    Raises:
      ValueError: if `std` is negative (here), or `byzantine` or `key` is missing (when `update` is traced).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> attack = gaussian(std=0.1)
      >>> flags = jnp.array([False, True])
      >>> updates, _ = attack.update(
      ...     {"a": jnp.zeros((2, 3))}, attack.init(None), byzantine=flags, key=jax.random.key(0)
      ... )
      >>> (updates["a"] != 0).all(axis=1).tolist()
      [False, True]
    """
    if not std >= 0:
        raise ValueError(f"std must be at least 0, got {std}.")

    def leaf_noise(x: jax.Array, key: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(x.shape[0], dtype=jnp.int32))
        return jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys) * std

    def noise(updates: PyTree, key: jax.Array | None) -> PyTree:
        if key is None:
            raise ValueError("key must be given to draw the attackers' updates; got None.")
        leaves, structure = jax.tree.flatten(updates)
        drawn = [leaf_noise(x, jax.random.fold_in(key, i)) for i, x in enumerate(leaves)]
        return jax.tree.unflatten(structure, drawn)

    return overwrite_byzantine(noise)
