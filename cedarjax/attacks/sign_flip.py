"""Sign flip: attackers push the server the other way.

Reference: Li et al., `RSA: Byzantine-Robust Stochastic Aggregation Methods <https://arxiv.org/abs/1811.03761>`_, 2019.
"""

import jax

from cedarjax.attacks.rows import overwrite_byzantine
from cedarjax.core.types import Aggregator


def sign_flip(scale: float = 1.0) -> Aggregator:
    """Replaces the update of every flagged client by `-scale * update`.

    Updates are pseudo-gradients, `shared - shared_after`, so the attacker's own progress is undone `scale` times over.

    Args:
      scale: factor, at least 0; 1 is the plain sign flip, 5 a strong one.

    Returns:
      An optax transformation that keeps the client axis, reads `byzantine=` (`[C]` bool) and leaves other rows
      untouched. Same dtype out as in.

    Raises:
      ValueError: if `scale` is negative (here), or `byzantine` is missing or not `[C]` (when `update` is traced).

    Example:
      >>> import jax.numpy as jnp
      >>> attack = sign_flip(scale=5.0)
      >>> updates, _ = attack.update(
      ...     {"a": jnp.array([1.0, 2.0])}, attack.init(None), byzantine=jnp.array([False, True])
      ... )
      >>> updates
      {'a': Array([  1., -10.], dtype=float32)}
    """
    if not scale >= 0:
        raise ValueError(f"scale must be at least 0, got {scale}.")
    return overwrite_byzantine(lambda updates, key: jax.tree.map(lambda x: x * -scale, updates))
