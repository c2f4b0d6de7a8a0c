"""Deep leakage from gradients.

References: Zhu, Liu, Han, `Deep Leakage from Gradients <https://arxiv.org/abs/1906.08935>`_, 2019; with labels that are
known, Zhao, Mopuri, Bilen, `iDLG <https://arxiv.org/abs/2001.02610>`_, 2020. The distance is divided by the squared
norm of what was observed, which moves no minimum, and L-BFGS searches along a line where the published code takes
steps of length 1.
"""

from collections.abc import Sequence

import jax
import optax

from cedarjax.attacks.inversion.distances import squared_distance
from cedarjax.attacks.inversion.matching import DistanceFn
from cedarjax.attacks.inversion.rows import Inversion, invert_rows
from cedarjax.attacks.inversion.simulate import SimulateFn
from cedarjax.core.types import PyTree


def dlg(
    simulate_fn: SimulateFn,
    observed: PyTree,
    shape: Sequence[int],
    key: jax.Array,
    *,
    labels: jax.Array | None = None,
    num_classes: int | None = None,
    num_steps: int = 200,
    num_restarts: int = 1,
    tx: optax.GradientTransformation | None = None,
    mask: PyTree | None = None,
    distance_fn: DistanceFn = squared_distance,
) -> Inversion:
    """Inputs and labels whose upload is nearest to the observed one in squared distance.

    Starts from Gaussian inputs and label logits, and knows nothing of images. Made for smooth models: where a second
    derivative is 0 almost everywhere (ReLU alone), there is little to descend.

    Args:
      simulate_fn: `(batch, key) -> upload`, see `gradient_of` and `update_of`. Without `labels` it gets probabilities
        `[B, K]` in `batch["y"]`, as `soft_cross_entropy` takes them.
      observed: the upload.
      shape: `[B, ...]` of the inputs.
      key: PRNG key.
      labels: `[B]` integers where they are known, for example by `label_of_gradient`; else they are optimised.
      num_classes: `K`, needed without `labels`.
      num_steps: steps of the optimiser.
      num_restarts: starts, of which the one of best objective is returned.
      tx: optax optimiser; default: L-BFGS.
      mask: tree of scalars or arrays, above 0 where something was sent (`Upload.mask`); everything by default.
      distance_fn: `(simulated, observed, mask) -> scalar`.

    Returns:
      An `Inversion`.

    Raises:
      ValueError: for numbers below 1, labels that do not fit, neither labels nor `num_classes`, and an upload of other
        structure or shapes.
      TypeError: for labels that are no integers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cedarjax.attacks.inversion import gradient_of, soft_cross_entropy
      >>> apply = lambda w, x: jnp.tanh(x @ w["one"]) @ w["two"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> w = {"one": 0.5 * jax.random.normal(keys[0], (4, 8)), "two": 0.5 * jax.random.normal(keys[1], (8, 3))}
      >>> simulate_fn = gradient_of(soft_cross_entropy(apply), w)
      >>> observed = simulate_fn({"x": jnp.array([[0.1, 0.2, 0.3, 0.4]]), "y": jnp.array([2])}, keys[2])
      >>> found = dlg(simulate_fn, observed, (1, 4), keys[2], num_classes=3, num_steps=50, num_restarts=4)
      >>> bool(jnp.abs(found.x - jnp.array([[0.1, 0.2, 0.3, 0.4]])).max() < 0.01), int(found.y[0])
      (True, 2)
    """
    return invert_rows(
        simulate_fn,
        observed,
        shape,
        optax.lbfgs() if tx is None else tx,
        key,
        labels=labels,
        num_classes=num_classes,
        draw_fn=jax.random.normal,
        num_steps=num_steps,
        num_restarts=num_restarts,
        mask=mask,
        distance_fn=distance_fn,
    )
