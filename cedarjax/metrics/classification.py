"""Classification metrics from a confusion matrix, which masks and merges exactly.

Scores agree with scikit-learn (`classification metrics
<https://scikit-learn.org/stable/modules/model_evaluation.html#classification-metrics>`_, 2011): macro averages run
over the classes that occur among labels or predictions, a quotient 0/0 counts as 0. Precision divides by what was
predicted, recall by what was true; Cedar's published code has them exchanged, and averages them over batches of ten.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core.dtypes import accumulator
from cedarjax.metrics.presence import presence


class ClassificationScores(NamedTuple):
    """Scores of one set of examples, float32 scalars; all 0 when the set is empty."""

    loss: jax.Array
    """Mean cross entropy."""
    accuracy: jax.Array
    """Share of examples whose class is predicted."""
    precision: jax.Array
    """Macro precision."""
    recall: jax.Array
    """Macro recall."""
    f1: jax.Array
    """Macro F1."""
    mcc: jax.Array
    """Matthews correlation coefficient; 0 where labels or predictions are all of one class."""


class Confusion(NamedTuple):
    """What has to be kept of examples to score them; counts are exact up to 2^24 in every cell."""

    matrix: jax.Array
    """`[K, K]` float32, examples of class `row` predicted as class `column`."""
    loss_sum: jax.Array
    """Scalar, sum of the examples' cross entropy."""
    num_examples: jax.Array
    """float32 scalar, examples counted."""

    def merge(self, other: "Confusion") -> "Confusion":
        """Confusion of both sets of examples together."""
        return jax.tree.map(jnp.add, self, other)

    def pool(self) -> "Confusion":
        """Confusion of all sets together, for leaves with a leading axis (clients, batches)."""
        return jax.tree.map(lambda leaf: leaf.sum(axis=0), self)

    def summarise(self) -> ClassificationScores:
        """Scores of the examples counted."""
        total = jnp.maximum(self.num_examples, 1.0)
        hits = jnp.diagonal(self.matrix)
        true, predicted = self.matrix.sum(axis=1), self.matrix.sum(axis=0)
        occurs = true + predicted > 0
        num_classes = jnp.maximum(occurs.sum(dtype=jnp.float32), 1.0)

        def macro(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
            return _ratio(numerator, denominator).sum() / num_classes

        counted = jnp.maximum(self.matrix.sum(), 1.0)
        missed, false_alarms = true - hits, predicted - hits
        rejected = counted - true - false_alarms
        # hits / counted - true * predicted / counted^2, without its cancellation
        covariance = (hits / counted * (rejected / counted) - missed / counted * (false_alarms / counted)).sum()
        spread_true = (true / counted * ((counted - true) / counted)).sum()
        spread_predicted = (predicted / counted * ((counted - predicted) / counted)).sum()
        return ClassificationScores(
            loss=self.loss_sum / total.astype(self.loss_sum.dtype),
            accuracy=hits.sum() / total,
            precision=macro(hits, predicted),
            recall=macro(hits, true),
            f1=macro(2.0 * hits, true + predicted),
            mcc=_ratio(covariance, jnp.sqrt(spread_true) * jnp.sqrt(spread_predicted)),
        )


def confusion(logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None) -> Confusion:
    """Counts predictions and cross entropy of one set of examples.

    Args:
      logits: `[B, K]`; the predicted class is the largest, the first among equals.
      labels: `[B]` integers below `K`; a label outside is no class, and counts as an error.
      mask: `[B]` bool or weights, present where positive; everything by default.

    Returns:
      The confusion; rows outside the mask are not read, whatever they hold.

    Raises:
      TypeError: if the labels are not integers.
      ValueError: if the shapes do not fit.

    Example:
      >>> counted = confusion(jnp.array([[2.0, 0.0], [3.0, 1.0], [0.0, 9.0]]), jnp.array([0, 1, 1]))
      >>> counted.matrix.tolist()
      [[1.0, 0.0], [1.0, 1.0]]
      >>> scores = counted.merge(counted).summarise()
      >>> [round(float(score), 3) for score in (scores.accuracy, scores.precision, scores.recall)]
      [0.667, 0.75, 0.75]
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got dtype {labels.dtype}.")
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits and labels must be [B, K] and [B], got {logits.shape} and {labels.shape}.")
    present = presence(mask, len(labels), name="mask")
    logits = jnp.where(present[:, None], logits.astype(accumulator(logits)), 0.0)
    is_true = jax.nn.one_hot(labels.astype(jnp.int32), logits.shape[1], dtype=bool) & present[:, None]
    is_predicted = jax.nn.one_hot(logits.argmax(axis=1), logits.shape[1], dtype=jnp.float32)
    picked = jnp.where(is_true, jax.nn.log_softmax(logits, axis=1), 0)
    matrix = jnp.matmul(is_true.T.astype(jnp.float32), is_predicted, precision=jax.lax.Precision.HIGHEST)
    return Confusion(matrix=matrix, loss_sum=-picked.sum(), num_examples=present.sum(dtype=jnp.float32))


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Quotient, 0 where the denominator is not positive."""
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1.0), 0.0)
