"""The contract of a server that takes uploads one by one, whenever they arrive.

A client downloads a model, works, and uploads; meanwhile the server may have made newer models. How many is the
*staleness* of the upload. What a server does with an upload that is late is a rule of `cedarjax.server`; who uploads
when is told by `core.simulation`, or by the user's own loop.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core.dtypes import accumulator
from cedarjax.core.lowrank.node import dense
from cedarjax.core.types import Params, PyTree, Shared, Upload


class AsyncServerState(NamedTuple):
    """What an asynchronous server needs to go on."""

    params: Shared
    """What a client that asks now downloads."""
    version: jax.Array
    """int32 scalar, models made so far; the first model is version 0."""
    memory: PyTree = ()
    """What the rule keeps besides: running sums, the state of an optimiser."""


class Arrival(NamedTuple):
    """One upload, at the moment that it reaches the server."""

    upload: Upload
    """`delta = shared - shared_after`, leaves shaped like the parameters, and the mask of the layers that were sent."""
    shared: Shared
    """What the client started from: the model that it downloaded, however old."""
    staleness: jax.Array
    """int32 scalar, the server's version now minus the version that was downloaded; at least 0."""
    weight: jax.Array
    """float scalar, for instance the client's number of examples; 0 or less means that there is no upload."""
    client_id: jax.Array
    """int32 scalar."""
    time: jax.Array
    """Float scalar, simulated seconds since the start."""
    info: PyTree = ()
    """What the client's training told."""


class Receipt(NamedTuple):
    """What a server tells of one arrival."""

    accepted: jax.Array
    """Bool scalar; False for an upload that is not finite or without weight, which leaves the server as it was."""
    coefficient: jax.Array
    """float32 scalar, how much the rule let the upload count; 0 if it was not accepted."""
    merged: jax.Array
    """Bool scalar, whether a new model was made."""


class AsyncServer(NamedTuple):
    """A server of single arrivals as pure functions, without jit; `async_server` makes one of a rule."""

    init: Callable[[Params], AsyncServerState]
    """`init(params) -> state`, version 0."""
    receive: Callable[[AsyncServerState, Arrival], tuple[AsyncServerState, Receipt]]
    """`receive(state, arrival) -> (state, receipt)`."""
    advance: Callable[[AsyncServerState, jax.Array], AsyncServerState] = lambda state, time: state
    """`advance(state, time) -> state`: what happens by the clock alone before whatever happens at `time`; called at
    times that never decrease, before the staleness is taken. Servers without a clock return the state."""


def finite_upload(upload: Upload) -> jax.Array:
    """Whether all that was really uploaded is finite.

    Args:
      upload: one client's; layers with a mask of 0 may hold anything.

    Returns:
      Bool scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> print(finite_upload(Upload({"a": jnp.nan, "b": jnp.ones(2)}, {"a": jnp.float32(0), "b": jnp.float32(1)})))
      True
    """
    finite = jax.tree.map(lambda d: jnp.isfinite(d).all(), dense(upload.delta))
    if upload.mask is not None:
        finite = jax.tree.map(lambda f, m: jnp.where(m == 0, True, f & jnp.isfinite(m)), finite, upload.mask)
    return jnp.stack(jax.tree.leaves(finite)).all()


def uploaded_model(arrival: Arrival) -> Params:
    """The model that the client trained, `shared - delta`, in float32 or wider.

    Args:
      arrival: one arrival.

    Returns:
      Tree shaped like the parameters.
    """
    return jax.tree.map(
        lambda s, d: s.astype(accumulator(s)) - d.astype(accumulator(s)), arrival.shared, arrival.upload.delta
    )


def _complete(arrival: Arrival) -> Arrival:
    """The same with arrays for factors, a mask for every leaf, and zeros where nothing was uploaded."""
    delta, mask = dense(arrival.upload.delta), arrival.upload.mask
    if mask is None:
        mask = jax.tree.map(lambda _: jnp.ones((), jnp.float32), delta)
    mask = jax.tree.map(lambda m: m.astype(jnp.float32), mask)
    delta = jax.tree.map(lambda d, m: jnp.where(m == 0, jnp.zeros_like(d), d), delta, mask)
    return arrival._replace(upload=Upload(delta, mask))


def async_server(
    rule: Callable[[AsyncServerState, Arrival], tuple[AsyncServerState, jax.Array]],
    init_memory: Callable[[Params], PyTree] = lambda params: (),
    advance: Callable[[AsyncServerState, jax.Array], AsyncServerState] = lambda state, time: state,
) -> AsyncServer:
    """Makes an `AsyncServer` of a rule, which then need not think of uploads that are broken or incomplete.

    The rule sees finite uploads of positive weight only, as arrays, with a float32 mask for every leaf and zeros where
    the mask is 0. An upload that is not so leaves the state as it was.

    Args:
      rule: `(state, arrival) -> (state, coefficient)`; raises the version when it makes a model.
      init_memory: what `state.memory` is at first.
      advance: as in `AsyncServer`.

    Returns:
      An `AsyncServer`. Its `init` returns buffers of its own, so that the state can be donated.

    Example:
      >>> import jax.numpy as jnp
      >>> def newest(state, arrival):
      ...     return state._replace(params=uploaded_model(arrival), version=state.version + 1), jnp.float32(1.0)
      >>> server = async_server(newest)
      >>> state, none = server.init(jnp.float32(5.0)), jnp.int32(0)
      >>> arrival = Arrival(Upload(jnp.float32(2.0)), state.params, none, jnp.float32(1.0), none, jnp.float32(0.0))
      >>> state, receipt = server.receive(state, arrival)
      >>> print(state.params, state.version, receipt.accepted)
      3.0 1 True
    """

    def own(x: jax.Array) -> jax.Array:
        # The explicit dtype makes a weak type strong, so that the carry of a scan keeps its type.
        return jnp.array(x, dtype=jnp.result_type(x), copy=True)

    def init(params: Params) -> AsyncServerState:
        params = jax.tree.map(own, params)
        return AsyncServerState(params, jnp.zeros((), jnp.int32), jax.tree.map(own, init_memory(params)))

    def receive(state: AsyncServerState, arrival: Arrival) -> tuple[AsyncServerState, Receipt]:
        def accept() -> tuple[AsyncServerState, jax.Array]:
            after, coefficient = rule(state, _complete(arrival))
            return after, jnp.asarray(coefficient, jnp.float32)

        def refuse() -> tuple[AsyncServerState, jax.Array]:
            return state, jnp.zeros((), jnp.float32)

        weight = jnp.asarray(arrival.weight)
        accepted = finite_upload(arrival.upload) & jnp.isfinite(weight) & (weight > 0)
        after, coefficient = jax.lax.cond(accepted, accept, refuse)
        return after, Receipt(accepted, coefficient, after.version > state.version)

    return AsyncServer(init, receive, advance)
