"""The coordinate-wise trimmed mean.

Reference: Yin et al., `Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates
<https://arxiv.org/abs/1803.01498>`_, 2018; guarantee from Allouah et al., `Fixing by Mixing
<https://arxiv.org/abs/2302.01772>`_, 2023. The mean is taken of what is kept; the sum of all less the extremes would
lose the honest numbers beside a huge one.
"""

from cedarjax.core.types import Aggregator
from cedarjax.robust.columns import from_columns
from cedarjax.robust.order import trimmed_mean_of
from cedarjax.robust.selection import check_num_byzantine


def trimmed_mean(f: int) -> Aggregator:
    """The mean of every coordinate without its `f` smallest and its `f` largest numbers.

    Guarantee: `(f, kappa)`-robust with `kappa <= 6 r (1 + r)`, `r = f / (n - 2 f)`, for equal weights. With `f = 0` it
    is the mean. It moves and scales along with the updates.

    Args:
      f: number of attackers to withstand; `2 f < n` for `n` present clients. If only values tell that they are fewer,
        the result is the median, and `info.ok` is False.

    Returns:
      An `Aggregator`, see `from_columns`. Weights weigh what is kept; how much is cut off is counted in clients.

    Raises:
      ValueError: if `f` is negative (here), or there are too few clients for it (when `update` is traced).
      TypeError: if `f` is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = trimmed_mean(f=1)
      >>> updates = {"a": jnp.array([[1.0, 9.0], [2.0, 3.0], [4.0, 7.0], [900.0, 5.0]])}
      >>> print(rule.update(updates, rule.init({"a": jnp.zeros(2)}))[0])
      {'a': Array([3., 6.], dtype=float32)}
    """
    check_num_byzantine(f)
    return from_columns(
        lambda block, weights: trimmed_mean_of(block, weights, f),
        min_clients=2 * f + 1,
        condition="2 * f < num_clients",
        f=f,
    )
