"""Labels, read off the gradient of the last layer.

References: Zhao, Mopuri, Bilen, `iDLG: Improved Deep Leakage from Gradients <https://arxiv.org/abs/2001.02610>`_, 2020;
Wainakh et al., `User-Level Label Leakage from Gradients in Federated Learning <https://arxiv.org/abs/2105.09369>`_,
2022 (LLG).

With cross entropy the gradient of the last bias is `mean_i (p_i - onehot(y_i))`. For one example its only negative
entry is that of the label; the same holds of the sums of the kernel's columns where the features are not negative
(ReLU, sigmoid). For a batch of `B`, `g_k = mean_i p_ik - n_k / B`: a negative entry is a class that is there for
certain, and the counts follow once the mean probabilities are known, which LLG estimates from examples that the
attacker has, and which are nearly uniform before training. Where LLG scales the columns' sums by an estimated impact,
`label_counts` reads the bias, whose impact is exactly `1 / B`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core.batches import check_positive
from cedarjax.core.dtypes import accumulator


class LabelGuess(NamedTuple):
    """The label of one example."""

    label: jax.Array
    """int32 scalar."""
    ok: jax.Array
    """bool scalar: exactly one entry is negative, as it must be of one example."""


def label_of_gradient(kernel: jax.Array | None = None, bias: jax.Array | None = None) -> LabelGuess:
    """The label of one example, from the last layer.

    The class of the most negative bias gradient; without a bias, of the most negative column sum of the kernel's
    gradient, which asks for features that are not negative. A positive factor, such as the learning rate of one SGD
    step, changes nothing.

    Args:
      kernel: `[in, K]`, gradient of the last kernel; read only without a bias.
      bias: `[K]`, gradient of the last bias.

    Returns:
      A `LabelGuess`; certain for one example, cross entropy, and a gradient that is not all 0.

    Raises:
      ValueError: if both are missing, or of another rank.

    Example:
      >>> import jax.numpy as jnp
      >>> print(label_of_gradient(bias=jnp.array([0.2, -0.9, 0.7])).label)
      1
    """
    if bias is not None:
        scores = jnp.asarray(bias)
    elif kernel is not None and jnp.ndim(kernel) == 2:
        scores = jnp.asarray(kernel).astype(accumulator(jnp.asarray(kernel))).sum(axis=0)
    else:
        raise ValueError(
            f"kernel must be [in, K] where there is no bias, got {jnp.shape(kernel) if kernel is not None else None}."
        )
    if scores.ndim != 1 or scores.size < 2:
        raise ValueError(f"bias must be [K] with K >= 2, got the shape {scores.shape}.")
    finite = jnp.where(jnp.isfinite(scores), scores, jnp.asarray(jnp.inf, scores.dtype))
    return LabelGuess(jnp.argmin(finite).astype(jnp.int32), (finite < 0).sum() == 1)


def label_counts(bias: jax.Array, num_examples: int, *, mean_probabilities: jax.Array | None = None) -> jax.Array:
    """How many examples of each class a batch holds, estimated from the last bias.

    `n_k = B (p_k - g_k)`, rounded so that the counts are whole and sum to `B`: first one for every negative entry,
    then one after another to the class that lacks most.

    Args:
      bias: `[K]`, gradient of the last bias, a mean over the batch. Of a local update, the delta divided by the sum of
        the learning rates of its steps, which is about the mean gradient.
      num_examples: `B`, static.
      mean_probabilities: `[K]`, the model's mean probabilities on the batch, for example on other examples of the
        kind; default: uniform, as before training.

    Returns:
      `[K]` int32, sum `B`; exact where the mean probabilities are known to less than `1 / (2 B)`.

    Raises:
      ValueError: if `num_examples` is below 1 or the shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> print(label_counts(jnp.array([-0.40, 0.05, 0.35]), 4))
      [3 1 0]
    """
    check_positive(num_examples=num_examples)
    gradient = jnp.asarray(bias)
    if gradient.ndim != 1:
        raise ValueError(f"bias must be [K], got the shape {gradient.shape}.")
    num_classes, dtype = gradient.shape[0], accumulator(gradient)
    if mean_probabilities is None:
        expected = jnp.full(num_classes, 1 / num_classes, dtype)
    else:
        expected = jnp.asarray(mean_probabilities).astype(dtype)
        if expected.shape != gradient.shape:
            raise ValueError(f"mean_probabilities must be {gradient.shape}, got {expected.shape}.")
    gradient = jnp.where(jnp.isfinite(gradient), gradient, jnp.zeros((), gradient.dtype)).astype(dtype)
    wanted = jnp.asarray(num_examples, dtype) * (expected - gradient)
    certain = gradient < 0

    def give(counts: jax.Array, _: None) -> tuple[jax.Array, None]:
        lacking = wanted - counts.astype(dtype)
        # Classes that are there for certain come first, the most negative of them ahead.
        unmet = certain & (counts == 0)
        rank = jnp.where(unmet.any(), jnp.where(unmet, -gradient, -jnp.inf), lacking)
        return counts.at[jnp.argmax(rank)].add(1), None

    counts, _ = jax.lax.scan(give, jnp.zeros(num_classes, jnp.int32), None, length=num_examples)
    return counts


def labels_from_counts(counts: jax.Array, num_examples: int) -> jax.Array:
    """Labels of a batch in rising order; the order of its rows cannot be told from its gradient.

    Args:
      counts: `[K]` integers, sum `num_examples`.
      num_examples: `B`, static.

    Returns:
      `[B]` int32.

    Example:
      >>> import jax.numpy as jnp
      >>> print(labels_from_counts(jnp.array([2, 0, 1]), 3))
      [0 0 2]
    """
    check_positive(num_examples=num_examples)
    classes = jnp.arange(counts.shape[0], dtype=jnp.int32)
    return jnp.repeat(classes, counts, total_repeat_length=num_examples)
