"""Representational consistency of a layer before and after training, and how much it changed between rounds.

Reference: You et al., `A framework reforming personalized Internet of Things by federated meta-learning
<https://doi.org/10.1038/s41467-025-59217-z>`_, 2025. The published code returns NaN for a layer whose distances are
all equal (a dead layer) and divides by the present score without a floor; here such a layer scores 0 and the floor is
`eps`.
"""

import jax
import jax.numpy as jnp

from cedarjax.core.correlation import pearson


def rcs(rdv_a: jax.Array, rdv_b: jax.Array) -> jax.Array:
    """Squared Pearson correlation of two representational distance vectors.

    `rcs = cov(a, b)^2 / (var(a) var(b))`.

    Args:
      rdv_a: `[E]` distances, for example under the received parameters.
      rdv_b: `[E]` distances, for example under the trained parameters.

    Returns:
      Scalar in `[0, 1]`, float32 or wider; 0 if either vector is constant. Finite whenever the input is; NaN or Inf in
      the input give NaN.

    Raises:
      ValueError: if the two are not vectors of one length, at least 1.

    Example:
      >>> import jax.numpy as jnp
      >>> print(rcs(jnp.array([1.0, 2.0, 3.0]), jnp.array([6.0, 4.0, 2.0])))
      1.0
      >>> print(rcs(jnp.array([1.0, 2.0, 3.0]), jnp.array([0.1, 0.1, 0.1])))
      0.0
    """
    rdv_a, rdv_b = jnp.asarray(rdv_a), jnp.asarray(rdv_b)
    if rdv_a.ndim != 1 or rdv_a.shape != rdv_b.shape or rdv_a.shape[0] < 1:
        raise ValueError(
            f"rdv_a and rdv_b must be [E] with one E >= 1, got the shapes {rdv_a.shape} and {rdv_b.shape}."
        )
    return jnp.square(pearson(rdv_a, rdv_b))


def relative_change(previous: jax.Array, current: jax.Array, *, eps: float = 1e-8) -> jax.Array:
    """How much each layer's consistency moved since the client's previous round.

    `change_l = |previous_l - current_l| / max(current_l, eps)`.

    Args:
      previous: `[L]` consistencies of the client's previous round.
      current: `[L]` consistencies of this round.
      eps: floor of the denominator, at least 0. With 0 this is the published arithmetic, where 0 / 0 is NaN and a
        layer that fell to 0 is Inf.

    Returns:
      `[L]`, at least 0; finite for finite input when `eps > 0`.

    Raises:
      ValueError: if the shapes differ or `eps` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> relative_change(jnp.array([0.5, 0.0]), jnp.array([0.25, 0.0]))
      Array([1., 0.], dtype=float32)
    """
    previous, current = jnp.asarray(previous), jnp.asarray(current)
    if previous.ndim != 1 or previous.shape != current.shape:
        raise ValueError(
            f"previous and current must be [L] with one L, got the shapes {previous.shape} and {current.shape}."
        )
    if eps < 0:
        raise ValueError(f"eps must be at least 0, got {eps}.")
    return jnp.abs(previous - current) / jnp.maximum(current, eps)
