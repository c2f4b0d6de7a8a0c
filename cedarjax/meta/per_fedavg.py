"""Per-FedAvg: federated averaging whose local steps follow the meta-gradient of one step of adaptation.

Reference: Fallah, Mokhtari, Ozdaglar, `Personalized Federated Learning: A Meta-Learning Approach
<https://arxiv.org/abs/2002.07948>`_, 2020. `"hf"` is the paper's Hessian-free variant, `"fo"` its first-order one.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cedarjax.core import (
    ClientData,
    LocalUpdate,
    LossFn,
    Params,
    PyTree,
    Upload,
    check_positive,
    displacement,
    masked_scan,
    shuffled_epochs,
    take_batch,
)


class PerFedAvgInfo(NamedTuple):
    """What one client's steps tell."""

    loss: jax.Array
    """Mean over the steps of the loss on the second batch, after the adaptation to the first."""


def per_fedavg(
    loss_fn: LossFn,
    alpha: float | jax.Array,
    tx: optax.GradientTransformation,
    *,
    num_steps: int,
    batch_size: int,
    mode: Literal["exact", "fo", "hf"] = "exact",
    delta: float | jax.Array = 1e-3,
) -> LocalUpdate:
    """Local steps on the meta-gradient of `f(w - alpha grad f(w))`, each on three independent batches.

    With `g` and `H` the gradient and the Hessian of the loss on a batch, and `D`, `D'`, `D''` the batches of the step::

        d = g(w - alpha g(w, D), D')
        w <- w + tx.update(d - alpha H(w, D'') d)

    `mode="fo"` leaves the Hessian out; `mode="hf"` takes `(g(w + delta d, D'') - g(w - delta d, D'')) / (2 delta)` for
    the product with it, two gradients in place of the exact Hessian-vector product.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      alpha: rate of the adaptation, at least 0; a device deploys `adapt(loss_fn, optax.sgd(alpha), 1)`. A traced scalar
        is allowed.
      tx: optax optimiser of the local steps, `optax.sgd(beta)` in the paper; runs from `tx.init` in every round.
      num_steps: local steps.
      batch_size: examples in each of the three batches, from three shuffled streams of all the client's examples.
      mode: `"exact"`, `"fo"` or `"hf"`.
      delta: step of the central difference, positive; only `"hf"` reads it. A traced scalar is allowed.

    Returns:
      A `LocalUpdate` over `ClientData` without client state, info `PerFedAvgInfo`. Its upload is how far it came, so
      `optax.sgd(1.0)` is the paper's server.

    Raises:
      ValueError: if a count or `delta` is not positive, `alpha` is negative or the mode unknown.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> loss_fn = lambda w, x, key: 0.5 * jnp.mean((w - x) ** 2)
      >>> data = cj.ClientData(jnp.array([4.0]), num_examples=jnp.int32(1), num_support=jnp.int32(1))
      >>> local = cj.meta.per_fedavg(loss_fn, 0.5, optax.sgd(1.0), num_steps=1, batch_size=1)
      >>> print(local.update(jnp.float32(0.0), (), data, jax.random.key(0))[0].delta)  # (1 - 0.5) * (2 - 4)
      -1.0
    """
    check_positive(num_steps=num_steps, batch_size=batch_size)
    if mode not in ("exact", "fo", "hf"):
        raise ValueError(f'mode must be "exact", "fo" or "hf", got {mode!r}.')
    if isinstance(alpha, int | float) and not alpha >= 0:
        raise ValueError(f"alpha must be at least 0, got {alpha}.")
    if isinstance(delta, int | float) and not delta > 0:
        raise ValueError(f"delta must be positive, got {delta}.")

    def update(
        shared: Params, client_state: PyTree, data: ClientData, key: jax.Array
    ) -> tuple[Upload, PyTree, PerFedAvgInfo]:
        length = jax.tree.leaves(data.examples)[0].shape[0]
        *order_keys, loss_key = jax.random.split(key, 4)
        # One epoch per step is enough for a client that fills a batch; a smaller one reads its last order in circles.
        streams = [
            shuffled_epochs(k, jnp.int32(0), data.num_examples, length=length, num_epochs=num_steps) for k in order_keys
        ]

        def step(carry: tuple[Params, PyTree], index: jax.Array) -> tuple[tuple[Params, PyTree], jax.Array]:
            params, opt_state = carry
            keys = jax.random.split(jax.random.fold_in(loss_key, index), 3)
            first, second, third = (
                (take_batch(data.examples, stream, index, batch_size), k)
                for stream, k in zip(streams, keys, strict=True)
            )
            adapted = _moved(params, jax.grad(loss_fn)(params, *first), -alpha)
            loss, grads = jax.value_and_grad(loss_fn)(adapted, *second)
            if mode != "fo":
                grads = _moved(grads, curvature(params, grads, *third), -alpha)
            step_update, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, step_update), opt_state), loss

        def curvature(params: Params, vector: Params, batch: PyTree, key: jax.Array) -> Params:
            """Product of the Hessian and a vector."""

            def gradient(params: Params) -> Params:
                return jax.grad(loss_fn)(params, batch, key)

            if mode == "exact":
                return jax.jvp(gradient, (params,), (vector,))[1]
            above, below = (gradient(_moved(params, vector, sign * delta)) for sign in (1, -1))
            return jax.tree.map(lambda a, b: (a - b) / jnp.asarray(2 * delta, a.dtype), above, below)

        carry = (shared, tx.init(shared))
        (params, _), loss = masked_scan(step, carry, num_steps, num_steps)
        return Upload(displacement(shared, params)), client_state, PerFedAvgInfo(loss)

    return LocalUpdate(lambda params: (), update)


def _moved(params: Params, direction: Params, rate: float | jax.Array) -> Params:
    return jax.tree.map(lambda p, d: p + jnp.asarray(rate, p.dtype) * d, params, direction)
