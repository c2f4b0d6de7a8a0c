"""Exact one-dimensional 2-means.

On a line the two clusters of least squared error are separated by a cut, so sorting and prefix sums find the optimum
among the `C - 1` cuts: no initialisation, no iterations, no local optimum (compare Lloyd, `Least squares quantization
in PCM <https://doi.org/10.1109/TIT.1982.1056489>`_, 1982).
"""

import jax
import jax.numpy as jnp

from cedarjax.core.dtypes import accumulator


def two_means(scores: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits scores into a lower and an upper cluster of least weighted squared error.

    Minimises `sum_i w_i (s_i - center(label_i))^2` exactly, up to the rounding of the sums. Equal scores are never
    parted; of equally good cuts the lowest is taken.

    Args:
      scores: `[C]`.
      weights: `[C]`, at least 0; 0 = absent. Pass presence as 0 and 1 for plain 2-means. A score that is not
        finite is absent whatever its weight.

    Returns:
      `labels [C]` int32 in {0, 1}, 1 = upper cluster, 0 for absent clients; `centers [2]` float32 or wider, the
      weighted means of the lower and the upper cluster. If fewer than two distinct scores are present there is one
      cluster: every present label is 1 and both centers are its mean (0 if nobody is present).

    Raises:
      ValueError: if the two are not vectors of one length, at least 1.

    Example:
      >>> import jax.numpy as jnp
      >>> labels, centers = two_means(jnp.array([0.9, 0.1, 0.8, 0.2]), jnp.ones(4))
      >>> print(labels, centers)
      [1 0 1 0] [0.15 0.85]
    """
    scores, weights = jnp.asarray(scores), jnp.asarray(weights)
    if scores.ndim != 1 or scores.shape != weights.shape or scores.shape[0] < 1:
        raise ValueError(
            f"scores and weights must be [C] with one C >= 1, got the shapes {scores.shape} and {weights.shape}."
        )
    dtype = accumulator(scores)
    scores = scores.astype(dtype)
    present = (weights > 0) & jnp.isfinite(scores)
    weights = jnp.where(present, weights.astype(dtype), 0)
    weights = weights / jnp.maximum(weights.max(), jnp.finfo(dtype).tiny)
    total = weights.sum()

    # Sorted, absent last; shifted by the mean in a scale of 1, so that the prefix sums lose nothing to a common offset.
    order = jnp.argsort(jnp.where(present, scores, jnp.inf), stable=True)
    ranked, w = jnp.where(present, scores, 0)[order], weights[order]
    scale = jnp.abs(ranked).max()
    s = ranked / jnp.where(scale < jnp.finfo(dtype).tiny, 1, scale)
    mean = (w * s).sum() / jnp.where(total > 0, total, 1)
    mass, moment = jnp.cumsum(w), jnp.cumsum(jnp.where(w > 0, w * (s - mean), 0))

    # A cut after entry k is worth the squared error that it removes: W_lower W_upper (mean_upper - mean_lower)^2 / W.
    lower, upper = mass[:-1], total - mass[:-1]
    apart = (w[1:] > 0) & (ranked[:-1] < ranked[1:])
    low_mean = moment[:-1] / jnp.where(apart, lower, 1)
    high_mean = (moment[-1] - moment[:-1]) / jnp.where(apart, upper, 1)
    gain = jnp.where(apart, lower * upper * jnp.square(high_mean - low_mean), -1)
    num_lower = jnp.where(apart.any(), jnp.argmax(gain) + 1, 0) if gain.shape[0] else jnp.zeros((), jnp.int32)
    is_lower = jnp.zeros(scores.shape, bool).at[order].set(jnp.arange(scores.shape[0]) < num_lower)
    labels = (present & ~is_lower).astype(jnp.int32)

    def center(members: jax.Array) -> jax.Array:
        mass = jnp.where(members, weights, 0)
        return (mass * jnp.where(members, scores, 0)).sum() / jnp.where(members.any(), mass.sum(), 1)

    top = center(labels == 1)
    bottom = jnp.where(num_lower > 0, center(present & is_lower), top)
    return labels, jnp.stack([bottom, top])
