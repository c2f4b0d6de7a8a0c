"""Encoders whose embeddings relate samples to each other; any function `x [B, ...] -> [B, d]` is one.

FedCache embeds with a large network that was trained elsewhere. These two need nothing from elsewhere. A client embeds
its own samples and uploads the embeddings, so all clients must have the same encoder, and nothing of their private data
may have gone into it but what its owner agreed to: a random map holds nothing, a trained one belongs to public data.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from cedarjax.core import ClientData, Epochs, LossFn, Params, PyTree, accumulator, check_positive, train_epochs
from cedarjax.distill.blocks import in_blocks

Encoder = Callable[[jax.Array], jax.Array]
"""`x [B, ...] -> [B, d]`, each row from the same row alone."""
KINDS = ("relu", "cos")


def random_features(
    key: jax.Array, shape: Sequence[int], num_features: int, *, kind: str = "relu", scale: float = 1.0
) -> Encoder:
    """A random layer that stays as it is: everybody with the key has the same one.

    `relu(x W)` or `sqrt(2 / d) cos(x W + b)` with `W` normal of standard deviation `scale / sqrt(n)` for `n` inputs and
    `b` uniform on `[0, 2 pi)`. Inner products of the first approximate the arc-cosine kernel, those of the second a
    Gaussian one of width `sqrt(n) / scale`. Centre the inputs first: an offset that all samples share makes all cosines
    alike.

    Args:
      key: PRNG key.
      shape: of one sample.
      num_features: `d`.
      kind: `"relu"` or `"cos"`.
      scale: above 0.

    Returns:
      An `Encoder`, with float32 features or wider.

    Raises:
      ValueError: if an argument is out of range (here), or the samples have another shape (by the encoder).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> encoder = random_features(jax.random.key(0), (8, 8), 16)
      >>> encoder(jnp.ones((3, 8, 8))).shape
      (3, 16)
    """
    check_positive(num_features=num_features)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}.")
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}.")
    shape = tuple(shape)
    num_inputs = math.prod(shape)
    check_positive(**{"the numbers in one sample": num_inputs})
    weight_key, phase_key = jax.random.split(key)

    def encode(x: jax.Array) -> jax.Array:
        if x.shape[1:] != shape:
            raise ValueError(f"x must be [B, *shape] with shape {shape}, got the shape {x.shape}.")
        dtype = accumulator(x)
        weights = jax.random.normal(weight_key, (num_inputs, num_features), jnp.float32).astype(dtype)
        flat = x.reshape(x.shape[0], -1).astype(dtype)
        projected = jnp.matmul(flat, weights, precision=jax.lax.Precision.HIGHEST) * (scale / math.sqrt(num_inputs))
        if kind == "relu":
            return jnp.maximum(projected, 0)
        phase = jax.random.uniform(phase_key, (1, num_features), jnp.float32, maxval=2 * math.pi).astype(dtype)
        return math.sqrt(2 / num_features) * jnp.cos(projected + phase)

    return encode


def self_trained_encoder(
    loss_fn: LossFn,
    features_fn: Callable[[Params, jax.Array], jax.Array],
    tx: optax.GradientTransformation,
    params: Params,
    examples: PyTree,
    key: jax.Array,
    *,
    batch_size: int,
    num_epochs: int = 1,
) -> Encoder:
    """Trains a model on examples that may be shown to everybody, and takes its features.

    Args:
      loss_fn: `(params, batch, key) -> scalar`, usually the cross entropy of a classifier.
      features_fn: `(params, x [B, ...]) -> [B, d]`, usually what its last layer sees.
      tx: optax optimiser.
      params: initial parameters.
      examples: leaves `[n, ...]`, public ones: what they hold can be read out of the encoder.
      key: PRNG key: order of the examples, and the loss.
      batch_size: examples per batch.
      num_epochs: passes over them.

    Returns:
      An `Encoder`.

    Raises:
      ValueError: if a count is not positive.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> features_fn = lambda w, x: jnp.tanh(x @ w["body"])
      >>> loss_fn = cj.nn.cross_entropy(lambda w, x: features_fn(w, x) @ w["head"])
      >>> params = {"body": jnp.eye(3, 4), "head": jnp.zeros((4, 2))}
      >>> examples = {"x": jnp.eye(6, 3), "y": jnp.array([0, 1, 0, 1, 0, 1])}
      >>> encoder = self_trained_encoder(
      ...     loss_fn, features_fn, optax.sgd(0.5), params, examples, jax.random.key(0), batch_size=2, num_epochs=3
      ... )
      >>> encoder(jnp.ones((7, 3))).shape
      (7, 4)
    """
    epochs = Epochs(batch_size, num_epochs).checked()
    count = jnp.asarray(jax.tree.leaves(examples)[0].shape[0], jnp.int32)
    trained, _ = train_epochs(loss_fn, tx, params, ClientData(examples, count, count), key, epochs)
    return lambda x: features_fn(trained, x)


def embed(encoder: Encoder, x: jax.Array, *, block_size: int = 1024) -> jax.Array:
    """Embeddings of many samples, block by block, so that memory is that of one block.

    Args:
      encoder: `x [B, ...] -> [B, d]`.
      x: `[n, ...]`.
      block_size: samples at once.

    Returns:
      `[n, d]`.

    Raises:
      ValueError: if `block_size` is not positive or the encoder does not return `[B, d]`.

    Example:
      >>> import jax.numpy as jnp
      >>> embed(lambda x: x.reshape(x.shape[0], -1), jnp.ones((5, 2, 2)), block_size=2).shape
      (5, 4)
    """
    check_positive(block_size=block_size)
    embeddings = in_blocks(encoder, x, block_size)
    if embeddings.ndim != 2:
        raise ValueError(f"encoder must return [B, d], got the shape {embeddings.shape}.")
    return embeddings
