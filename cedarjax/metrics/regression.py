"""Regression metrics from moments, which mask and merge without cancellation.

Spread about the mean is kept, not sums of squares, and merged pairwise (Chan, Golub and LeVeque, `Updating Formulae
and a Pairwise Algorithm for Computing Sample Variances <https://doi.org/10.1007/978-3-642-51461-6_3>`_, 1982). Scores
agree with scikit-learn; several targets are averaged uniformly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core.dtypes import accumulator
from cedarjax.metrics.presence import presence


class RegressionScores(NamedTuple):
    """Scores of one set of examples, scalars; all 0 when the set is empty."""

    mse: jax.Array
    """Mean squared error."""
    mae: jax.Array
    """Mean absolute error."""
    r2: jax.Array
    """`1 - squared error / spread of the targets`; of a constant target 1 if every prediction is exact, else 0.

    A single example gives 0, where scikit-learn warns and gives NaN.
    """


class Moments(NamedTuple):
    """What has to be kept of examples with `O` targets to score them."""

    num_examples: jax.Array
    """float32 scalar, examples counted."""
    target_mean: jax.Array
    """`[O]`, mean of the targets, 0 if there is no example."""
    target_spread: jax.Array
    """`[O]`, sum of squared distances of the targets from their mean."""
    squared_error: jax.Array
    """`[O]`, sum of squared errors."""
    absolute_error: jax.Array
    """`[O]`, sum of absolute errors."""

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets of examples together."""
        return jax.tree.map(lambda a, b: jnp.stack([a, b]), self, other).pool()

    def pool(self) -> "Moments":
        """Moments of all sets together, for leaves with a leading axis (clients, batches)."""
        total, mean, offset = _centre(self.target_mean, self.num_examples)
        between = self.num_examples.astype(offset.dtype)[:, None] * jnp.square(offset)
        return Moments(
            num_examples=total,
            target_mean=mean,
            target_spread=(self.target_spread + between).sum(axis=0),
            squared_error=self.squared_error.sum(axis=0),
            absolute_error=self.absolute_error.sum(axis=0),
        )

    def summarise(self) -> RegressionScores:
        """Scores of the examples counted."""
        total = jnp.maximum(self.num_examples, 1.0).astype(self.squared_error.dtype)
        varies = self.target_spread > 0
        explained = 1.0 - self.squared_error / jnp.where(varies, self.target_spread, 1.0)
        exact = (self.squared_error == 0).astype(explained.dtype)
        r2 = jnp.where(varies, explained, exact).mean()
        return RegressionScores(
            mse=(self.squared_error / total).mean(),
            mae=(self.absolute_error / total).mean(),
            r2=jnp.where(self.num_examples > 1, r2, 0),
        )


def moments(predictions: jax.Array, targets: jax.Array, mask: jax.Array | None = None) -> Moments:
    """Takes the moments of one set of examples.

    Args:
      predictions: `[B]`, or `[B, O]` for several targets.
      targets: as many numbers as `predictions`; `[B]` and `[B, 1]` may meet.
      mask: `[B]` bool or weights, present where positive; everything by default.

    Returns:
      The moments, with `O = 1` for `[B]`; rows outside the mask are not read, whatever they hold.

    Raises:
      ValueError: if the shapes do not fit.

    Example:
      >>> taken = moments(jnp.array([1.0, 2.0, 5.0, 9.9]), jnp.array([1.0, 3.0, 5.0, 7.0]), jnp.array([1, 1, 1, 0]))
      >>> {name: round(float(score), 3) for name, score in taken.summarise()._asdict().items()}
      {'mse': 0.333, 'mae': 0.333, 'r2': 0.875}
    """
    rows = targets.shape[:1]
    if targets.ndim not in (1, 2) or predictions.shape[:1] != rows or predictions.size != targets.size:
        raise ValueError(
            f"predictions and targets must both be [B] or [B, O], got {predictions.shape}, {targets.shape}."
        )
    num_targets = 1 if targets.ndim == 1 else targets.shape[1]
    dtype = accumulator(predictions, targets)
    present = presence(mask, rows[0], name="mask")
    targets = jnp.where(present[:, None], targets.reshape(-1, num_targets).astype(dtype), 0)
    predictions = jnp.where(present[:, None], predictions.reshape(-1, num_targets).astype(dtype), 0)
    total, mean, offset = _centre(targets, present.astype(jnp.float32))
    error = predictions - targets
    return Moments(
        num_examples=total,
        target_mean=mean,
        target_spread=jnp.where(present[:, None], jnp.square(offset), 0).sum(axis=0),
        squared_error=jnp.square(error).sum(axis=0),
        absolute_error=jnp.abs(error).sum(axis=0),
    )


def _centre(values: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Total weight, weighted mean `[O]` of `values [B, O]`, and their offsets from it `[B, O]`.

    Offsets are taken from the first present value before they are averaged, so that equal values have offset 0
    exactly.
    """
    total = weights.sum()
    first = values[jnp.argmax(weights > 0)]
    shifted = values - first[None]
    share = (weights / jnp.maximum(total, 1.0)).astype(values.dtype)
    shift = jnp.where(weights[:, None] > 0, share[:, None] * shifted, 0).sum(axis=0)
    return total, jnp.where(total > 0, first + shift, 0), shifted - shift[None]
