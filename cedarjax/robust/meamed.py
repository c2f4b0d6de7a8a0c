"""MeaMed and Phocas: of every coordinate the mean of the numbers nearest to a robust centre.

References: Xie et al., `Generalized Byzantine-tolerant SGD <https://arxiv.org/abs/1802.10116>`_, 2018 (mean around
median), and `Phocas: dimensional Byzantine-resilient stochastic gradient descent <https://arxiv.org/abs/1805.09682>`_,
2018 (around the trimmed mean).
"""

from cedarjax.core.types import Aggregator
from cedarjax.robust.columns import from_columns
from cedarjax.robust.order import mean_around_median, mean_around_trimmed_mean
from cedarjax.robust.selection import check_num_byzantine


def meamed(f: int) -> Aggregator:
    """The mean of the `n - f` numbers of every coordinate that are nearest to its median.

    Of numbers equally far, those below the median come first. With `f = 0` it is the mean. Dimensional resilience as
    the median's, with a constant that grows with `n` (Xie et al. 2018). It moves and scales along with the updates.

    Args:
      f: number of attackers to withstand; `2 f < n` for `n` present clients. If only values tell that they are fewer,
        the result is the median, and `info.ok` is False.

    Returns:
      An `Aggregator`, see `from_columns`. Median and mean are weighted; how many are kept is counted in clients.

    Raises:
      ValueError: if `f` is negative (here), or there are too few clients for it (when `update` is traced).
      TypeError: if `f` is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = meamed(f=1)
      >>> updates = {"a": jnp.array([1.0, 2.0, 3.0, 6.0, 900.0])}
      >>> print(rule.update(updates, rule.init({"a": jnp.zeros(())}))[0])
      {'a': Array(3., dtype=float32)}
    """
    check_num_byzantine(f)
    return from_columns(
        lambda block, weights: mean_around_median(block, weights, f),
        min_clients=2 * f + 1,
        condition="2 * f < num_clients",
        f=f,
    )


def phocas(f: int) -> Aggregator:
    """The mean of the `n - f` numbers of every coordinate that are nearest to its trimmed mean.

    As `meamed` in everything else; see `trimmed_mean` for the centre.

    Args:
      f: number of attackers to withstand, and numbers cut off at each end for the centre; `2 f < n`.

    Returns:
      An `Aggregator`, see `from_columns`.

    Raises:
      ValueError: if `f` is negative (here), or there are too few clients for it (when `update` is traced).
      TypeError: if `f` is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = phocas(f=1)
      >>> updates = {"a": jnp.array([1.0, 2.0, 3.0, 6.0, 900.0])}
      >>> print(rule.update(updates, rule.init({"a": jnp.zeros(())}))[0])
      {'a': Array(3., dtype=float32)}
    """
    check_num_byzantine(f)
    return from_columns(
        lambda block, weights: mean_around_trimmed_mean(block, weights, f),
        min_clients=2 * f + 1,
        condition="2 * f < num_clients",
        f=f,
    )
