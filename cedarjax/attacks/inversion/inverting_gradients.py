"""Inverting gradients: images by the direction of the upload.

Reference: Geiping, Bauermeister, Dröge, Moeller, `Inverting Gradients - How easy is it to break privacy in federated
learning? <https://arxiv.org/abs/2003.14053>`_, 2020. The cosine sees the direction of the upload and not its length,
total variation prefers pictures, and Adam steps on the sign of the gradient with a rate that falls by ten after 3/8,
5/8 and 7/8 of the steps, as published. Starts are uniform within the bounds, where the published code draws normal
pixels and cuts them off; the total variation is a mean, so that its weight does not depend on the size.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from cedarjax.attacks.inversion.distances import cosine_distance, total_variation
from cedarjax.attacks.inversion.matching import DistanceFn
from cedarjax.attacks.inversion.rows import Inversion, invert_rows
from cedarjax.attacks.inversion.simulate import SimulateFn
from cedarjax.core.types import PyTree


def signed_adam(learning_rate: float | jax.Array, num_steps: int) -> optax.GradientTransformation:
    """Adam on the sign of the gradient, its rate divided by ten after 3/8, 5/8 and 7/8 of the steps.

    Args:
      learning_rate: first rate, in units of what is optimised (a pixel's range).
      num_steps: steps of the whole search.

    Returns:
      An optax transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = signed_adam(0.1, 100)
      >>> updates, _ = tx.update(jnp.array([3.0, -5e-9]), tx.init(jnp.zeros(2)))
      >>> print(updates.round(3))
      [-0.1  0.1]
    """
    falls = {num_steps * eighths // 8: 0.1 for eighths in (3, 5, 7)}
    signs = optax.stateless(lambda updates, params: jax.tree.map(jnp.sign, updates))
    return optax.chain(signs, optax.adam(optax.piecewise_constant_schedule(learning_rate, falls)))


def inverting_gradients(
    simulate_fn: SimulateFn,
    observed: PyTree,
    shape: Sequence[int],
    key: jax.Array,
    *,
    labels: jax.Array | None = None,
    num_classes: int | None = None,
    num_steps: int = 1000,
    num_restarts: int = 1,
    tv_weight: float | jax.Array = 1e-2,
    learning_rate: float | jax.Array = 0.1,
    bounds: tuple[float, float] = (0.0, 1.0),
    tx: optax.GradientTransformation | None = None,
    mask: PyTree | None = None,
    distance_fn: DistanceFn = cosine_distance,
) -> Inversion:
    """Images within bounds whose upload points where the observed one does.

    Minimises `cosine_distance + tv_weight * total_variation`.

    Args:
      simulate_fn: `(batch, key) -> upload`, see `gradient_of` and `update_of`. Without `labels` it gets probabilities
        `[B, K]` in `batch["y"]`, as `soft_cross_entropy` takes them.
      observed: the upload.
      shape: `[B, H, W, F]` of the images; any `[B, ...]` with `tv_weight=0`.
      key: PRNG key.
      labels: `[B]` integers where they are known, for example by `label_of_gradient`; else they are optimised.
      num_classes: `K`, needed without `labels`.
      num_steps: steps of the optimiser.
      num_restarts: starts, of which the one of best objective is returned.
      tv_weight: of the total variation; less for many details, more against noise. A Python 0 leaves it out.
      learning_rate: of `signed_adam`.
      bounds: least and largest pixel.
      tx: optax optimiser in place of `signed_adam`.
      mask: tree of scalars or arrays, above 0 where something was sent (`Upload.mask`); everything by default.
      distance_fn: `(simulated, observed, mask) -> scalar`, for attackers who know how an upload was compressed.

    Returns:
      An `Inversion`; `x` is within the bounds.

    Raises:
      ValueError: for numbers out of range, labels that do not fit, neither labels nor `num_classes`, and an upload of
        other structure or shapes.
      TypeError: for labels that are no integers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cedarjax.attacks.inversion import gradient_of, soft_cross_entropy
      >>> loss_fn = soft_cross_entropy(lambda w, x: jnp.tanh(x.reshape(1, 16) @ w["one"]) @ w["two"])
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> w = {"one": 0.5 * jax.random.normal(keys[0], (16, 8)), "two": 0.5 * jax.random.normal(keys[1], (8, 3))}
      >>> image = jnp.linspace(0.0, 1.0, 16).reshape(1, 4, 4, 1)
      >>> simulate_fn = gradient_of(loss_fn, w)
      >>> observed = simulate_fn({"x": image, "y": jnp.array([1])}, keys[2])
      >>> options = {"labels": jnp.array([1]), "num_steps": 200, "tv_weight": 1e-3}
      >>> found = inverting_gradients(simulate_fn, observed, image.shape, keys[2], **options)
      >>> bool(jnp.abs(found.x - image).max() < 0.05)
      True
    """
    low, high = bounds
    if not low < high:
        raise ValueError(f"bounds must be (low, high) with low < high, got {bounds}.")
    if isinstance(tv_weight, int | float) and tv_weight < 0:
        raise ValueError(f"tv_weight must be at least 0, got {tv_weight}.")
    if isinstance(learning_rate, int | float) and learning_rate <= 0:
        raise ValueError(f"learning_rate must be above 0, got {learning_rate}.")

    def prior(x: jax.Array) -> jax.Array:
        variation = total_variation(x)
        return jnp.asarray(tv_weight, variation.dtype) * variation

    is_plain = isinstance(tv_weight, int | float) and tv_weight == 0
    return invert_rows(
        simulate_fn,
        observed,
        shape,
        signed_adam(learning_rate, num_steps) if tx is None else tx,
        key,
        labels=labels,
        num_classes=num_classes,
        draw_fn=lambda k, s: jax.random.uniform(k, s, minval=low, maxval=high),
        num_steps=num_steps,
        num_restarts=num_restarts,
        mask=mask,
        distance_fn=distance_fn,
        prior_fn=None if is_plain else prior,
        project_fn=lambda x: jnp.clip(x, low, high),
    )
