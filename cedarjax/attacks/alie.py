"""A little is enough: attackers hide inside the spread of the honest updates.

Reference: Baruch et al., `A Little Is Enough: Circumventing Defenses For Distributed Learning
<https://arxiv.org/abs/1902.06156>`_, 2019. The paper subtracts the standard deviations; here they
are added, as in most code since, and a negative `z` subtracts them. Two cases that the paper leaves open: a default `z`
below 0 is 0, and attackers in the majority count on one supporter, where they need none and the quantile is infinite.
"""

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from cedarjax.attacks.collusion import Knowledge, collude, honest_mean, honest_std, step
from cedarjax.core.dtypes import accumulator
from cedarjax.core.types import Aggregator, PyTree


def alie_strength(num_clients: jax.Array, num_byzantine: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Standard deviations within which enough honest clients lie farther from the mean than the attackers.

    `z = max(Phi^-1((n - f - s) / (n - f)), 0)` with `s = floor(n / 2 + 1) - f`, at least 1: the honest supporters that
    attackers need for a majority.

    Args:
      num_clients: int32 scalar, present clients, `n`.
      num_byzantine: int32 scalar, attackers among them, `f`.
      dtype: floating dtype of the result.

    Returns:
      Scalar, finite, at least 0.

    Example:
      >>> import jax.numpy as jnp
      >>> print(f"{alie_strength(jnp.int32(50), jnp.int32(24), jnp.float32):.3f}")
      1.426
    """
    num_honest = jnp.maximum(num_clients - num_byzantine, 1)
    supporters = jnp.clip(num_clients // 2 + 1 - num_byzantine, 1, num_honest)
    share = (num_honest - supporters).astype(dtype) / num_honest.astype(dtype)
    # The clamp comes first: the quantile of 0 is -inf.
    return ndtri(jnp.maximum(share, jnp.asarray(0.5, dtype)))


def alie(z: float | None = None) -> Aggregator:
    """All attackers send `mean + z * std` of the honest updates.

    The standard deviation is taken coordinate by coordinate with `|B| - 1` in the denominator. With one honest client
    it is 0; with none, attackers send zeros.

    Args:
      z: standard deviations; negative to go the other way. Default: `alie_strength` of the present clients, the
        largest shift that a majority still covers.

    Returns:
      An optax transformation that keeps the client axis, reads `byzantine=` (`[C]` bool), `weights=` and `mesh=`, and
      leaves other rows untouched. Same dtype out as in. Absent and non-finite rows are never read.

    Raises:
      ValueError: if `z` is not finite (here), or `byzantine` is missing or client axes disagree (when `update` is
        traced).

    Example:
      >>> import jax.numpy as jnp
      >>> attack = alie(z=2.0)
      >>> updates = {"a": jnp.array([1.0, 2.0, 3.0, 9.0])}
      >>> attack.update(updates, attack.init(None), byzantine=jnp.array([False, False, False, True]))[0]
      {'a': Array([1., 2., 3., 4.], dtype=float32)}
    """
    if z is not None and not math.isfinite(z):
        raise ValueError(f"z must be finite, or None for the default, got {z}.")

    def plan(known: Knowledge) -> PyTree:
        strength: jax.Array | float
        if z is None:
            dtype = accumulator(*jax.tree.leaves(known.updates))
            strength = alie_strength(known.num_present, known.num_byzantine, dtype)
        else:
            strength = z
        return step(honest_mean(known), strength, honest_std(known))

    return collude(plan)
