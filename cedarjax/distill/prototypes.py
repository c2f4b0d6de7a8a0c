"""Distilled prototypes: a few samples of each class from which kernel ridge regression predicts a client's data.

References: Pan, Sun, Wu, Wang, Liu, Gao, Wang, `FedCache 2.0: Federated Edge Learning with Knowledge Caching and
Dataset Distillation <https://arxiv.org/abs/2405.13378>`_, 2024; Zhou, Nezhadarya, Ba, `Dataset Distillation using
Neural Feature Regression <https://arxiv.org/abs/2206.00719>`_, 2022, whose kernel is the inner product of features. The
published code regresses on features that it gathered while the model was still training; here one model, the trained
one, makes the features of both. It also rewards a margin between the labels of a prototype, which is constant while
labels are fixed, as they are here.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from cedarjax.core import accumulator, check_positive

_HIGHEST = jax.lax.Precision.HIGHEST


def krr_predict(
    features: jax.Array,
    proto_features: jax.Array,
    proto_labels: jax.Array,
    proto_mask: jax.Array,
    ridge: float | jax.Array,
) -> jax.Array:
    """`K(X_t, X_s) (K(X_s, X_s) + lambda I)^-1 Y_s` with the kernel `K(a, b) = <f(a), f(b)>`.

    `lambda` is `ridge` times the mean of the diagonal of `K(X_s, X_s)`, so that it does not depend on the scale of the
    features.

    Args:
      features: `f(X_t)`, `[T, d]`.
      proto_features: `f(X_s)`, `[S, d]`; rows outside the mask may hold anything.
      proto_labels: `Y_s`, `[S, K]`.
      proto_mask: `[S]` bool, the prototypes that exist.
      ridge: above 0; a traced scalar is allowed.

    Returns:
      `[T, K]`, float32 or wider; zeros without any prototype.

    Example:
      >>> import jax.numpy as jnp
      >>> one = jnp.ones((1, 1))
      >>> print(f"{krr_predict(2 * one, one, one, jnp.array([True]), 1.0).item():.4f}")
      1.0000
    """
    dtype = accumulator(features, proto_features)
    mask = proto_mask[:, None]
    kept = jnp.where(mask, proto_features, jnp.zeros_like(proto_features)).astype(dtype)
    labels = jnp.where(mask, proto_labels, jnp.zeros_like(proto_labels)).astype(dtype)
    kernel = jnp.matmul(kept, kept.T, precision=_HIGHEST)
    mean = jnp.trace(kernel) / jnp.maximum(proto_mask.sum(), 1).astype(dtype)
    strength = jnp.where(mean > 0, jnp.asarray(ridge, dtype) * mean, jnp.ones((), dtype))
    kernel = kernel + strength * jnp.eye(kernel.shape[0], dtype=dtype)
    coefficients = jax.scipy.linalg.solve(kernel, labels, assume_a="pos")
    across = jnp.matmul(features.astype(dtype), kept.T, precision=_HIGHEST)
    return jnp.matmul(across, coefficients, precision=_HIGHEST)


def krr_loss(
    features: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    proto_features: jax.Array,
    proto_labels: jax.Array,
    proto_mask: jax.Array,
    ridge: float | jax.Array,
) -> jax.Array:
    """Mean over the samples of `|krr_predict - y|^2 / 2`.

    Args:
      features: `[T, d]`; rows outside the mask may hold anything.
      labels: `[T, K]`, usually one-hot.
      mask: `[T]` bool, the samples that count.
      proto_features: as in `krr_predict`.
      proto_labels: as in `krr_predict`.
      proto_mask: as in `krr_predict`.
      ridge: as in `krr_predict`.

    Returns:
      Scalar, 0 without any sample.

    Example:
      >>> import jax.numpy as jnp
      >>> one, there = jnp.ones((1, 1)), jnp.array([True])
      >>> print(f"{krr_loss(one, one, there, one, one, there, 1.0):.4f}")
      0.1250
    """
    features = jnp.where(mask[:, None], features, jnp.zeros_like(features))
    gaps = krr_predict(features, proto_features, proto_labels, proto_mask, ridge)
    gaps = gaps - jnp.where(mask[:, None], labels, jnp.zeros_like(labels)).astype(gaps.dtype)
    return jnp.square(gaps).sum() / (2 * jnp.maximum(mask.sum(), 1).astype(gaps.dtype))


def init_prototypes(
    key: jax.Array, x: jax.Array, labels: jax.Array, mask: jax.Array, *, num_classes: int, num_per_class: int
) -> tuple[jax.Array, jax.Array]:
    """Some of a client's own samples of each class, drawn without replacement, to begin from.

    Args:
      key: PRNG key.
      x: `[M, ...]`.
      labels: `[M]` integers.
      mask: `[M]` bool, the rows that count.
      num_classes: `K`.
      num_per_class: `P`.

    Returns:
      `[K P, ...]`, class after class; and `[K P]` bool, False where the client has not so many samples of the class,
      with zeros there.

    Raises:
      ValueError: if a count is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x, labels = jnp.array([5.0, 6.0, 7.0]), jnp.array([1, 0, 1])
      >>> some, there = init_prototypes(
      ...     jax.random.key(0), x, labels, jnp.array([True, True, False]), num_classes=2, num_per_class=2
      ... )
      >>> some.tolist(), there.tolist()
      ([6.0, 0.0, 5.0, 0.0], [True, False, True, False])
    """
    check_positive(num_classes=num_classes, num_per_class=num_per_class)
    draws = jax.random.uniform(key, mask.shape, jnp.float32)
    classes = jnp.arange(num_classes, dtype=jnp.int32)
    member = mask[None, :] & (labels.astype(jnp.int32)[None, :] == classes[:, None])
    draws = jnp.where(member, draws[None, :], -1.0)
    short = max(num_per_class - x.shape[0], 0)
    found, index = jax.lax.top_k(jnp.pad(draws, ((0, 0), (0, short)), constant_values=-1.0), num_per_class)
    there = (found >= 0).reshape(-1)
    index = jnp.where(there, index.reshape(-1), 0)
    return jnp.where(there.reshape(-1, *(1,) * (x.ndim - 1)), x[index], jnp.zeros((), x.dtype)), there


def distil_prototypes(
    features_fn: Callable[[jax.Array], jax.Array],
    tx: optax.GradientTransformation,
    protos: jax.Array,
    proto_labels: jax.Array,
    proto_mask: jax.Array,
    features: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    *,
    ridge: float | jax.Array,
    num_steps: int,
) -> tuple[jax.Array, jax.Array]:
    """Gradient steps on the prototypes themselves, down `krr_loss` of the client's data.

    Args:
      features_fn: `[S, ...] -> [S, d]`, through which the gradient goes.
      tx: optax optimiser, from `tx.init`.
      protos: `[S, ...]`, where they begin.
      proto_labels: `[S, K]`, which stay.
      proto_mask: `[S]` bool.
      features: `[T, d]`, of the client's data.
      labels: `[T, K]`.
      mask: `[T]` bool.
      ridge: as in `krr_predict`.
      num_steps: static number of steps, at least 0.

    Returns:
      The prototypes after the last step, and the losses before each, `[num_steps]`.

    Raises:
      ValueError: if `num_steps` is negative.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> one, there = jnp.ones((1, 1)), jnp.array([True])
      >>> _, losses = distil_prototypes(
      ...     lambda x: x, optax.sgd(1.0), one, one, there, 2 * one, 0.5 * one, there, ridge=1.0, num_steps=2
      ... )
      >>> bool(losses[1] < losses[0])
      True
    """
    if num_steps < 0:
        raise ValueError(f"num_steps must be at least 0, got {num_steps}.")

    def loss(protos: jax.Array) -> jax.Array:
        return krr_loss(features, labels, mask, features_fn(protos), proto_labels, proto_mask, ridge)

    def step(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
        protos, opt_state = carry
        value, grads = jax.value_and_grad(loss)(protos)
        update, opt_state = tx.update(grads, opt_state, protos)
        return (optax.apply_updates(protos, update), opt_state), value

    (protos, _), losses = jax.lax.scan(step, (protos, tx.init(protos)), None, length=num_steps)
    return protos, losses


def device_centric(shares: jax.Array, tau: float | jax.Array) -> jax.Array:
    """How a device wants its knowledge spread over the classes: `q = normalise((1 - tau) p + tau)`.

    Args:
      shares: `p`, `[K]`, the shares of the classes among its own samples.
      tau: between 0, its own classes only, and 1, all classes alike; a traced scalar is allowed.

    Returns:
      `[K]`, of sum 1.

    Raises:
      ValueError: if `tau` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> device_centric(jnp.array([1.0, 0.0]), 0.5).tolist()
      [0.6666666865348816, 0.3333333432674408]
    """
    if isinstance(tau, int | float) and not 0 <= tau <= 1:
        raise ValueError(f"tau must satisfy 0 <= tau <= 1, got {tau}.")
    tau = jnp.asarray(tau, shares.dtype)
    wanted = (1 - tau) * shares + tau
    return wanted / jnp.maximum(wanted.sum(), jnp.finfo(shares.dtype).tiny)


def sample_prototypes(
    key: jax.Array, wanted: jax.Array, labels: jax.Array, mask: jax.Array, num_samples: int
) -> tuple[jax.Array, jax.Array]:
    """Draws prototypes without replacement, those of class `k` in proportion to `q_k`.

    Prototype `i` has the weight `q_{y_i} / n_{y_i}`, with `n_k` the prototypes of class `k`, and each draw takes one of
    those left in proportion to their weights. The number is fixed, so that a device's downlink is bounded; the
    published code fixes the number of each class.

    Args:
      key: PRNG key.
      wanted: `q`, `[K]`, at least 0.
      labels: `[P]` integers in `[0, K)`.
      mask: `[P]` bool, the prototypes to choose from.
      num_samples: static number, at least 1.

    Returns:
      `[num_samples]` int32 indices, drawn ones first and 0 after them; and `[num_samples]` bool, whether drawn: all,
      unless there are fewer of positive weight.

    Raises:
      ValueError: if `num_samples` is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> labels, there = jnp.array([0, 1, 1]), jnp.array([True, True, False])
      >>> index, drawn = sample_prototypes(jax.random.key(0), jnp.array([0.0, 1.0]), labels, there, 2)
      >>> index.tolist(), drawn.tolist()
      ([1, 0], [True, False])
    """
    check_positive(num_samples=num_samples)
    member = mask[None, :] & (
        labels.astype(jnp.int32)[None, :] == jnp.arange(wanted.shape[0], dtype=jnp.int32)[:, None]
    )
    counts = member.sum(axis=1).astype(wanted.dtype)
    weights = jnp.where(mask, (wanted / jnp.maximum(counts, 1))[labels], jnp.zeros((), wanted.dtype))
    scores = jnp.log(weights) + jax.random.gumbel(key, weights.shape, wanted.dtype)
    short = max(num_samples - scores.shape[0], 0)
    found, index = jax.lax.top_k(jnp.pad(scores, (0, short), constant_values=-jnp.inf), num_samples)
    drawn = found > -jnp.inf
    return jnp.where(drawn, index, 0).astype(jnp.int32), drawn
