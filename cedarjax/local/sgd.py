"""Local training with any optax optimiser, plain or with a proximal term.

Sources: McMahan, Moore, Ramage, Hampson, Aguera y Arcas, `Communication-Efficient Learning of Deep Networks from
Decentralized Data <https://arxiv.org/abs/1602.05629>`_, 2017 (FedAvg's client); Li, Sahu, Zaheer, Sanjabi, Talwalkar,
Smith, `Federated Optimization in Heterogeneous Networks <https://arxiv.org/abs/1812.06127>`_, 2020 (FedProx).
"""

import functools

import jax
import optax

from cedarjax.core import Epochs, LocalUpdate, LossFn, NumStepsFn, Representation, local_training, pull_towards


def sgd(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    batch_size: int,
    num_epochs: int = 1,
    num_steps_fn: NumStepsFn | None = None,
    representation: Representation = "dense",
) -> LocalUpdate:
    """Local epochs over shuffled batches.

    `theta <- theta + tx.update(grad loss(theta; batch))`, with a fresh optimiser state each round. A client does
    `ceil(num_epochs * num_examples / batch_size)` steps over its own examples (support and query alike), however many
    rows of padding follow them; see `core.batches` for a last batch that is not full.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      tx: optax optimiser; runs from `tx.init` in every round.
      batch_size: examples per batch.
      num_epochs: passes over the client's examples.
      num_steps_fn: `(data, key) -> int32`: how many of its steps this client manages this round (a straggler fewer,
        never more); default: all of them.
      representation: `"dense"`; `"lowrank"` to hold every matrix that enters through products by its exact factors,
        for optimisers that are linear in the gradients (SGD, momentum, weight decay); or `"auto"`, which does so where
        the factors have fewer numbers. See `core.lowrank`.

    Returns:
      A `LocalUpdate` over `ClientData` without client state, info `LocalInfo`.

    Raises:
      ValueError: if `batch_size` or `num_epochs` is not positive, the representation unknown, or `"lowrank"` with an
        optimiser that is not linear.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> local = cj.local.sgd(lambda w, x, key: 0.5 * jnp.mean((w - x) ** 2), optax.sgd(0.5), batch_size=2)
      >>> data = cj.ClientData(jnp.array([1.0, 3.0, 9.9]), num_examples=jnp.int32(2), num_support=jnp.int32(1))
      >>> upload, _, info = local.update(jnp.float32(0.0), (), data, jax.random.key(0))
      >>> print(upload.delta, info.num_steps)
      -1.0 1
    """
    return prox(
        0.0,
        loss_fn,
        tx,
        batch_size=batch_size,
        num_epochs=num_epochs,
        num_steps_fn=num_steps_fn,
        representation=representation,
    )


def prox(
    mu: float | jax.Array,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    batch_size: int,
    num_epochs: int = 1,
    num_steps_fn: NumStepsFn | None = None,
    representation: Representation = "dense",
) -> LocalUpdate:
    """Local epochs on `loss(theta) + mu / 2 * ||theta - shared||^2`, a pull towards the broadcast parameters.

    Args:
      mu: strength of the pull, at least 0; 0 is `sgd`. A traced scalar is allowed, so that it can be swept by vmap.
      loss_fn: `(params, batch, key) -> scalar`.
      tx: optax optimiser; sees the gradient of the sum.
      batch_size: examples per batch.
      num_epochs: passes over the client's examples.
      num_steps_fn: as in `sgd`; FedProx's stragglers.
      representation: as in `sgd`.

    Returns:
      A `LocalUpdate` over `ClientData` without client state, info `LocalInfo` (its loss is without the proximal term).

    Raises:
      ValueError: if `mu` is negative, and as in `sgd`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> loss_fn = lambda w, x, key: 0.5 * jnp.mean((w - x) ** 2)
      >>> local = cj.local.prox(1.0, loss_fn, optax.sgd(0.5), batch_size=1, num_epochs=40)
      >>> data = cj.ClientData(jnp.array([2.0]), num_examples=jnp.int32(1), num_support=jnp.int32(1))
      >>> print(local.update(jnp.float32(0.0), (), data, jax.random.key(0))[0].delta)
      -1.0
    """
    if isinstance(mu, int | float) and mu < 0:
        raise ValueError(f"mu must be at least 0, got {mu}.")
    pull = None if isinstance(mu, int | float) and mu == 0 else functools.partial(pull_towards, strength=mu)
    epochs = Epochs(batch_size, num_epochs, num_steps_fn)
    return local_training(loss_fn, tx, epochs, pull=pull, representation=representation)
