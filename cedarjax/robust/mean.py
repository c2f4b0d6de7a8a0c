"""The weighted mean of the clients' updates.

Reference: McMahan et al., `Communication-Efficient Learning of Deep Networks from Decentralized Data
<https://arxiv.org/abs/1602.05629>`_, 2017. It resists no attack: one client can move it anywhere.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cedarjax.core.client_mean import client_mean
from cedarjax.core.types import Aggregator, PyTree


class MeanState(NamedTuple):
    """State of `mean`."""

    num_nonfinite: jax.Array
    """int32 scalar, uploads left out so far because they were not finite, summed over rounds."""


def mean() -> Aggregator:
    """Weighted mean over clients, layer by layer.

    `update_l = sum_i w_il x_il / sum_i w_il`, and 0 where nobody uploaded layer `l`. A client whose upload is not
    finite is absent.

    Returns:
      An `Aggregator` that reads `weights=` (`[C]`, a tree of `[C]` leaves, or `None` for equal weights) and `mesh=`.
      Same dtype out as in. Absent clients may hold anything; no copy of the `[C, D]` updates is made while everything
      is finite.

    Raises:
      ValueError: when `update` is traced, if the client axes or structures disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = mean()
      >>> updates = {"a": jnp.array([[1.0, 2.0], [4.0, 5.0], [jnp.inf, 0.0]])}
      >>> update, state = rule.update(updates, rule.init({"a": jnp.zeros(2)}), weights=jnp.array([2.0, 1.0, 1.0]))
      >>> print(update, state)
      {'a': Array([2., 3.], dtype=float32)} MeanState(num_nonfinite=Array(1, dtype=int32))
    """

    def init(params: PyTree) -> MeanState:
        del params
        return MeanState(jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree,
        state: MeanState,
        params: PyTree | None = None,
        *,
        weights: PyTree | None = None,
        mesh: Mesh | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, MeanState]:
        del params, extra_args
        found = client_mean(updates, weights, mesh=mesh)
        return found.mean, MeanState(state.num_nonfinite + found.num_nonfinite)

    return optax.GradientTransformationExtraArgs(init, update)
