"""AiFed and TrisaFed: weights that fade with age and grow with what a client's data tell.

References: You, Liu, Wang, Zuo, Chang, Yuen, `AiFed: An Adaptive and Integrated Mechanism for Asynchronous Federated
Data Mining <https://ieeexplore.ieee.org/document/10316646>`_, 2023; You, Liu, Chang, Yuen, `A Triple-Step Asynchronous
Federated Learning Mechanism for Client Activation, Interaction Optimization, and Aggregation Enhancement
<https://ieeexplore.ieee.org/document/9815310>`_, 2022 (TrisaFed).
"""

import math

import jax
import jax.numpy as jnp

from cedarjax.core import Arrival, AsyncServer
from cedarjax.server.buffered import buffered


def aifed(
    richness: jax.Array | None = None,
    *,
    base: float | jax.Array = math.e / 2,
    buffer_size: int | None = None,
    period: float | jax.Array | None = None,
) -> AsyncServer:
    """AiFed: `w_l <- sum_i u_i w_il / sum_i u_i` with `u_i = base^-(t - t_i) n_i richness_i`, layer by layer.

    `t - t_i` is the staleness and `n_i` the weight of the upload, its number of examples. A layer is the mean over
    those that uploaded it; one that nobody uploaded stays.

    Args:
      richness: `[N]`, at least 0: how much a client's data tell, for instance `select.label_entropy`; default: 1 for
        all.
      base: at least 1, how fast weights fade; the papers' is `e / 2`.
      buffer_size: models for one merge; give either this or `period`.
      period: simulated seconds between two merges, see `buffered`.

    Returns:
      An `AsyncServer`; `receipt.coefficient` is `u_i`. Clients of richness 0 change nothing.

    Raises:
      ValueError: if `richness` is not `[N]`, `base` is below 1, and as in `buffered`.

    Example:
      >>> import jax.numpy as jnp
      >>> import cedarjax as cj
      >>> server = aifed(jnp.array([1.0, 3.0]), base=2.0, buffer_size=2)
      >>> state = server.init(jnp.float32(0.0))
      >>> one, start = jnp.float32(1.0), state.params
      >>> for client, staleness in ((0, 0), (1, 1)):
      ...     upload = cj.Upload(jnp.float32(-5.0 * client))
      ...     arrival = cj.core.Arrival(upload, start, jnp.int32(staleness), one, jnp.int32(client), one)
      ...     state, receipt = server.receive(state, arrival)
      >>> print(f"{state.params:.3f} {receipt.coefficient:.1f}")  # 5 * 1.5 / (1 + 1.5)
      3.000 1.5
    """
    if richness is not None and jnp.ndim(richness) != 1:
        raise ValueError(f"richness must be [N], got the shape {jnp.shape(richness)}.")
    if isinstance(base, int | float) and base < 1:
        raise ValueError(f"base must be at least 1, got {base}.")

    def log_weight(arrival: Arrival) -> jax.Array:
        age = jnp.maximum(arrival.staleness.astype(jnp.float32), 0.0)
        faded = -age * jnp.log(jnp.asarray(base, jnp.float32)) + jnp.log(arrival.weight.astype(jnp.float32))
        if richness is None:
            return faded
        return faded + jnp.log(jnp.asarray(richness, jnp.float32).at[arrival.client_id].get(mode="clip"))

    return buffered(log_weight, buffer_size=buffer_size, period=period)
