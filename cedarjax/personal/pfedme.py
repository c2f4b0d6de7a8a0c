"""pFedMe: the shared model minimises the mean of the clients' Moreau envelopes.

Reference: Dinh, Tran, Nguyen, `Personalized Federated Learning with Moreau Envelopes
<https://arxiv.org/abs/2006.08848>`_, 2020. The paper asks for a personal model that is exact to some accuracy and
leaves open where its search begins; here it begins at the client's copy of the shared model, the centre of the pull, in
every local round. The published code adds weight decay to that search, and goes on from the personal model of the last
local round; this file does neither.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cedarjax.core import (
    ClientData,
    LocalInfo,
    LocalUpdate,
    LossFn,
    Params,
    PyTree,
    Upload,
    check_positive,
    displacement,
    masked_scan,
    optimiser_step,
    pull_towards,
    shuffled_epochs,
    take_batch,
)


class PFedMeState(NamedTuple):
    """What a client keeps."""

    personal: Params
    """Its own model, `theta`; only deployed, the next round does not read it."""


def pfedme(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    lam: float | jax.Array,
    eta: float | jax.Array,
    *,
    num_rounds: int,
    num_steps: int,
    batch_size: int,
) -> LocalUpdate:
    """Local rounds of gradient descent on the Moreau envelope of the client's loss.

    `w_i` starts at what was received. In each local round, on a fresh batch,
    `theta ~ argmin f(theta; batch) + lam / 2 ||theta - w_i||^2` by `num_steps` steps of `tx` from `w_i`, and then
    `w_i <- w_i - eta lam (w_i - theta)`: `lam (w_i - theta)` is the gradient of the envelope at `w_i`.

    What is uploaded is how far `w_i` came, so the paper's server step `w <- (1 - beta) w + beta mean w_i` is
    `optax.chain(robust.mean(), optax.sgd(beta))`, with `weighting="uniform"`.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      tx: optax optimiser of `theta`; sees the gradient with the pull, runs from `tx.init` in every local round.
      lam: strength of the pull, at least 0; a traced scalar is allowed.
      eta: rate of the local rounds, at least 0; `eta * lam` of 1 moves `w_i` onto `theta`. A traced scalar is allowed.
      num_rounds: local rounds `R`.
      num_steps: steps `K` of `tx` in each of them.
      batch_size: examples per batch.

    Returns:
      A `LocalUpdate` over `ClientData` with a `PFedMeState` and a `LocalInfo`, which counts the steps of `tx` and whose
      loss is without the pull. Its `model` is the personal one, which begins as the initial parameters.

    Raises:
      ValueError: if `lam` or `eta` is negative or a count is not positive.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> loss_fn = lambda w, x, key: 0.5 * jnp.mean((w - x) ** 2)
      >>> local = pfedme(loss_fn, optax.sgd(0.25), lam=1.0, eta=0.5, num_rounds=1, num_steps=40, batch_size=1)
      >>> data = cj.ClientData(jnp.array([4.0]), num_examples=jnp.int32(1), num_support=jnp.int32(1))
      >>> upload, state, _ = local.update(jnp.float32(0.0), local.init(jnp.float32(0.0)), data, jax.random.key(0))
      >>> print(f"{state.personal:.3f} {upload.delta:.3f}")
      2.000 -1.000
    """
    for name, value in {"lam": lam, "eta": eta}.items():
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}.")
    check_positive(num_rounds=num_rounds, num_steps=num_steps, batch_size=batch_size)

    def update(
        shared: Params, state: PFedMeState, data: ClientData, key: jax.Array
    ) -> tuple[Upload, PFedMeState, LocalInfo]:
        length = jax.tree.leaves(data.examples)[0].shape[0]
        order_key, loss_key = jax.random.split(key)
        # A batch of its own for every local round as long as the epochs last: one epoch has at least one batch.
        stream = shuffled_epochs(order_key, jnp.int32(0), data.num_examples, length=length, num_epochs=num_rounds)

        def local_round(carry: tuple[Params, Params], index: jax.Array) -> tuple[tuple[Params, Params], jax.Array]:
            w, _ = carry
            batch = take_batch(data.examples, stream, index, batch_size)
            round_key, pull = jax.random.fold_in(loss_key, index), pull_towards(w, lam)

            def step(inner: tuple[Params, PyTree], k: jax.Array) -> tuple[tuple[Params, PyTree], jax.Array]:
                *after, loss = optimiser_step(loss_fn, tx, *inner, batch, jax.random.fold_in(round_key, k), pull)
                return tuple(after), loss

            (theta, _), loss = masked_scan(step, (w, tx.init(w)), num_steps, num_steps)

            def towards(w: jax.Array, theta: jax.Array) -> jax.Array:
                return w - jnp.asarray(eta, w.dtype) * jnp.asarray(lam, w.dtype) * (w - theta)

            return (jax.tree.map(towards, w, theta), theta), loss

        (w, theta), loss = masked_scan(local_round, (shared, shared), num_rounds, num_rounds)
        info = LocalInfo(loss, jnp.full((), num_rounds * num_steps, jnp.int32))
        return Upload(displacement(shared, w)), PFedMeState(theta), info

    return LocalUpdate(PFedMeState, update, model=lambda shared, state: state.personal)
