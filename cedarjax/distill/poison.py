"""What malicious clients write into a cache of knowledge, for simulation.

References: Tang, Wu, Gao, Wen, Wang, Sun, `Logits Poisoning Attack in Federated Distillation
<https://arxiv.org/abs/2401.03685>`_, 2024, reorders the confidences of the classes and leaves their values; Tang et
al., `Peak-Controlled Logits Poisoning Attack in Federated Distillation <https://arxiv.org/abs/2407.18039>`_, 2024, puts
a peak of chosen height on a wrong class. Of the reorderings the strongest is taken: the whole ranking is reversed.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

PoisonFn = Callable[[jax.Array], jax.Array]
"""`logits [..., K] -> [..., K]`."""


def permuted_logits(logits: jax.Array) -> jax.Array:
    """The same numbers with the ranking of the classes reversed: the surest class gets the smallest number.

    Args:
      logits: `[..., K]`; equal logits rank by class.

    Returns:
      `[..., K]`.

    Example:
      >>> import jax.numpy as jnp
      >>> permuted_logits(jnp.array([5.0, 1.0, 3.0, 2.0])).tolist()
      [1.0, 5.0, 2.0, 3.0]
    """
    rank = jnp.argsort(jnp.argsort(logits, axis=-1, stable=True), axis=-1)
    return jnp.take_along_axis(jnp.flip(jnp.sort(logits, axis=-1), axis=-1), rank, axis=-1)


def peaked_logits(height: float | jax.Array = 10.0) -> PoisonFn:
    """A peak on the runner-up, the wrong class that is easiest to believe, and zeros elsewhere.

    Args:
      height: of the peak, above 0; a traced scalar is allowed.

    Returns:
      A `poison_fn`.

    Raises:
      ValueError: if `height` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> peaked_logits(4.0)(jnp.array([5.0, 1.0, 3.0, 2.0])).tolist()
      [0.0, 0.0, 4.0, 0.0]
    """
    if isinstance(height, int | float) and not height > 0:
        raise ValueError(f"height must be above 0, got {height}.")

    def poison(logits: jax.Array) -> jax.Array:
        if logits.shape[-1] < 2:
            raise ValueError(f"logits must have at least 2 classes, got {logits.shape[-1]}.")
        runner_up = jax.lax.top_k(logits, 2)[1][..., 1]
        peak = jax.nn.one_hot(runner_up, logits.shape[-1], dtype=logits.dtype)
        return jnp.asarray(height, logits.dtype) * peak

    return poison


def poison_logits(logits: jax.Array, byzantine: jax.Array, poison_fn: PoisonFn = permuted_logits) -> jax.Array:
    """Poisons the rows of malicious clients and leaves those of the others.

    Args:
      logits: `[C, ..., K]`, or `[K]` with a scalar flag.
      byzantine: bool, as many leading axes of `logits` as it has; `[C]` for one flag a client.
      poison_fn: `permuted_logits`, `peaked_logits(height)`, or any other `[..., K] -> [..., K]`.

    Returns:
      Like `logits`.

    Raises:
      ValueError: if the axes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> poison_logits(jnp.array([[1.0, 2.0], [1.0, 2.0]]), jnp.array([False, True])).tolist()
      [[1.0, 2.0], [2.0, 1.0]]
    """
    axes = jnp.ndim(byzantine)
    if axes >= logits.ndim or logits.shape[:axes] != jnp.shape(byzantine):
        raise ValueError(
            f"byzantine must have leading axes of logits {logits.shape}, without the last, got the shape "
            f"{jnp.shape(byzantine)}."
        )
    flags = jnp.reshape(byzantine, jnp.shape(byzantine) + (1,) * (logits.ndim - axes))
    return jnp.where(flags, poison_fn(logits), logits)
