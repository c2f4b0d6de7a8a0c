"""FedNova's client: uploads what it did per unit of work, so that more steps are not more influence.

Reference: Wang, Liu, Liang, Joshi, Poor, `Tackling the Objective Inconsistency Problem in Heterogeneous Federated
Optimization <https://arxiv.org/abs/2007.07481>`_, 2020; the server's part is `server.fednova`.

An optimiser that is linear in the gradients moves a client by `x - y_i = eta sum_k a_ik g_ik`. The paper writes down
`|a_i|_1` for three of them::

    SGD of tau steps            tau
    with momentum rho           (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho)
    with a proximal term mu     (1 - (1 - eta mu)^tau) / (eta mu)

Here `eta |a_i|_1` is found by running the same optimiser once more, on numbers whose gradient is always 1. That gives
these three values, and those of momentum with a proximal term, of Nesterov's momentum, of schedules, and of rates that
differ between layers, without a formula for each. With a proximal term the published code takes plain numbers of steps
for the server's `tau_eff`; here it is the mean of `|a_i|_1` throughout.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cedarjax.core import (
    ClientData,
    Epochs,
    LocalInfo,
    LocalUpdate,
    LossFn,
    NumStepsFn,
    Params,
    PyTree,
    Upload,
    accumulator,
    masked_scan,
)
from cedarjax.local.sgd import prox


class FedNovaShared(NamedTuple):
    """What the server broadcasts, and, as an upload, what a client did."""

    params: Params
    """The model's parameters; uploaded: the client's mean gradient, `(x - y_i) / total_rate`."""
    total_rate: PyTree
    """A scalar a parameter array, always 0; uploaded: `eta |a_i|_1`, how far a constant gradient of 1 goes."""


def total_rate(
    tx: optax.GradientTransformation,
    params: Params,
    num_steps: jax.Array,
    max_steps: int,
    mu: float | jax.Array = 0.0,
) -> PyTree:
    """How far an optimiser goes along a gradient of 1, `eta |a|_1`.

    Args:
      tx: optax optimiser that treats every number of an array alike.
      params: parameters, for their structure and dtypes.
      num_steps: int32 scalar, steps to do.
      max_steps: static bound on them.
      mu: strength of a proximal term.

    Returns:
      Tree shaped like `params` with a scalar for every array, float32 or wider.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> print(total_rate(optax.sgd(0.5, momentum=0.5), jnp.zeros(3), jnp.int32(2), max_steps=9))
      1.25
    """
    start = jax.tree.map(lambda p: jnp.zeros((), accumulator(p)), params)

    def step(carry: tuple[PyTree, PyTree], index: jax.Array) -> tuple[tuple[PyTree, PyTree], jax.Array]:
        at, opt_state = carry
        grads = jax.tree.map(lambda x: jnp.ones_like(x) + jnp.asarray(mu, x.dtype) * x, at)
        updates, opt_state = tx.update(grads, opt_state, at)
        return (optax.apply_updates(at, updates), opt_state), jnp.zeros((), jnp.float32)

    (end, _), _ = masked_scan(step, (start, tx.init(start)), num_steps, max_steps)
    return jax.tree.map(jnp.negative, end)


def fednova(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    mu: float | jax.Array = 0.0,
    batch_size: int,
    num_epochs: int = 1,
    num_steps_fn: NumStepsFn | None = None,
) -> LocalUpdate:
    """Local epochs as in `local.prox`, uploaded as a mean gradient `(x - y_i) / (eta |a_i|_1)` and its `eta |a_i|_1`.

    The server's part goes with it: `optax.chain(robust.mean(), server.fednova(), optax.sgd(1.0))` does `x <- x -
    (sum_i p_i eta |a_i|_1) sum_i p_i (x - y_i) / (eta |a_i|_1)`. Where all clients do the same work this is federated
    averaging; where they do not, the fixed point is still that of `sum_i p_i loss_i`, to first order in the rate.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      tx: optax optimiser, linear in the gradients: SGD, momentum, schedules, rates by layer. For others (Adam) the
        work is what they do along a constant gradient, which is no more than an estimate.
      mu: strength of FedProx's pull towards the received parameters, at least 0.
      batch_size: examples per batch.
      num_epochs: passes over the client's examples.
      num_steps_fn: as in `core.Epochs`; a client that does no step uploads zeros, as in federated averaging.

    Returns:
      A `LocalUpdate` that shares a `FedNovaShared`, without client state, info `LocalInfo`.

    Raises:
      ValueError: if a count is not positive or `mu` negative.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> loss_fn = lambda w, x, key: jnp.mean(w * x)  # the gradient is the mean of the rows
      >>> local = fednova(loss_fn, optax.sgd(0.5), batch_size=1, num_epochs=3)
      >>> data = cj.ClientData(jnp.array([4.0]), num_examples=jnp.int32(1), num_support=jnp.int32(1))
      >>> upload, _, _ = local.update(local.share(jnp.float32(0.0)), (), data, jax.random.key(0))
      >>> print(upload.delta.params, upload.delta.total_rate)
      4.0 1.5
    """
    inner = prox(mu, loss_fn, tx, batch_size=batch_size, num_epochs=num_epochs, num_steps_fn=num_steps_fn)
    epochs = Epochs(batch_size, num_epochs)

    def share(params: Params) -> FedNovaShared:
        return FedNovaShared(params, jax.tree.map(lambda p: jnp.zeros((), accumulator(p)), params))

    def model(shared: FedNovaShared, state: tuple) -> Params:
        return shared.params

    def update(
        shared: FedNovaShared, state: tuple, data: ClientData, key: jax.Array
    ) -> tuple[Upload, tuple, LocalInfo]:
        upload, state, info = inner.update(shared.params, state, data, key)
        rates = total_rate(tx, shared.params, info.num_steps, epochs.max_steps(data), mu)

        def per_unit(moved: jax.Array, rate: jax.Array) -> jax.Array:
            still = rate == 0
            mean = moved.astype(rate.dtype) / jnp.where(still, jnp.ones_like(rate), rate)
            return jnp.where(still, jnp.zeros_like(mean), mean).astype(moved.dtype)

        return Upload(FedNovaShared(jax.tree.map(per_unit, upload.delta, rates), rates)), state, info

    return LocalUpdate(inner.init, update, share, model)
