"""FedAsync: the server mixes every model that arrives into its own.

Reference: Xie, Koyejo, Gupta, `Asynchronous Federated Optimization <https://arxiv.org/abs/1903.03934>`_, 2019. The
paper's client adds a proximal term of strength `rho`: that is `local.prox(rho, ...)`. Its bound on the staleness is
`max_staleness` of `core.simulation`.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp

from cedarjax.core import (
    Arrival,
    AsyncServer,
    AsyncServerState,
    Params,
    PyTree,
    accumulator,
    async_server,
    uploaded_model,
)
from cedarjax.server.staleness import StalenessFn, polynomial

Scalar: TypeAlias = float | jax.Array


def mix_model(params: Params, model: Params, mask: PyTree, rate: jax.Array) -> Params:
    """`w_l <- (1 - a m_l) w_l + a m_l w_kl`, layer by layer.

    Args:
      params: the server's, `w`.
      model: the client's, `w_k`.
      mask: tree of scalars in [0, 1], the layers that were uploaded.
      rate: `a`, scalar between 0 and 1.

    Returns:
      Tree shaped like `params`, in its dtype.
    """

    def mix(w: jax.Array, own: jax.Array, m: jax.Array) -> jax.Array:
        dtype = accumulator(w, own)
        a = rate.astype(dtype) * m.astype(dtype)
        return ((1 - a) * w.astype(dtype) + a * own.astype(dtype)).astype(w.dtype)

    return jax.tree.map(mix, params, model, mask)


def fedasync(alpha: Scalar, staleness_fn: StalenessFn | None = None) -> AsyncServer:
    """FedAsync: `w <- (1 - a_t) w + a_t w_k` with `a_t = alpha s(staleness)`, a new model for every upload.

    `w_k` is the model that the client trained. Its weight does not matter, as in the paper.

    Args:
      alpha: mixing rate of a fresh upload, above 0 and at most 1.
      staleness_fn: `s`; default: `polynomial(0.5)`.

    Returns:
      An `AsyncServer`; `receipt.coefficient` is `a_t`.

    Raises:
      ValueError: if `alpha` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import cedarjax as cj
      >>> server = fedasync(0.5, cj.server.polynomial(1.0))
      >>> state = server.init(jnp.float32(0.0))
      >>> upload = cj.Upload(jnp.float32(-8.0))  # from 0 to 8
      >>> arrival = cj.core.Arrival(
      ...     upload, state.params, jnp.int32(1), jnp.float32(1.0), jnp.int32(0), jnp.float32(0.0)
      ... )
      >>> state, receipt = server.receive(state, arrival)
      >>> print(state.params, receipt.coefficient)
      2.0 0.25
    """
    if isinstance(alpha, int | float) and not 0 < alpha <= 1:
        raise ValueError(f"alpha must satisfy 0 < alpha <= 1, got {alpha}.")
    decay = polynomial(0.5) if staleness_fn is None else staleness_fn

    def rule(state: AsyncServerState, arrival: Arrival) -> tuple[AsyncServerState, jax.Array]:
        rate = jnp.asarray(alpha, jnp.float32) * decay(arrival.staleness)
        params = mix_model(state.params, uploaded_model(arrival), arrival.upload.mask, rate)
        return state._replace(params=params, version=state.version + 1), rate

    return async_server(rule)
