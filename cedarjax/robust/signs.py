"""Rules on the signs of every coordinate: majority vote, the robust learning rate, and RSA's penalty.

References: Bernstein et al., `signSGD with majority vote is communication efficient and fault tolerant
<https://arxiv.org/abs/1810.05291>`_, 2019; Ozdayi et al., `Defending against backdoors in federated learning with
robust learning rate <https://arxiv.org/abs/2007.03767>`_, 2021; Li et al., `RSA: Byzantine-robust stochastic
aggregation methods <https://arxiv.org/abs/1811.03761>`_, 2019.
"""

import jax
import jax.numpy as jnp

from cedarjax.core.dtypes import accumulator
from cedarjax.core.types import Aggregator
from cedarjax.robust.columns import from_columns

_HIGHEST = jax.lax.Precision.HIGHEST


def _votes(block: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted sum of the signs of each column; 0 for absent clients."""
    dtype = accumulator(block)
    signs = jnp.where((weights > 0)[:, None], jnp.sign(block.astype(dtype)), 0)
    return jnp.matmul(jnp.where(weights > 0, weights, 0).astype(dtype), signs, precision=_HIGHEST)


def sign_majority() -> Aggregator:
    """The sign of the weighted sum of signs, in {-1, 0, 1}: 0 on a draw or where all numbers are 0.

    One client moves a coordinate by no more than its vote, whatever it sends. The length of the update is lost: use it
    with a server learning rate of its own. It is not the mean for `f = 0` and does not move along with the updates.

    Returns:
      An `Aggregator`, see `from_columns`.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = sign_majority()
      >>> updates = {"a": jnp.array([[1.0, -900.0], [2.0, 0.1], [-5.0, 0.2]])}
      >>> print(rule.update(updates, rule.init({"a": jnp.zeros(2)}))[0])
      {'a': Array([1., 1.], dtype=float32)}
    """
    return from_columns(lambda block, weights: jnp.sign(_votes(block, weights)))


def rlr(threshold: float) -> Aggregator:
    """The weighted mean, with the sign of every coordinate reversed where too few clients agree on its direction.

    `update_k = mean_k if |sum_i sign(x_ik)| >= threshold else -mean_k`; votes are counted in clients.

    Args:
      threshold: net number of clients that must agree, at least 0; the paper asks for more than the attackers. With 0
        it is the mean.

    Returns:
      An `Aggregator`, see `from_columns`.

    Raises:
      ValueError: if `threshold` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = rlr(threshold=3)
      >>> updates = {"a": jnp.array([[1.0, -9.0], [2.0, 1.0], [3.0, 2.0]])}
      >>> print(rule.update(updates, rule.init({"a": jnp.zeros(2)}))[0])
      {'a': Array([2., 2.], dtype=float32)}
    """
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}.")

    def rule(block: jax.Array, weights: jax.Array) -> jax.Array:
        dtype = accumulator(block)
        kept = jnp.where(weights > 0, weights, 0).astype(dtype)
        rows = jnp.where((weights > 0)[:, None], block.astype(dtype), 0)
        mean = jnp.matmul(kept / jnp.where(kept.sum() > 0, kept.sum(), 1), rows, precision=_HIGHEST)
        agreed = jnp.abs(_votes(block, (weights > 0).astype(dtype))) >= threshold
        return jnp.where(agreed, mean, -mean)

    return from_columns(rule)


def rsa(penalty: float) -> Aggregator:
    """The server's step of RSA with the l1 penalty: `penalty * sum_i w_i sign(x_i)`.

    Updates are `shared - client`, so this is the subgradient of `penalty * sum_i w_i |shared - client_i|_1`; the loss
    of the server's own data, if it has any, is added by the caller. An attacker's influence on a coordinate is
    `penalty`, whatever it sends.

    Args:
      penalty: the paper's lambda, above 0; with weights `n_i` of clients it counts for each unit of weight.

    Returns:
      An `Aggregator`, see `from_columns`; its result does not shrink with the number of clients.

    Raises:
      ValueError: if `penalty` is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = rsa(penalty=0.5)
      >>> updates = {"a": jnp.array([[1.0, -900.0], [2.0, 0.1], [-5.0, 0.2]])}
      >>> print(rule.update(updates, rule.init({"a": jnp.zeros(2)}))[0])
      {'a': Array([0.5, 0.5], dtype=float32)}
    """
    if not penalty > 0:
        raise ValueError(f"penalty must be above 0, got {penalty}.")
    return from_columns(lambda block, weights: penalty * _votes(block, weights))
