"""APFL: a client deploys a mixture of a model of its own and the shared one, and learns how much of each.

Reference: Deng, Kamani, Mahdavi, `Adaptive Personalized Federated Learning <https://arxiv.org/abs/2003.13461>`_, 2020.
As in the paper's formulas, one step moves all three, `w`, `v` and `alpha`, from where they stood before it. The
published code mixes with the `w` after its step, moves `alpha` only in the first step of a round, and decays it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cedarjax.core import (
    ClientData,
    Epochs,
    LocalUpdate,
    LossFn,
    NumStepsFn,
    Params,
    PyTree,
    Upload,
    accumulator,
    displacement,
    train_epochs,
)


class ApflState(NamedTuple):
    """What a client keeps."""

    personal: Params
    """Its own model `v`, before it is mixed with the shared one."""
    alpha: jax.Array
    """Scalar in [0, 1], its share in the mixture; at least float32."""


class ApflInfo(NamedTuple):
    """What one client's round tells."""

    loss: jax.Array
    """Mean over the batches of the loss of the shared model and that of the mixture, added, each before its step."""
    num_steps: jax.Array
    """int32, steps done."""
    alpha: jax.Array
    """`alpha` after the round."""


def mixture(alpha: jax.Array, personal: Params, shared: Params) -> Params:
    """`alpha * personal + (1 - alpha) * shared`.

    Args:
      alpha: scalar of at least float32, in which the sum runs.
      personal: tree with leaves of no wider dtype.
      shared: tree shaped like `personal`.

    Returns:
      Tree in the dtypes of `shared`.

    Example:
      >>> mixture(jnp.float32(0.25), {"w": jnp.float32(4.0)}, {"w": jnp.float32(0.0)})
      {'w': Array(1., dtype=float32)}
    """

    def mix(v: jax.Array, w: jax.Array) -> jax.Array:
        return (alpha * v.astype(alpha.dtype) + (1 - alpha) * w.astype(alpha.dtype)).astype(w.dtype)

    return jax.tree.map(mix, personal, shared)


def _descent_in_unit_interval(rate: float | jax.Array) -> optax.GradientTransformation:
    """Projected gradient descent on [0, 1]."""

    def update(grads: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        def step(g: jax.Array, a: jax.Array) -> jax.Array:
            return jnp.clip(a - jnp.asarray(rate, a.dtype) * g, 0, 1) - a

        return jax.tree.map(step, grads, params), state

    return optax.GradientTransformation(lambda params: (), update)


def apfl(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    batch_size: int,
    num_epochs: int = 1,
    alpha: float | jax.Array = 0.5,
    alpha_rate: float | jax.Array = 0.01,
    personal_tx: optax.GradientTransformation | None = None,
    num_steps_fn: NumStepsFn | None = None,
) -> LocalUpdate:
    """Each step trains the shared model, the personal one and their mixture, on the same batch.

    With `vbar = alpha v + (1 - alpha) w` and gradients at the same batch, all at once:

    - `w <- w - eta grad f(w)`, which is FedAvg's and is uploaded;
    - `v <- v - eta alpha grad f(vbar)`;
    - `alpha <- clip(alpha - alpha_rate <v - w, grad f(vbar)>, 0, 1)`.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      tx: optax optimiser of `w`; runs from `tx.init` in every round.
      batch_size: examples per batch.
      num_epochs: passes over the client's examples.
      alpha: share of the personal model at first, in [0, 1]; a traced scalar is allowed.
      alpha_rate: rate of `alpha`, at least 0 (the paper takes that of the models); 0 keeps `alpha` as it is. A traced
        scalar is allowed.
      personal_tx: optax optimiser of `v`, which sees `alpha grad f(vbar)`; default: `tx`, with a state of its own.
      num_steps_fn: as in `core.Epochs`.

    Returns:
      A `LocalUpdate` over `ClientData` with an `ApflState` and an `ApflInfo`. Its `model` is the mixture with the
      shared model as the server last sent it; `v` begins as the initial parameters.

    Raises:
      ValueError: if `alpha` or `alpha_rate` is out of range, or a count is not positive.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> loss_fn = lambda w, x, key: 0.5 * jnp.mean((w - x) ** 2)
      >>> local = apfl(loss_fn, optax.sgd(0.5), batch_size=1, alpha=0.5, alpha_rate=0.0)
      >>> data = cj.ClientData(jnp.array([4.0]), num_examples=jnp.int32(1), num_support=jnp.int32(1))
      >>> upload, state, _ = local.update(jnp.float32(0.0), local.init(jnp.float32(2.0)), data, jax.random.key(0))
      >>> print(upload.delta, state.personal)  # the mixture of 2 and 0 is 1, so v moves by 0.5 * 0.5 * (4 - 1)
      -2.0 2.75
    """
    if isinstance(alpha, int | float) and not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie within [0, 1], got {alpha}.")
    if isinstance(alpha_rate, int | float) and alpha_rate < 0:
        raise ValueError(f"alpha_rate must be at least 0, got {alpha_rate}.")
    epochs = Epochs(batch_size, num_epochs, num_steps_fn).checked()
    fixed = isinstance(alpha_rate, int | float) and alpha_rate == 0
    alpha_tx = optax.set_to_zero() if fixed else _descent_in_unit_interval(alpha_rate)
    all_tx = optax.partition(
        {"w": tx, "v": tx if personal_tx is None else personal_tx, "alpha": alpha_tx}, ("w", "v", "alpha")
    )

    def both_losses(trained: tuple[Params, Params, jax.Array], batch: PyTree, key: jax.Array) -> jax.Array:
        """Of which the gradients are the three directions: the mixture moves no `w`."""
        w, v, share = trained
        return loss_fn(w, batch, key) + loss_fn(mixture(share, v, jax.lax.stop_gradient(w)), batch, key)

    def init(params: Params) -> ApflState:
        return ApflState(params, jnp.asarray(alpha, accumulator(*jax.tree.leaves(params))))

    def update(
        shared: Params, state: ApflState, data: ClientData, key: jax.Array
    ) -> tuple[Upload, ApflState, ApflInfo]:
        start = (shared, state.personal, state.alpha)
        (w, v, share), info = train_epochs(both_losses, all_tx, start, data, key, epochs)
        return Upload(displacement(shared, w)), ApflState(v, share), ApflInfo(info.loss, info.num_steps, share)

    return LocalUpdate(init, update, model=lambda shared, state: mixture(state.alpha, state.personal, shared))
