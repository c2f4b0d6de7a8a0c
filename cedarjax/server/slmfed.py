"""SLMFed's server: means layer by layer, and, asynchronously, the old model where few have spoken.

Reference: You, Guo, Zuo, Chang, Yuen, `SLMFed: A Stage-Based and Layer-Wise Mechanism for Incremental Federated
Learning to Assist Dynamic and Ubiquitous IoT <https://ieeexplore.ieee.org/document/10399971>`_, 2024.

The synchronous rule, `theta_l = sum_{i has l} p_i theta_il / sum_{i has l} p_i` and the old layer where nobody has it,
is FedAvg with masks: `optax.chain(robust.mean(), optax.sgd(1.0))` with the weights `p = select.softmax_indicator(
label_entropy, data_size)` of the clients. `slmfed_async` takes the same weights.

The published code's concave exponential, `1 - exp(-2 e r)`, ends at 0.996 and not at 1; here it is divided by that, so
that all five curves run from 0 at the start to 1 at the target. An accuracy beyond the target counts as the target.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from cedarjax.core import Arrival, AsyncServer, Params, PyTree
from cedarjax.server.buffered import Buffer, buffered

_CURVES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda r: r,
    "convex_quadratic": jnp.square,
    "concave_quadratic": lambda r: 1 - jnp.square(1 - r),
    "convex_exponential": lambda r: jnp.expm1(r) / jnp.expm1(jnp.ones_like(r)),
    "concave_exponential": lambda r: jnp.expm1(-2 * math.e * r) / jnp.expm1(jnp.full_like(r, -2 * math.e)),
}


def slmfed_smoothing(progress: jax.Array | float, curve: str = "linear") -> jax.Array:
    """`g(accuracy / target)`: how firmly the old model is held, from 0 at the start to 1 at the target.

    `r`; `r^2` and `1 - (1 - r)^2`; `(e^r - 1) / (e - 1)` and `(1 - e^(-2 e r)) / (1 - e^(-2 e))`.

    Args:
      progress: `r = accuracy / target`, clipped to [0, 1]; NaN counts as 0.
      curve: `"linear"`, `"convex_quadratic"`, `"concave_quadratic"`, `"convex_exponential"` or
        `"concave_exponential"`.

    Returns:
      float32, shaped like `progress`, in [0, 1].

    Raises:
      ValueError: if there is no such curve.

    Example:
      >>> print(slmfed_smoothing(0.5), slmfed_smoothing(0.5, "convex_quadratic"), slmfed_smoothing(2.0))
      0.5 0.25 1.0
    """
    if curve not in _CURVES:
        raise ValueError(f"curve must be one of {tuple(_CURVES)}, got {curve!r}.")
    progress = jnp.asarray(progress, jnp.float32)
    return _CURVES[curve](jnp.where(progress > 0, jnp.minimum(progress, 1.0), 0.0))


def slmfed_async(
    accuracy_fn: Callable[[Params], jax.Array],
    target: float | jax.Array,
    *,
    curve: str = "linear",
    total_weight: float | jax.Array | None = None,
    buffer_size: int | None = None,
    period: float | jax.Array | None = None,
) -> AsyncServer:
    """SLMFed, asynchronous: `theta_l <- (1 - q_l) mean_l + q_l theta_l` with `q_l = (1 - P_l) g(accuracy / target)`.

    `mean_l` weighs the models that uploaded layer `l` by `p_i`, the weights of their uploads, and `P_l` is the part of
    all weight that they have. Where nobody uploaded a layer it stays.

    Args:
      accuracy_fn: `params -> accuracy` of the server's model before the merge, a scalar.
      target: accuracy that is wanted, above 0.
      curve: `g`, see `slmfed_smoothing`.
      total_weight: what `P_l` is a part of. Default: the weights in the buffer, as in the published code, so that `P_l`
        is below 1 only where clients left the layer out. The sum of the weights of the federation (1 for
        `select.softmax_indicator` over all clients) makes `P_l` say how much of the federation has spoken.
      buffer_size: models for one merge; give either this or `period`.
      period: simulated seconds between two merges, see `buffered`.

    Returns:
      An `AsyncServer`; `receipt.coefficient` is `p_i`.

    Raises:
      ValueError: if `target` or `total_weight` is not positive, there is no such curve, and as in `buffered`.

    Example:
      >>> import jax.numpy as jnp
      >>> import cedarjax as cj
      >>> server = slmfed_async(lambda w: jnp.float32(0.4), 0.8, total_weight=1.0, buffer_size=1)
      >>> state, zero = server.init(jnp.float32(0.0)), jnp.int32(0)
      >>> upload = cj.Upload(jnp.float32(-8.0))
      >>> arrival = cj.core.Arrival(upload, state.params, zero, jnp.float32(0.5), zero, jnp.float32(0.0))
      >>> state, _ = server.receive(state, arrival)
      >>> print(state.params)  # q = (1 - 0.5) * 0.4 / 0.8
      6.0
    """
    slmfed_smoothing(0.0, curve)
    for name, value in (("target", target), ("total_weight", total_weight)):
        if isinstance(value, int | float) and value <= 0:
            raise ValueError(f"{name} must be above 0, got {value}.")

    def log_weight(arrival: Arrival) -> jax.Array:
        return jnp.log(arrival.weight.astype(jnp.float32))

    def kept(params: Params, buffer: Buffer) -> PyTree:
        accuracy = jnp.asarray(accuracy_fn(params), jnp.float32)
        firmness = slmfed_smoothing(accuracy / jnp.asarray(target, jnp.float32), curve)
        if total_weight is None:
            whole = buffer.total
        else:
            whole = jnp.asarray(total_weight, jnp.float32) * jnp.exp(-buffer.peak)
        return jax.tree.map(lambda mass: (1 - jnp.clip(mass / whole, 0.0, 1.0)) * firmness, buffer.masses)

    return buffered(log_weight, buffer_size=buffer_size, period=period, kept_fn=kept)
