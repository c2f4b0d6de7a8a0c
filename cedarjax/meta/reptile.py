"""Reptile.

Reference: Nichol, Achiam, Schulman, `On First-Order Meta-Learning Algorithms
<https://arxiv.org/abs/1803.02999>`_, 2018.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cedarjax.core import (
    ClientData,
    LocalUpdate,
    LossFn,
    Params,
    PyTree,
    Representation,
    Upload,
    check_positive,
    displacement,
    represented,
    shuffled_epochs,
    train,
)


class ReptileInfo(NamedTuple):
    """What one client's training tells."""

    loss: jax.Array
    """Mean of the batch losses, each taken before its step."""
    rank: PyTree = ()
    """int32 a parameter: rank of its update where that is held by factors, 0 where it is dense; `()` if all are dense
    because `representation` says so."""


def reptile(
    loss_fn: LossFn,
    inner_tx: optax.GradientTransformation,
    num_steps: int,
    *,
    batch_size: int,
    representation: Representation = "dense",
) -> LocalUpdate:
    """The displacement of a fixed number of steps, `delta = theta - theta_m`.

    `theta_{t+1} = theta_t + inner_tx.update(grad loss(theta_t; batch_t))` over shuffled batches of all the client's
    examples, support and query alike. The server's learning rate is Reptile's outer step size. Unlike `local.sgd`,
    every client does the same number of steps, whatever the size of its data.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      inner_tx: optax optimiser, fresh each round.
      num_steps: steps `m`.
      batch_size: examples per step.
      representation: `"dense"`; `"lowrank"` to hold every matrix that enters through products by its exact factors,
        for optimisers that are linear in the gradients (SGD, momentum, weight decay); or `"auto"`, which does so where
        the factors have fewer numbers. See `core.lowrank`.

    Returns:
      A `LocalUpdate` over `ClientData` without client state, info `ReptileInfo`.

    Raises:
      ValueError: if `num_steps` or `batch_size` is not positive, the representation unknown, or `"lowrank"` with an
        optimiser that is not linear.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> loss_fn = lambda w, x, key: 0.5 * jnp.mean((w - x) ** 2)
      >>> data = cj.ClientData(jnp.array([4.0]), num_examples=jnp.int32(1), num_support=jnp.int32(1))
      >>> local = cj.meta.reptile(loss_fn, optax.sgd(0.5), 2, batch_size=1)
      >>> print(local.update(jnp.float32(0.0), (), data, jax.random.key(0))[0].delta)
      -3.0
    """
    check_positive(num_steps=num_steps, batch_size=batch_size)

    def update(
        shared: Params, client_state: PyTree, data: ClientData, key: jax.Array
    ) -> tuple[Upload, PyTree, ReptileInfo]:
        length = jax.tree.leaves(data.examples)[0].shape[0]
        order_key, loss_key = jax.random.split(key)
        # One epoch per step is enough for a client that fills a batch; a smaller one reads its last order in circles.
        stream = shuffled_epochs(order_key, jnp.int32(0), data.num_examples, length=length, num_epochs=num_steps)

        params, loss = train(
            loss_fn,
            inner_tx,
            shared,
            data.examples,
            stream,
            loss_key,
            batch_size=batch_size,
            num_steps=num_steps,
            max_steps=num_steps,
        )
        return Upload(displacement(shared, params)), client_state, ReptileInfo(loss)

    held = represented(update, representation, inner_tx, num_rows=lambda data: num_steps * batch_size)
    return LocalUpdate(lambda params: (), held)
