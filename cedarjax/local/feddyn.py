"""FedDyn's client: local training on an objective that is regularised anew in every round.

Reference: Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama, `Federated Learning Based on Dynamic Regularization
<https://arxiv.org/abs/2111.04263>`_, 2021; the server's part is `server.feddyn`. As in the paper, the penalty is the
squared distance and `alpha` is the same for all clients; the published code divides it by a client's share of the
examples.
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
    Upload,
    displacement,
    train_epochs,
)


class FedDynState(NamedTuple):
    """What a client keeps."""

    gradient: Params
    """`g_i`, the gradient of the client's loss where its last training ended, if that was exact."""


def feddyn(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    alpha: float | jax.Array,
    *,
    batch_size: int,
    num_epochs: int = 1,
    num_steps_fn: NumStepsFn | None = None,
) -> LocalUpdate:
    """Local epochs on `loss(theta) - <g_i, theta> + alpha / 2 ||theta - shared||^2`.

    Afterwards `g_i <- g_i - alpha (theta_i - shared)`: at the minimum this is the gradient of the client's own loss.
    Then, at a fixed point of the federation, the gradients of the clients sum to 0 however long they train. The
    server's part goes with it: `optax.chain(robust.mean(), server.feddyn(participation))`, with equal weights of the
    clients (`weighting="uniform"`), since the paper's objective is the mean over clients.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      tx: optax optimiser; sees the gradient of the sum, and runs from `tx.init` in every round.
      alpha: strength of the regularisation, above 0. It may be a traced scalar, but must not change over the rounds.
      batch_size: examples per batch.
      num_epochs: passes over the client's examples.
      num_steps_fn: as in `core.Epochs`; a client that does no step keeps its `g_i`.

    Returns:
      A `LocalUpdate` with a `FedDynState`, `g_i = 0` at first, and info `LocalInfo` (its loss is the client's own).

    Raises:
      ValueError: if a count or `alpha` is not positive.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> loss_fn = lambda w, x, key: 0.5 * jnp.mean((w - x) ** 2)
      >>> local = feddyn(loss_fn, optax.sgd(0.5), 1.0, batch_size=1, num_epochs=60)
      >>> data = cj.ClientData(jnp.array([4.0]), num_examples=jnp.int32(1), num_support=jnp.int32(1))
      >>> upload, state, _ = local.update(jnp.float32(0.0), local.init(jnp.float32(0.0)), data, jax.random.key(0))
      >>> print(upload.delta, state.gradient)
      -2.0 -2.0
    """
    if isinstance(alpha, int | float) and alpha <= 0:
        raise ValueError(f"alpha must be above 0, got {alpha}.")
    epochs = Epochs(batch_size, num_epochs, num_steps_fn).checked()

    def init(params: Params) -> FedDynState:
        return FedDynState(jax.tree.map(jnp.zeros_like, params))

    def update(
        shared: Params, state: FedDynState, data: ClientData, key: jax.Array
    ) -> tuple[Upload, FedDynState, LocalInfo]:
        def regularise(grads: Params, params: Params) -> Params:
            return jax.tree.map(
                lambda grad, own, p, s: grad - own + jnp.asarray(alpha, grad.dtype) * (p - s),
                grads,
                state.gradient,
                params,
                shared,
            )

        params, info = train_epochs(loss_fn, tx, shared, data, key, epochs, regularise)
        moved = displacement(shared, params)
        gradient = jax.tree.map(lambda own, m: own + jnp.asarray(alpha, own.dtype) * m, state.gradient, moved)
        return Upload(moved), FedDynState(gradient), info

    return LocalUpdate(init, update)
