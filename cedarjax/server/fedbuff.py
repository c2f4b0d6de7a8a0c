"""FedBuff: the server collects a few uploads and then takes one step.

Reference: Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba, `Federated Learning with Buffered Asynchronous
Aggregation <https://arxiv.org/abs/2106.06639>`_, 2022. The buffer is a running sum: it holds one model, however many
uploads it waits for.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cedarjax.core import Arrival, AsyncServer, AsyncServerState, Params, PyTree, accumulator, async_server, take_info
from cedarjax.server.staleness import StalenessFn, polynomial


class FedBuffMemory(NamedTuple):
    """What `fedbuff` keeps."""

    sums: Params
    """`sum_i w_i s_i delta_i`, float32 or wider."""
    masses: PyTree
    """`sum_i w_i` of each parameter: they differ where clients left layers out."""
    num_uploads: jax.Array
    """int32 scalar, uploads in the buffer."""
    opt_state: PyTree
    """State of the server's optimiser."""


def empty_sums(params: Params) -> tuple[Params, PyTree]:
    """Sums and masses of no uploads.

    Args:
      params: the model's.

    Returns:
      Zeros shaped like the parameters, float32 or wider, and a float32 zero for each.
    """
    sums = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), accumulator(p)), params)
    return sums, jax.tree.map(lambda _: jnp.zeros((), jnp.float32), params)


def fedbuff(
    buffer_size: int, server_tx: optax.GradientTransformation, staleness_fn: StalenessFn | None = None
) -> AsyncServer:
    """FedBuff: after every `K` uploads `w <- w + tx(sum_i w_i s(staleness_i) delta_i / sum_i w_i)`.

    `delta` is a pseudo-gradient, so `optax.sgd(eta_g)` is the paper's step, and any optimiser can stand in its place.
    With equal weights (`weighting="uniform"`) the mean is the paper's `1 / K`. It is not divided by the sum of the
    coefficients: a buffer of late uploads makes a short step. Where clients leave layers out, each layer is the mean
    over those that uploaded it, as in `robust.mean`.

    Args:
      buffer_size: `K`, uploads for one step.
      server_tx: optax optimiser; sees the mean.
      staleness_fn: `s`; default: `polynomial(0.5)`, the paper's `1 / sqrt(1 + staleness)`.

    Returns:
      An `AsyncServer`; `receipt.coefficient` is `s(staleness)`. Memory: one model beside the optimiser's.

    Raises:
      ValueError: if `buffer_size` is not positive.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> server = fedbuff(2, optax.sgd(1.0))
      >>> state = server.init(jnp.float32(0.0))
      >>> zero, one, start = jnp.int32(0), jnp.float32(1.0), state.params
      >>> for delta, staleness in ((-2.0, 0), (-8.0, 3)):
      ...     arrival = cj.core.Arrival(cj.Upload(jnp.float32(delta)), start, jnp.int32(staleness), one, zero, one)
      ...     state, receipt = server.receive(state, arrival)
      ...     print(state.params, receipt.coefficient)
      0.0 1.0
      3.0 0.5
    """
    if buffer_size < 1:
        raise ValueError(f"buffer_size must be at least 1, got {buffer_size}.")
    decay = polynomial(0.5) if staleness_fn is None else staleness_fn

    def init_memory(params: Params) -> FedBuffMemory:
        sums, masses = empty_sums(params)
        return FedBuffMemory(sums, masses, jnp.zeros((), jnp.int32), take_info(server_tx.init(params))[0])

    def take_step(state: AsyncServerState) -> AsyncServerState:
        memory: FedBuffMemory = state.memory
        mean = jax.tree.map(
            lambda s, m, p: (s / jnp.where(m > 0, m, jnp.ones_like(m)).astype(s.dtype)).astype(p.dtype),
            memory.sums,
            memory.masses,
            state.params,
        )
        step, opt_state = server_tx.update(mean, memory.opt_state, state.params)
        after = FedBuffMemory(*empty_sums(state.params), jnp.zeros((), jnp.int32), take_info(opt_state)[0])
        return AsyncServerState(optax.apply_updates(state.params, step), state.version + 1, after)

    def rule(state: AsyncServerState, arrival: Arrival) -> tuple[AsyncServerState, jax.Array]:
        memory: FedBuffMemory = state.memory
        coefficient = decay(arrival.staleness)
        masses = jax.tree.map(lambda m: m * arrival.weight.astype(m.dtype), arrival.upload.mask)
        memory = memory._replace(
            sums=jax.tree.map(
                lambda s, m, d: s + (m * coefficient).astype(s.dtype) * d.astype(s.dtype),
                memory.sums,
                masses,
                arrival.upload.delta,
            ),
            masses=jax.tree.map(jnp.add, memory.masses, masses),
            num_uploads=memory.num_uploads + 1,
        )
        state = state._replace(memory=memory)
        return jax.lax.cond(memory.num_uploads >= buffer_size, take_step, lambda state: state, state), coefficient

    return async_server(rule, init_memory)
