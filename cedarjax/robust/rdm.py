"""Representational dissimilarity matrices: what a model holds to be alike, and whether two models agree on it.

Reference: You et al., `A framework reforming personalized Internet of Things by federated meta-learning
<https://doi.org/10.1038/s41467-025-59217-z>`_, 2025. The published code correlates the full similarity matrices,
diagonal and both triangles, and centres them by their sum over the number of *rows*, so that unrelated models score
0.99. Here it is the Pearson correlation of the upper triangles; `compat=True` gives the published number.
"""

import jax
import jax.numpy as jnp

from cedarjax.core.correlation import pearson
from cedarjax.core.dtypes import accumulator


def _wide(x: jax.Array, name: str) -> jax.Array:
    x = jnp.asarray(x)
    if x.ndim != 2:
        raise ValueError(f"{name} must be [S, K], got the shape {x.shape}.")
    return x.astype(accumulator(x))


def _squared_distances(x: jax.Array) -> jax.Array:
    """`[S, S]` from the differences themselves, which keep the digits of close rows."""
    squares = jnp.square(x[:, None, :] - x[None, :, :]).sum(axis=-1)
    # XLA may fuse what comes before into the difference and round its two sides differently.
    return jnp.where(jnp.eye(x.shape[0], dtype=bool), jnp.zeros_like(squares), (squares + squares.T) / 2)


def rdm(logits: jax.Array) -> jax.Array:
    """Cosine dissimilarity between the class probabilities of all pairs of stimuli.

    `rdm[a, b] = 1 - cos(p_a, p_b)` with `p = softmax(logits)`, computed as `|u_a - u_b|^2 / 2` of the unit vectors.

    Args:
      logits: `[S, K]`.

    Returns:
      `[S, S]` in `[0, 1]`, symmetric with a zero diagonal, float32 or wider.

    Raises:
      ValueError: if `logits` is not a matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> rdm(jnp.array([[0.0, 100.0], [100.0, 0.0], [0.0, 100.0]]))
      Array([[0., 1., 0.],
             [1., 0., 1.],
             [0., 1., 0.]], dtype=float32)
    """
    probabilities = jax.nn.softmax(_wide(logits, "logits"), axis=-1)
    unit = probabilities / jnp.linalg.norm(probabilities, axis=-1, keepdims=True)
    return _squared_distances(unit) / 2


def euclidean_rdm(outputs: jax.Array) -> jax.Array:
    """Euclidean distance between the outputs of all pairs of stimuli.

    For regression, where there are no class probabilities and the cosine of one output is only its sign: the model's
    outputs, or its last hidden layer.

    Args:
      outputs: `[S, K]`.

    Returns:
      `[S, S]`, symmetric with a zero diagonal, float32 or wider.

    Raises:
      ValueError: if `outputs` is not a matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> euclidean_rdm(jnp.array([[1.0], [3.0]]))
      Array([[0., 2.],
             [2., 0.]], dtype=float32)
    """
    return jnp.sqrt(_squared_distances(_wide(outputs, "outputs")))


def upper_triangle(matrix: jax.Array) -> jax.Array:
    """Entries above the diagonal, row by row.

    Args:
      matrix: `[S, S]`.

    Returns:
      `[S * (S - 1) / 2]`.

    Example:
      >>> import jax.numpy as jnp
      >>> upper_triangle(jnp.arange(9).reshape(3, 3)).tolist()
      [1, 2, 5]
    """
    with jax.ensure_compile_time_eval():  # a constant of the compiled program, not a part of it
        rows, columns = jnp.triu_indices(matrix.shape[0], k=1)
    return matrix[rows, columns]


def rdm_similarity(rdm_a: jax.Array, rdm_b: jax.Array, compat: bool = False) -> jax.Array:
    """How far two models agree on which stimuli are alike.

    Pearson correlation of the upper triangles, diagonal excluded. With `compat`, with `A = 1 - rdm_a`, `B = 1 - rdm_b`
    in full and `c(X) = X - sum(X) / S`: `sum(c(A) c(B)) / sqrt(sum(c(A)^2) sum(c(B)^2))`.

    Args:
      rdm_a: `[S, S]` dissimilarities.
      rdm_b: `[S, S]` dissimilarities of the same stimuli.
      compat: the published arithmetic.

    Returns:
      Scalar in `[-1, 1]`, float32 or wider; 0 if either triangle is constant. NaN or Inf in the input give NaN.

    Raises:
      ValueError: if the two are not square matrices of one size, at least 2.

    Example:
      >>> import jax.numpy as jnp
      >>> a = jnp.array([[0.0, 1.0, 2.0], [1.0, 0.0, 3.0], [2.0, 3.0, 0.0]])
      >>> print(rdm_similarity(a, 2 * a + 1), rdm_similarity(a, -a), rdm_similarity(a, jnp.zeros((3, 3))))
      1.0 -1.0 0.0
    """
    rdm_a, rdm_b = jnp.asarray(rdm_a), jnp.asarray(rdm_b)
    size = rdm_a.shape[0] if rdm_a.ndim else 0
    if size < 2 or rdm_a.shape != (size, size) or rdm_b.shape != (size, size):
        raise ValueError(
            f"rdm_a and rdm_b must be [S, S] with one S >= 2, got the shapes {rdm_a.shape} and {rdm_b.shape}."
        )
    dtype = accumulator(rdm_a, rdm_b)
    rdm_a, rdm_b = rdm_a.astype(dtype), rdm_b.astype(dtype)
    if not compat:
        return pearson(upper_triangle(rdm_a), upper_triangle(rdm_b))
    a, b = ((1 - x) - (1 - x).sum() / size for x in (rdm_a, rdm_b))
    lengths = jnp.sqrt(jnp.square(a).sum() * jnp.square(b).sum())
    none = lengths == 0
    correlation = (a * b).sum() / jnp.where(none, jnp.ones_like(lengths), lengths)
    return jnp.where(none, jnp.zeros_like(correlation), jnp.clip(correlation, -1, 1))
