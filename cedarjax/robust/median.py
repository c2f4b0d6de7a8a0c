"""The coordinate-wise median.

Reference: Yin et al., `Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates
<https://arxiv.org/abs/1803.01498>`_, 2018; guarantee from Allouah et al., `Fixing by Mixing
<https://arxiv.org/abs/2302.01772>`_, 2023.
"""

from cedarjax.core.types import Aggregator
from cedarjax.robust.columns import from_columns
from cedarjax.robust.order import median_of


def median() -> Aggregator:
    """The weighted median of every coordinate; midway between the two middle numbers where the mass is cut in half.

    Guarantee: `(f, kappa)`-robust with `kappa <= 4 (1 + f / (n - 2 f))^2` for every `f < n / 2` at once, for equal
    weights. It moves and scales along with the updates.

    Returns:
      An `Aggregator` that reads `weights=` (`[C]`, a tree of `[C]` leaves, or `None` for equal weights) and `mesh=`;
      see `from_columns`.

    Raises:
      ValueError: when `update` is traced, if the client axes or structures disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = median()
      >>> updates = {"a": jnp.array([[1.0, 9.0], [2.0, 3.0], [900.0, 5.0]])}
      >>> print(rule.update(updates, rule.init({"a": jnp.zeros(2)}))[0])
      {'a': Array([2., 5.], dtype=float32)}
    """
    return from_columns(median_of)
