"""Losses of a client that learns from its labels and from the knowledge of others.

References: Hinton, Vinyals, Dean, `Distilling the Knowledge in a Neural Network <https://arxiv.org/abs/1503.02531>`_,
2015; `FedCache <https://arxiv.org/abs/2308.07816>`_. The published code of FedCache divides the teacher's logits by 3,
whatever the temperature it was given, and never the student's, whose gradient is then another one. Here one
temperature divides both, and samples without a teacher learn from their labels alone.
"""

import jax
import jax.numpy as jnp

from cedarjax.core import accumulator


def check_strengths(alpha: float | jax.Array, temperature: float | jax.Array) -> None:
    """Raises if a number is out of range; traced scalars are not looked at.

    Args:
      alpha: weight of the distillation, at least 0.
      temperature: above 0.

    Raises:
      ValueError: naming the argument and its value.
    """
    if isinstance(alpha, int | float) and not alpha >= 0:
        raise ValueError(f"alpha must be at least 0, got {alpha}.")
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")


def distillation_loss(
    logits: jax.Array, teacher: jax.Array, has: jax.Array, temperature: float | jax.Array
) -> jax.Array:
    """`tau^2 KL(softmax(teacher / tau) || softmax(logits / tau))` of each sample, 0 where there is no teacher.

    Args:
      logits: `[B, K]`, the student's.
      teacher: `[B, K]`; no gradient flows into it. Rows without a teacher may hold anything.
      has: `[B]` bool, whether there is a teacher.
      temperature: `tau`, above 0; a traced scalar is allowed.

    Returns:
      `[B]`, float32 or wider, at least 0 up to rounding.

    Raises:
      ValueError: if the shapes do not fit or `temperature` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> logits, teacher = jnp.array([[0.0, 0.0], [0.0, 0.0]]), jnp.array([[2.0, 0.0], [2.0, 0.0]])
      >>> [f"{x:.4f}" for x in distillation_loss(logits, teacher, jnp.array([True, False]), 1.0)]
      ['0.3278', '0.0000']
    """
    check_strengths(0.0, temperature)
    if logits.ndim != 2 or teacher.shape != logits.shape or has.shape != logits.shape[:1]:
        raise ValueError(
            f"teacher and has must be [B, K] and [B] for logits {logits.shape}, got {teacher.shape} and {has.shape}."
        )
    dtype = accumulator(logits, teacher)
    tau = jnp.asarray(temperature, dtype)
    teacher = jnp.where(has[:, None], jax.lax.stop_gradient(teacher).astype(dtype), jnp.zeros(logits.shape, dtype))
    target = jax.nn.log_softmax(teacher / tau, axis=1)
    student = jax.nn.log_softmax(logits.astype(dtype) / tau, axis=1)
    divergence = (jnp.exp(target) * (target - student)).sum(axis=1)
    return jnp.where(has, jnp.square(tau) * divergence, jnp.zeros_like(divergence))


def label_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross entropy `-log softmax(logits)[label]` of each sample.

    Args:
      logits: `[B, K]`.
      labels: `[B]` integers in `[0, K)`.

    Returns:
      `[B]`, float32 or wider.

    Raises:
      ValueError: if the shapes do not fit.
      TypeError: if the labels are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> print(label_loss(jnp.zeros((1, 4)), jnp.array([2])).round(4))
      [1.3863]
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}.")
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits must be [B, K] for labels [B], got {logits.shape} and {labels.shape}.")
    log_p = jax.nn.log_softmax(logits.astype(accumulator(logits)), axis=1)
    return -jnp.take_along_axis(log_p, labels[:, None].astype(jnp.int32), axis=1)[:, 0]


def knowledge_loss(
    logits: jax.Array,
    labels: jax.Array,
    teacher: jax.Array,
    has: jax.Array,
    *,
    alpha: float | jax.Array,
    temperature: float | jax.Array,
) -> jax.Array:
    """`CE(z, y) + alpha tau^2 KL(softmax(zbar / tau) || softmax(z / tau))` of each sample.

    Args:
      logits: `z`, `[B, K]`.
      labels: `y`, `[B]` integers.
      teacher: `zbar`, `[B, K]`.
      has: `[B]` bool, whether there is a teacher; without one the loss is the cross entropy.
      alpha: weight of the distillation, at least 0; a traced scalar is allowed.
      temperature: `tau`, above 0; a traced scalar is allowed.

    Returns:
      `[B]`, float32 or wider.

    Raises:
      ValueError: if the shapes do not fit or a number is out of range.
      TypeError: if the labels are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> logits, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[2.0, 0.0]])
      >>> loss = knowledge_loss(logits, jnp.array([0]), teacher, jnp.array([True]), alpha=2.0, temperature=1.0)
      >>> print(loss.round(4))  # log 2 + 2 * 0.3278
      [1.3488]
    """
    check_strengths(alpha, temperature)
    distilled = distillation_loss(logits, teacher, has, temperature)
    return label_loss(logits, labels).astype(distilled.dtype) + jnp.asarray(alpha, distilled.dtype) * distilled
