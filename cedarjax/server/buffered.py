"""Servers whose new model is a weighted mean of the models that arrived since the last one.

FedFD, AFM3D, AiFed and SLMFed differ only in the weights, which are products of powers and exponentials. So they are
given as logarithms and summed as a softmax is in a stream: relative to the largest so far. However late all uploads of
a buffer are, their weights do not vanish together, and the buffer is one model large, not `K`.
"""

from collections.abc import Callable
from typing import NamedTuple

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

LogWeightFn = Callable[[Arrival], jax.Array]


class Buffer(NamedTuple):
    """Models that wait to be merged, as sums relative to the largest weight."""

    sums: Params
    """`sum_i exp(l_i - peak) m_il theta_il`, float32 or wider."""
    masses: PyTree
    """`sum_i exp(l_i - peak) m_il` of each parameter, float32: they differ where clients left layers out."""
    total: jax.Array
    """`sum_i exp(l_i - peak)`, float32 scalar."""
    peak: jax.Array
    """float32 scalar, the largest logarithm of a weight; -inf if there is none."""
    num_models: jax.Array
    """int32 scalar, models in the buffer."""


class BufferedMemory(NamedTuple):
    """What a buffered server keeps."""

    buffer: Buffer
    """Models that arrived since the last merge."""
    tick: jax.Array
    """int32 scalar, ticks of the server's clock that are over; 0 for a server without one."""


def empty_buffer(params: Params) -> Buffer:
    """A buffer without models.

    Args:
      params: the model's.

    Returns:
      A `Buffer`.
    """
    return Buffer(
        sums=jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), accumulator(p)), params),
        masses=jax.tree.map(lambda _: jnp.zeros((), jnp.float32), params),
        total=jnp.zeros((), jnp.float32),
        peak=jnp.full((), -jnp.inf, jnp.float32),
        num_models=jnp.zeros((), jnp.int32),
    )


def add_model(buffer: Buffer, model: Params, mask: PyTree, log_weight: jax.Array) -> Buffer:
    """Adds one model of weight `exp(log_weight)`.

    Args:
      buffer: the models so far.
      model: tree shaped like the parameters.
      mask: tree of scalars in [0, 1], the layers that were uploaded.
      log_weight: float32 scalar; -inf is no weight, and so are NaN and inf.

    Returns:
      A `Buffer`.
    """
    log_weight = jnp.where(log_weight < jnp.inf, log_weight, -jnp.inf)
    peak = jnp.maximum(buffer.peak, log_weight)
    origin = jnp.where(peak > -jnp.inf, peak, jnp.zeros_like(peak))
    before, now = jnp.exp(buffer.peak - origin), jnp.exp(log_weight - origin)
    return Buffer(
        sums=jax.tree.map(
            lambda s, x, m: before.astype(s.dtype) * s + (now * m).astype(s.dtype) * x.astype(s.dtype),
            buffer.sums,
            model,
            mask,
        ),
        masses=jax.tree.map(lambda old, m: before * old + now * m, buffer.masses, mask),
        total=before * buffer.total + now,
        peak=peak,
        num_models=buffer.num_models + 1,
    )


def merged_model(buffer: Buffer, params: Params, kept: PyTree | None = None) -> Params:
    """`(1 - q_l) sum_i w_i m_il theta_il / sum_i w_i m_il + q_l w_l`; `w_l` where nobody uploaded the layer.

    Args:
      buffer: the models.
      params: the server's, `w`.
      kept: tree of scalars in [0, 1], `q`; None is 0.

    Returns:
      Tree shaped like the parameters, in their dtype.
    """
    kept = jax.tree.map(jnp.zeros_like, buffer.masses) if kept is None else kept

    def merge(s: jax.Array, mass: jax.Array, p: jax.Array, q: jax.Array) -> jax.Array:
        mean = s / jnp.where(mass > 0, mass, jnp.ones_like(mass)).astype(s.dtype)
        share = q.astype(s.dtype)
        return jnp.where(mass > 0, ((1 - share) * mean + share * p.astype(s.dtype)).astype(p.dtype), p)

    return jax.tree.map(merge, buffer.sums, buffer.masses, params, kept)


def buffered(
    log_weight_fn: LogWeightFn,
    *,
    buffer_size: int | None = None,
    period: float | jax.Array | None = None,
    kept_fn: Callable[[Params, Buffer], PyTree] | None = None,
) -> AsyncServer:
    """A server that replaces its model by a weighted mean of the models that arrived since the last one.

    It does so after every `buffer_size` uploads, or by its clock every `period` simulated seconds: the tick at time `k
    period` merges what arrived after the tick before and not later than itself. Clients that download at that very time
    still get the old model. A tick without uploads makes no model.

    Args:
      log_weight_fn: `arrival -> logarithm of its weight`, float32 scalar.
      buffer_size: uploads for one merge, at least 1; give either this or `period`.
      period: seconds between two ticks, above 0.
      kept_fn: `(params, buffer) -> q`, tree of scalars in [0, 1]: how much of the old model is kept; default: nothing.

    Returns:
      An `AsyncServer`; `receipt.coefficient` is the weight before it is normalised.

    Raises:
      ValueError: if not exactly one of `buffer_size` and `period` is given, or it is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import cedarjax as cj
      >>> server = buffered(lambda arrival: jnp.log(arrival.weight), buffer_size=2)
      >>> state = server.init(jnp.float32(0.0))
      >>> zero, start = jnp.int32(0), state.params
      >>> for delta, weight in ((-4.0, 1.0), (-8.0, 3.0)):
      ...     upload, weight = cj.Upload(jnp.float32(delta)), jnp.float32(weight)
      ...     state, _ = server.receive(state, cj.core.Arrival(upload, start, zero, weight, zero, jnp.float32(0.0)))
      >>> print(state.params)
      7.0
    """
    if (buffer_size is None) == (period is None):
        raise ValueError(f"exactly one of buffer_size and period must be given, got {buffer_size} and {period}.")
    if buffer_size is not None and buffer_size < 1:
        raise ValueError(f"buffer_size must be at least 1, got {buffer_size}.")
    if isinstance(period, int | float) and period <= 0:
        raise ValueError(f"period must be above 0, got {period}.")

    def merge(state: AsyncServerState) -> AsyncServerState:
        memory: BufferedMemory = state.memory
        kept = None if kept_fn is None else kept_fn(state.params, memory.buffer)
        params = merged_model(memory.buffer, state.params, kept)
        memory = memory._replace(buffer=empty_buffer(params))
        return AsyncServerState(params, state.version + 1, memory)

    def rule(state: AsyncServerState, arrival: Arrival) -> tuple[AsyncServerState, jax.Array]:
        memory: BufferedMemory = state.memory
        log_weight = log_weight_fn(arrival).astype(jnp.float32)
        buffer = add_model(memory.buffer, uploaded_model(arrival), arrival.upload.mask, log_weight)
        state = state._replace(memory=memory._replace(buffer=buffer))
        if buffer_size is not None:
            state = jax.lax.cond(buffer.num_models >= buffer_size, merge, lambda state: state, state)
        return state, jnp.exp(log_weight)

    def advance(state: AsyncServerState, time: jax.Array) -> AsyncServerState:
        # Ticks that are over: the last one before `time`, not the one at it, which still waits for this very moment.
        tick = jnp.maximum(jnp.ceil(time / jnp.asarray(period, time.dtype)) - 1, 0).astype(jnp.int32)
        memory: BufferedMemory = state.memory
        due = (tick > memory.tick) & (memory.buffer.num_models > 0)
        state = state._replace(memory=memory._replace(tick=tick))
        return jax.lax.cond(due, merge, lambda state: state, state)

    def init_memory(params: Params) -> BufferedMemory:
        return BufferedMemory(empty_buffer(params), jnp.zeros((), jnp.int32))

    if period is None:
        return async_server(rule, init_memory)
    return async_server(rule, init_memory, advance)
