"""Clipping before a rule: to a given length (`clip`) or to one that adapts to the clients (`arc`).

Reference for `arc`: Allouah et al., `Adaptive Gradient Clipping for Robust Federated Learning
<https://arxiv.org/abs/2405.14432>`_, 2024. ByzFL's versions write into the caller's array; these do not.
"""

import jax
import jax.numpy as jnp
import optax

from cedarjax.core.types import Aggregator
from cedarjax.robust.presence import Presence
from cedarjax.robust.selection import check_enough, check_num_byzantine
from cedarjax.robust.wrap import Mixing, wrap


def clip_factors(sq_norms: jax.Array, max_sq_norm: jax.Array | float) -> jax.Array:
    """`min(1, c / |x_i|)` from squared lengths; 1 for a vector of length 0.

    Args:
      sq_norms: `[C]`, at least 0.
      max_sq_norm: `c^2`.

    Returns:
      `[C]` in `[0, 1]`.

    Example:
      >>> import jax.numpy as jnp
      >>> print(clip_factors(jnp.array([0.0, 1.0, 16.0]), 4.0))
      [1.  1.  0.5]
    """
    long = sq_norms > max_sq_norm
    return jnp.where(long, jnp.sqrt(max_sq_norm / jnp.where(long, sq_norms, 1)), 1)


def _mixing(presence: Presence, factors: jax.Array, ok: jax.Array) -> Mixing:
    kept = jnp.where(presence.present, factors, 0)
    weights = jnp.where(presence.present, presence.clients, 0)
    return Mixing(jnp.eye(kept.size, dtype=kept.dtype) * kept[:, None], weights, ok)


def clip(max_norm: float, rule: optax.GradientTransformation) -> Aggregator:
    """Hands a rule the updates clipped to a length, `x_i min(1, max_norm / |x_i|)`.

    Lengths are Euclidean over the whole tree; where layers are masked, over the uploaded ones, scaled to all
    parameters. The clipped rows are never written.

    Args:
      max_norm: the greatest length, above 0.
      rule: an aggregator.

    Returns:
      An `Aggregator` with a `WrapState`, whose `info.coefficients` are in terms of the updates as they came.

    Raises:
      ValueError: if `max_norm` is not above 0.
      TypeError: if `rule` is not an optax transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> from cedarjax.robust import mean
      >>> rule = clip(1.0, mean())
      >>> updates = {"a": jnp.array([[0.5, 0.0], [0.0, 900.0]])}
      >>> print(rule.update(updates, rule.init({"a": jnp.zeros(2)}))[0])
      {'a': Array([0.25, 0.5 ], dtype=float32)}
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, got {max_norm}.")

    def mix(presence: Presence, squares: jax.Array, key: jax.Array | None) -> Mixing:
        del key
        return _mixing(presence, clip_factors(squares, float(max_norm) ** 2), presence.present.any())

    return wrap(rule, mix, reads="norms", means=False)


def arc(f: int, rule: optax.GradientTransformation) -> Aggregator:
    """Hands a rule the updates, the `k = floor(2 f (n - f) / n)` longest clipped to the longest of the others.

    Guarantee: it keeps a rule's robustness and bounds how far the first step can go when the honest clients differ
    (Allouah et al. 2024). With `f = 0` nothing is clipped. It scales along with the updates but does not move along.

    Args:
      f: number of attackers to withstand; `2 f < n` for `n` present clients. If only values tell that they are fewer,
        nothing is clipped, and `info.ok` is False.
      rule: an aggregator.

    Returns:
      An `Aggregator` with a `WrapState`, whose `info.coefficients` are in terms of the updates as they came.

    Raises:
      ValueError: if `f` is negative (here), or there are too few clients for it (when `update` is traced).
      TypeError: if `f` is not an int or `rule` is not an optax transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> from cedarjax.robust import mean
      >>> rule = arc(1, mean())
      >>> updates = {"a": jnp.array([[1.0, 0.0], [0.0, 2.0], [512.0, 0.0], [0.0, 1.0]])}
      >>> print(rule.update(updates, rule.init({"a": jnp.zeros(2)}))[0])
      {'a': Array([0.75, 0.75], dtype=float32)}
    """
    check_num_byzantine(f)

    def mix(presence: Presence, squares: jax.Array, key: jax.Array | None) -> Mixing:
        del key
        n = presence.present.sum(dtype=jnp.int32)
        enough = n > 2 * f
        num_clipped = jnp.where(enough, 2 * f * (n - f) // jnp.maximum(n, 1), 0)
        ranked = jnp.sort(jnp.where(presence.present, squares, jnp.inf))
        longest = ranked[jnp.maximum(n - num_clipped - 1, 0)]
        return _mixing(presence, clip_factors(squares, longest), enough)

    return wrap(
        rule, mix, reads="norms", means=False, check=lambda n: check_enough(f, n, 2 * f + 1, "2 * f < num_clients")
    )
