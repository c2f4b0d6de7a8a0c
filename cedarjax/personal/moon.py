"""MOON: local training that keeps representations near the shared model's and away from the client's own old ones.

Reference: Li, He, Song, `Model-Contrastive Federated Learning <https://arxiv.org/abs/2103.16257>`_, 2021.
"""

from collections.abc import Callable
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
    displacement,
    train_epochs,
)

_SHORTEST = 1e-8  # a representation that is shorter has no direction


class MoonState(NamedTuple):
    """What a client keeps."""

    previous: Params
    """The model that it trained in its last round."""
    started: jax.Array
    """bool scalar, False until the client has taken part once."""


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosine of the angle between rows; 0, with a gradient of 0, where a row is 0.

    Args:
      a: `[B, d]`.
      b: `[B, d]`.

    Returns:
      `[B]`, float32 or wider.

    Example:
      >>> import jax.numpy as jnp
      >>> print(cosine(jnp.array([[3.0, 4.0], [0.0, 0.0]]), jnp.array([[3.0, 0.0], [1.0, 0.0]])))
      [0.6 0. ]
    """
    dtype = accumulator(a, b)

    def unit(x: jax.Array) -> jax.Array:
        x = x.astype(dtype)
        square = jnp.square(x).sum(axis=1, keepdims=True)
        long = square > _SHORTEST**2
        return jnp.where(long, x * jax.lax.rsqrt(jnp.where(long, square, jnp.ones_like(square))), jnp.zeros_like(x))

    return (unit(a) * unit(b)).sum(axis=1)


def model_contrast(
    z: jax.Array, z_shared: jax.Array, z_previous: jax.Array, temperature: float | jax.Array
) -> jax.Array:
    """The contrast between the shared and the previous model, mean over the batch.

    `-log(exp(cos(z, z_shared) / t) / (exp(cos(z, z_shared) / t) + exp(cos(z, z_previous) / t)))`

    Args:
      z: `[B, d]`, representations by the model in training.
      z_shared: `[B, d]`, by the received model.
      z_previous: `[B, d]`, by the client's previous model.
      temperature: `t`.

    Returns:
      Scalar, float32 or wider; `log 2` where both models agree.

    Example:
      >>> import jax.numpy as jnp
      >>> z, opposite = jnp.array([[1.0, 0.0]]), jnp.array([[-1.0, 0.0]])
      >>> print(f"{model_contrast(z, z, opposite, 0.5):.4f}")  # log(1 + exp(-4))
      0.0181
    """
    nearer = cosine(z, z_previous) - cosine(z, z_shared)
    return jax.nn.softplus(nearer / jnp.asarray(temperature, nearer.dtype)).mean()


def moon(
    loss_fn: LossFn,
    embed_fn: Callable[[Params, PyTree], jax.Array],
    tx: optax.GradientTransformation,
    *,
    mu: float | jax.Array = 1.0,
    temperature: float | jax.Array = 0.5,
    batch_size: int,
    num_epochs: int = 1,
    num_steps_fn: NumStepsFn | None = None,
) -> LocalUpdate:
    """Local epochs on `loss(theta) + mu * model_contrast`, uploaded as by `local.sgd`.

    The client keeps the model that it trained last, and nothing of it is deployed: MOON trains one shared model, and
    `model` is that. In a client's first round the received model stands in for the previous one, with which the
    contrast is constant.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      embed_fn: `(params, batch) -> [B, d]`, the representations, in the paper those of a projection head. Where it is a
        part of what `loss_fn` computes, the compiler computes it once.
      tx: optax optimiser; sees the gradient of the sum, and runs from `tx.init` in every round.
      mu: weight of the contrast, at least 0. It may be a traced scalar.
      temperature: above 0; the paper's choice is 0.5. It may be a traced scalar.
      batch_size: examples per batch.
      num_epochs: passes over the client's examples.
      num_steps_fn: as in `core.Epochs`.

    Returns:
      A `LocalUpdate` with a `MoonState` and info `LocalInfo` (its loss is the sum).

    Raises:
      ValueError: if a count or `temperature` is not positive or `mu` negative (here), or `embed_fn` does not return
        `[B, d]` (when `update` is traced).

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> embed_fn = lambda w, batch: jnp.tanh(batch["x"] @ w["body"])
      >>> loss_fn = lambda w, batch, key: jnp.mean((embed_fn(w, batch) @ w["head"] - batch["y"]) ** 2)
      >>> local = moon(loss_fn, embed_fn, optax.sgd(0.1), mu=1.0, batch_size=2)
      >>> params = {"body": jnp.ones((3, 4)), "head": jnp.ones(4)}
      >>> examples = {"x": jnp.ones((2, 3)), "y": jnp.zeros(2)}
      >>> data = cj.ClientData(examples, num_examples=jnp.int32(2), num_support=jnp.int32(1))
      >>> upload, state, _ = local.update(params, local.init(params), data, jax.random.key(0))
      >>> print(state.started, jax.tree.map(jnp.shape, state.previous))
      True {'body': (3, 4), 'head': (4,)}
    """
    if isinstance(mu, int | float) and mu < 0:
        raise ValueError(f"mu must be at least 0, got {mu}.")
    if isinstance(temperature, int | float) and temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")
    epochs = Epochs(batch_size, num_epochs, num_steps_fn).checked()

    def embed(params: Params, batch: PyTree) -> jax.Array:
        z = embed_fn(params, batch)
        if z.ndim != 2 or z.shape[0] != batch_size:
            raise ValueError(f"embed_fn must return [B, d] with B = {batch_size}, got the shape {z.shape}.")
        return z

    def init(params: Params) -> MoonState:
        return MoonState(params, jnp.zeros((), bool))

    def update(
        shared: Params, state: MoonState, data: ClientData, key: jax.Array
    ) -> tuple[Upload, MoonState, LocalInfo]:
        previous = jax.tree.map(lambda own, s: jnp.where(state.started, own, s), state.previous, shared)

        def contrasted(params: Params, batch: PyTree, key: jax.Array) -> jax.Array:
            loss = loss_fn(params, batch, key)
            contrast = model_contrast(
                embed(params, batch), embed(shared, batch), embed(previous, batch), temperature
            ).astype(loss.dtype)
            return loss + jnp.asarray(mu, loss.dtype) * contrast

        params, info = train_epochs(contrasted, tx, shared, data, key, epochs)
        return Upload(displacement(shared, params)), MoonState(params, jnp.ones((), bool)), info

    return LocalUpdate(init, update)
