"""Model replacement: attackers scale up what they trained, so that the average becomes their model.

Reference: Bagdasaryan et al., `How To Backdoor Federated Learning <https://arxiv.org/abs/1807.00459>`_, 2020.
"""

import jax

from cedarjax.attacks.rows import overwrite_byzantine
from cedarjax.core.types import Aggregator


def model_replacement(scale: float) -> Aggregator:
    """Replaces the update of every flagged client by `scale * update`.

    Updates are pseudo-gradients, `shared - shared_after`, so nothing has to be subtracted first. Where `n` clients of
    equal weight are averaged, the honest ones have converged and the server's step size is 1, `scale = n` puts the
    attacker's model in the place of the shared one. The attacker's training is the caller's, for instance on the data
    of `backdoor_cohort`.

    Args:
      scale: factor, at least 0; the number of clients for full replacement.

    Returns:
      An optax transformation that keeps the client axis, reads `byzantine=` (`[C]` bool) and leaves other rows
      untouched. Same dtype out as in.

    Raises:
      ValueError: if `scale` is negative (here), or `byzantine` is missing or not `[C]` (when `update` is traced).

    Example:
      >>> import jax.numpy as jnp
      >>> attack = model_replacement(scale=10.0)
      >>> attack.update({"a": jnp.array([1.0, 2.0])}, attack.init(None), byzantine=jnp.array([False, True]))[0]
      {'a': Array([ 1., 20.], dtype=float32)}
    """
    if not scale >= 0:
        raise ValueError(f"scale must be at least 0, got {scale}.")
    return overwrite_byzantine(lambda updates, key: jax.tree.map(lambda x: x * scale, updates))
