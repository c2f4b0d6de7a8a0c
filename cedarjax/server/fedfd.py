"""FedFD: a mean of the models in the buffer, fresher ones first.

Source: the rule of that name in `GOLF <https://github.com/IntelligentSystemsLab/generic_and_open_learning_federator>`_,
2023. There a client's round may run ahead of the server's, and the weight becomes complex; here a staleness below 0
counts as 0.
"""

import jax
import jax.numpy as jnp

from cedarjax.core import Arrival, AsyncServer
from cedarjax.server.buffered import buffered


def fedfd(*, buffer_size: int | None = None, period: float | jax.Array | None = None) -> AsyncServer:
    """FedFD: `w <- sum_c u_c w_c / sum_c u_c` with `u_c = (V - r_c + 1)^-1/2`.

    `V` is the server's version and `r_c` the one that client `c` downloaded, so `V - r_c` is the staleness. A client's
    weight does not matter.

    Args:
      buffer_size: models for one merge; give either this or `period`.
      period: simulated seconds between two merges, see `buffered`.

    Returns:
      An `AsyncServer`; `receipt.coefficient` is `u_c`.

    Raises:
      ValueError: as in `buffered`.

    Example:
      >>> import jax.numpy as jnp
      >>> import cedarjax as cj
      >>> server = fedfd(buffer_size=2)
      >>> state = server.init(jnp.float32(0.0))
      >>> one, start = jnp.float32(1.0), state.params
      >>> for delta, staleness in ((-3.0, 0), (-9.0, 3)):
      ...     upload, staleness = cj.Upload(jnp.float32(delta)), jnp.int32(staleness)
      ...     state, _ = server.receive(state, cj.core.Arrival(upload, start, staleness, one, jnp.int32(0), one))
      >>> print(f"{state.params:.3f}")  # (3 + 9 / 2) / (1 + 1 / 2)
      5.000
    """

    def log_weight(arrival: Arrival) -> jax.Array:
        return -0.5 * jnp.log1p(jnp.maximum(arrival.staleness.astype(jnp.float32), 0.0))

    return buffered(log_weight, buffer_size=buffer_size, period=period)
