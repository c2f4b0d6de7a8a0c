"""The geometric median: the point whose distances to the updates have the least sum.

References: Pillutla et al., `Robust Aggregation for Federated Learning <https://arxiv.org/abs/1912.13445>`_, 2019, for
the smoothed iteration of Weiszfeld that starts at the mean; guarantee from Allouah et al., `Fixing by Mixing
<https://arxiv.org/abs/2302.01772>`_, 2023. ByzFL starts at 0, smooths by 0.1 and takes three steps, which
`geometric_median(0.1, 3, "zero")` does. Every iterate is a combination of the updates, so that distances follow from
the Gram matrix and a step costs `C^2`, whatever the number of parameters.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from cedarjax.core.types import Aggregator, PyTree
from cedarjax.robust.gram import from_gram
from cedarjax.robust.norms import gram_and_norms
from cedarjax.robust.rule import Round, RuleInfo, combine, from_round
from cedarjax.robust.selection import mean_over

_HIGHEST = lax.Precision.HIGHEST


def sq_distances_to(gram: jax.Array, coefficients: jax.Array) -> jax.Array:
    """Squared distances from each client to a combination of them.

    `d_i^2 = |x_i - sum_j a_j x_j|^2`, with the centre of the inner products moved to the combination before squares are
    taken, which keeps the digits of a distance that is much smaller than the others.

    Args:
      gram: `[C, C]` inner products about any centre.
      coefficients: `[C]`, adding up to 1.

    Returns:
      `[C]`, at least 0.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([0.0, 1.0, 3.0])
      >>> print(sq_distances_to(x[:, None] * x[None, :], jnp.array([0.0, 0.5, 0.5])))
      [4. 1. 1.]
    """
    moved = gram - jnp.matmul(coefficients, gram, precision=_HIGHEST)[None, :]
    return jnp.maximum(jnp.diagonal(moved) - jnp.matmul(moved, coefficients, precision=_HIGHEST), 0)


def inverse_distances(sq_distances: jax.Array, weights: jax.Array, smoothing: float) -> jax.Array:
    """Coefficients that one step of Weiszfeld's iteration gives the clients, `w_i / max(smoothing, d_i)`, normalised.

    Args:
      sq_distances: `[C]`, at least 0; those of absent clients may be anything.
      weights: `[C]`; clients of weight 0 are absent.
      smoothing: the least distance that counts.

    Returns:
      `[C]`, adding up to 1; zeros if nobody is present. Differentiable at distance 0.

    Example:
      >>> import jax.numpy as jnp
      >>> print(inverse_distances(jnp.array([0.0, 1.0, 4.0]), jnp.array([1.0, 1.0, 2.0]), 0.5))
      [0.5  0.25 0.25]
    """
    shares = mean_over(weights > 0, weights).astype(sq_distances.dtype)
    sq_distances = jnp.where(shares > 0, sq_distances, 1)
    far = sq_distances > jnp.square(jnp.asarray(smoothing, sq_distances.dtype))
    distances = jnp.where(far, jnp.sqrt(jnp.where(far, sq_distances, 1)), smoothing)
    shares = shares / distances
    total = shares.sum()
    return shares / jnp.where(total > 0, total, 1)


def weiszfeld(gram: jax.Array, weights: jax.Array, start: jax.Array, smoothing: float, num_iters: int) -> jax.Array:
    """Steps towards the geometric median, `a_i <- w_i / max(smoothing, |x_i - sum_j a_j x_j|)`, normalised.

    Args:
      gram: `[C, C]` inner products about any centre.
      weights: `[C]`; clients of weight 0 are absent.
      start: `[C]`, adding up to 1.
      smoothing: the least distance that counts.
      num_iters: how many steps.

    Returns:
      `[C]`, adding up to 1. Differentiable through the steps.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([0.0, 1.0, 100.0])
      >>> a = weiszfeld(x[:, None] * x[None, :], jnp.ones(3), jnp.ones(3) / 3, 1e-6, 50)
      >>> print((a @ x).round(3))
      1.0
    """

    def step(_: int, coefficients: jax.Array) -> jax.Array:
        return inverse_distances(sq_distances_to(gram, coefficients), weights, smoothing)

    return lax.fori_loop(0, num_iters, step, start.astype(gram.dtype))


def geometric_median(
    smoothing: float = 1e-6, num_iters: int = 100, start: Literal["mean", "zero"] = "mean"
) -> Aggregator:
    """The smoothed geometric median, `argmin_z sum_i w_i max(|x_i - z|, smoothing)` by `num_iters` steps of Weiszfeld.

    Guarantee: `(f, kappa)`-robust with `kappa <= 4 (1 + f / (n - 2 f))^2` for every `f < n / 2` at once, for equal
    weights and enough steps (Allouah et al. 2023). It moves along with the updates if it starts at the mean, and scales
    along with them as long as distances exceed `smoothing`. Gradients go through the steps.

    Args:
      smoothing: the least distance that counts, above 0, in units of the updates.
      num_iters: steps, at least 1.
      start: the point whose distances give the first step, the weighted `"mean"` or `"zero"`.

    Returns:
      An `Aggregator`, see `from_gram` for what it reads and how absent and non-finite clients and masked layers are
      treated. It is defined for any number of clients; one or two give their mean.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = geometric_median()
      >>> updates = {"a": jnp.array([[0.0, 1.0], [2.0, 1.0], [900.0, 1.0]])}
      >>> update, _ = rule.update(updates, rule.init({"a": jnp.zeros(2)}))
      >>> print(update["a"].round(3))
      [2. 1.]
    """
    if not smoothing > 0:
        raise ValueError(f"smoothing must be above 0, got {smoothing}.")
    if num_iters < 1:
        raise ValueError(f"num_iters must be at least 1, got {num_iters}.")
    if start not in ("mean", "zero"):
        raise ValueError(f"start must be 'mean' or 'zero', got {start!r}.")

    def from_mean(gram: jax.Array, weights: jax.Array) -> jax.Array:
        return weiszfeld(gram, weights, mean_over(weights > 0, weights), smoothing, num_iters)

    def from_zero(told: Round) -> tuple[PyTree, RuleInfo]:
        presence, gram, sq_norms, rows, layered = gram_and_norms(told.updates, told.weights, told.mesh)
        kept = jnp.where(presence.present, presence.clients, 0).astype(gram.dtype)
        first = inverse_distances(sq_norms.astype(gram.dtype), kept, smoothing)
        coefficients = weiszfeld(gram, kept, first, smoothing, num_iters - 1)
        info = RuleInfo(coefficients, presence.nonfinite, presence.present.any())
        return combine(rows, presence, coefficients, layered=layered, mesh=told.mesh), info

    return from_gram(from_mean) if start == "mean" else from_round(from_zero)
