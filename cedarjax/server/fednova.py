"""FedNova's server: the mean of the clients' mean gradients, times the mean of what they did.

Reference: Wang, Liu, Liang, Joshi, Poor, `Tackling the Objective Inconsistency Problem in Heterogeneous Federated
Optimization <https://arxiv.org/abs/2007.07481>`_, 2020; the client's part is `local.fednova`. The server may take any
number of effective steps; `tau_eff = sum_i p_i |a_i|_1` makes it federated averaging where all clients do the same.
"""

import jax
import jax.numpy as jnp
import optax

from cedarjax.core import Params, PyTree


def fednova() -> optax.GradientTransformation:
    """Makes a pseudo-gradient of what `local.fednova` uploads, `d = (sum_i p_i r_i) (sum_i p_i d_i)`.

    `d_i` is a client's mean gradient, `r_i = eta |a_i|_1` its total rate, `p_i` its weight; both sums are what an
    aggregator makes of the uploads.

    Returns:
      An optax transformation, to follow an aggregator and to be followed by an optimiser: `optax.chain(robust.mean(),
      server.fednova(), optax.sgd(1.0))`. It reads a NamedTuple with the fields `params` and `total_rate`, and sets the
      latter to 0.

    Raises:
      TypeError: when `update` is traced, if the updates are not such a NamedTuple.

    Example:
      >>> import jax.numpy as jnp
      >>> import cedarjax as cj
      >>> tx = fednova()
      >>> mean = cj.local.FedNovaShared(params=jnp.array([2.0, 3.0]), total_rate=jnp.float32(0.5))
      >>> print(tx.update(mean, tx.init(mean))[0])
      FedNovaShared(params=Array([1. , 1.5], dtype=float32), total_rate=Array(0., dtype=float32))
    """

    def rescale(updates: PyTree, params: Params | None) -> PyTree:
        del params
        if not {"params", "total_rate"} <= set(getattr(updates, "_fields", ())):
            raise TypeError(
                "updates must be a NamedTuple with the fields params and total_rate, as local.fednova uploads, got "
                f"{type(updates).__name__}."
            )
        gradient = jax.tree.map(
            lambda d, rate: (d.astype(rate.dtype) * rate).astype(d.dtype), updates.params, updates.total_rate
        )
        return updates._replace(params=gradient, total_rate=jax.tree.map(jnp.zeros_like, updates.total_rate))

    return optax.stateless(rescale)
