"""AFM3D: at the ticks of its clock the server merges whoever has finished, by a softmax of their age.

Reference: Liu, You, Zhu, Liu, Liu, Yu, Yuen, `AFM3D: An Asynchronous Federated Meta-Learning Framework for Driver
Distraction Detection <https://doi.org/10.1109/TITS.2024.3357138>`_, 2024. Its clients' meta-learning is any of
`cedarjax.meta`.
"""

import jax
import jax.numpy as jnp

from cedarjax.core import Arrival, AsyncServer
from cedarjax.server.buffered import buffered


def afm3d(*, period: float | jax.Array | None = None, buffer_size: int | None = None) -> AsyncServer:
    """AFM3D: `w <- sum_k softmax(e - t)_k w_k` over the clients that have finished.

    `e_k` is the version that client `k` downloaded and `t` the server's, so `e_k - t` is minus the staleness. A
    client's weight does not matter.

    Args:
      period: simulated seconds between two merges, as in the paper; see `buffered`. Give either this or `buffer_size`.
      buffer_size: models for one merge.

    Returns:
      An `AsyncServer`; `receipt.coefficient` is `exp(-staleness)`, but merging does not depend on it: late models
      whose coefficients underflow are merged by their ratio.

    Raises:
      ValueError: as in `buffered`.

    Example:
      >>> import jax.numpy as jnp
      >>> import cedarjax as cj
      >>> server = afm3d(period=10.0)
      >>> state = server.init(jnp.float32(0.0))
      >>> one, start = jnp.float32(1.0), state.params
      >>> for delta in (-2.0, -4.0):
      ...     arrival = cj.core.Arrival(cj.Upload(jnp.float32(delta)), start, jnp.int32(500), one, jnp.int32(0), one)
      ...     state, _ = server.receive(state, arrival)
      >>> print(server.advance(state, jnp.float32(10.0)).params, server.advance(state, jnp.float32(10.5)).params)
      0.0 3.0
    """

    def log_weight(arrival: Arrival) -> jax.Array:
        return -arrival.staleness.astype(jnp.float32)

    return buffered(log_weight, buffer_size=buffer_size, period=period)
