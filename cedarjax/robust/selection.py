"""What rules that select clients share: who is nearest, who is lowest, and the mean of those who are kept."""

import jax
import jax.numpy as jnp

from cedarjax.core.dtypes import accumulator


def num_present(weights: jax.Array) -> jax.Array:
    """Number of clients of positive weight, an int32 scalar.

    Args:
      weights: `[C]`.

    Returns:
      `n`.
    """
    return (weights > 0).sum(dtype=jnp.int32)


def check_num_byzantine(f: int) -> None:
    """Checks the number of attackers that a rule is to withstand.

    Args:
      f: the number.

    Raises:
      TypeError: if it is not an integer.
      ValueError: if it is negative.
    """
    if isinstance(f, bool) or not isinstance(f, int):
        raise TypeError(f"f must be an int, got {f!r}.")
    if f < 0:
        raise ValueError(f"f must be at least 0, got {f}.")


def check_enough(f: int, num_clients: int, min_clients: int, condition: str) -> None:
    """Checks that a cohort is large enough for a rule.

    Args:
      f: number of attackers to withstand.
      num_clients: `C`.
      min_clients: the fewest that will do.
      condition: the same in words of `f` and `num_clients`.

    Raises:
      ValueError: if it is not.
    """
    if num_clients < min_clients:
        raise ValueError(f"f must satisfy {condition}, got f = {f} and num_clients = {num_clients}.")


def mean_over(chosen: jax.Array, weights: jax.Array) -> jax.Array:
    """Coefficients of the weighted mean of some clients.

    Args:
      chosen: `[C]` bool.
      weights: `[C]`.

    Returns:
      `[C]`, adding up to 1; zeros if nobody is chosen.

    Example:
      >>> import jax.numpy as jnp
      >>> print(mean_over(jnp.array([True, False, True]), jnp.array([1.0, 5.0, 3.0])))
      [0.25 0.   0.75]
    """
    kept = jnp.where(chosen & (weights > 0), weights.astype(accumulator(weights)), 0)
    total = kept.sum()
    return kept / jnp.where(total > 0, total, 1)


def lowest(scores: jax.Array, num_selected: jax.Array | int) -> jax.Array:
    """The clients of lowest score; of equal ones the first.

    Args:
      scores: `[C]`; infinite for those who are not to be selected while others are left.
      num_selected: how many.

    Returns:
      `[C]` bool.

    Example:
      >>> import jax.numpy as jnp
      >>> lowest(jnp.array([3.0, 1.0, 3.0, 2.0]), 3).tolist()
      [True, True, False, True]
    """
    places = jnp.argsort(jnp.argsort(scores, stable=True), stable=True)
    return places < jnp.asarray(num_selected).astype(places.dtype)


def distances_of(gram: jax.Array, present: jax.Array) -> jax.Array:
    """Squared distances between clients.

    Args:
      gram: `[C, C]` inner products about any centre.
      present: `[C]` bool.

    Returns:
      `[C, C]`, at least 0, 0 on the diagonal; infinite where either client is absent.

    Example:
      >>> import jax.numpy as jnp
      >>> print(distances_of(jnp.array([[1.0, 0.0], [0.0, 4.0]]), jnp.array([True, True])))
      [[0. 5.]
       [5. 0.]]
    """
    squares = jnp.diagonal(gram)
    # Summed so that the distance from one to the other is that from the other to the one, to the last bit.
    distances = jnp.maximum(squares[:, None] + squares[None, :] - (gram + gram.T), 0)
    distances = jnp.where(jnp.eye(squares.size, dtype=bool), 0, distances)
    return jnp.where(present[:, None] & present[None, :], distances, jnp.inf)
