"""How far a simulated upload is from the observed one, and how unlike a picture a guess is.

References: Zhu, Liu, Han, `Deep Leakage from Gradients <https://arxiv.org/abs/1906.08935>`_, 2019 (squared distance);
Geiping, Bauermeister, Dröge, Moeller, `Inverting Gradients <https://arxiv.org/abs/2003.14053>`_, 2020 (cosine, total
variation). The distance for signs asks for no more than what a one-bit upload tells.

All distances are free of scale (of an observation that is 0 they are not divided by it), run over everything that was
sent, and read nothing that was not: `mask` is a tree shaped like the upload whose leaves are scalars, as in
`Upload.mask`, or have the shape of the leaf, for sparse uploads.
"""

import jax
import jax.numpy as jnp

from cedarjax.core.dtypes import accumulator
from cedarjax.core.types import PyTree


def _sent(tree: PyTree, mask: PyTree | None) -> list[jax.Array]:
    """Leaves in the accumulator's dtype, 0 where nothing was sent."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    leaves = [leaf.astype(accumulator(leaf)) for leaf in leaves]
    if mask is None:
        return leaves
    if jax.tree.structure(mask) != jax.tree.structure(tree):
        raise ValueError(
            f"mask must have the structure of the upload, {jax.tree.structure(tree)}, got {jax.tree.structure(mask)}."
        )
    kept = []
    for leaf, sent in zip(leaves, jax.tree.leaves(mask), strict=True):
        if jnp.ndim(sent) != 0 and jnp.shape(sent) != leaf.shape:
            raise ValueError(f"mask must hold scalars or arrays of shape {leaf.shape}, got {jnp.shape(sent)}.")
        kept.append(jnp.where(jnp.asarray(sent) > 0, leaf, jnp.zeros((), leaf.dtype)))
    return kept


def _dot(one: list[jax.Array], other: list[jax.Array]) -> jax.Array:
    dots = [jnp.vdot(a, b, precision=jax.lax.Precision.HIGHEST) for a, b in zip(one, other, strict=True)]
    return sum(dots[1:], start=dots[0]) if dots else jnp.zeros(())


def _relative(square: jax.Array, to: jax.Array) -> jax.Array:
    return square / jnp.where(to > 0, to, jnp.ones((), to.dtype))


def _inverse_norm(leaves: list[jax.Array]) -> jax.Array:
    """`1 / |leaves|`, 0 for a vector that is 0, with derivatives that are finite there."""
    square = _dot(leaves, leaves)
    is_zero = square == 0
    return jnp.where(is_zero, jnp.zeros_like(square), jax.lax.rsqrt(jnp.where(is_zero, jnp.ones_like(square), square)))


def squared_distance(simulated: PyTree, observed: PyTree, mask: PyTree | None = None) -> jax.Array:
    """`sum (simulated - observed)^2 / sum observed^2`.

    Args:
      simulated: the upload of a guess.
      observed: the upload.
      mask: what was sent, everything by default.

    Returns:
      Scalar; 0 for a perfect match, 1 for a guess whose upload is 0.

    Example:
      >>> import jax.numpy as jnp
      >>> print(squared_distance({"a": jnp.array([1.0, 0.0])}, {"a": jnp.array([2.0, 0.0])}))
      0.25
    """
    seen, guess = _sent(observed, mask), _sent(simulated, mask)
    apart = [a - b for a, b in zip(guess, seen, strict=True)]
    return _relative(_dot(apart, apart), _dot(seen, seen))


def cosine_distance(simulated: PyTree, observed: PyTree, mask: PyTree | None = None) -> jax.Array:
    """`1 - <simulated, observed> / (|simulated| |observed|)`, over all that was sent as one vector.

    Args:
      simulated: the upload of a guess.
      observed: the upload.
      mask: what was sent, everything by default.

    Returns:
      Scalar in [0, 2]; 1 where either is 0.

    Example:
      >>> import jax.numpy as jnp
      >>> print(cosine_distance({"a": jnp.array([3.0, 0.0])}, {"a": jnp.array([0.0, 1.0])}))
      1.0
    """
    seen, guess = _sent(observed, mask), _sent(simulated, mask)
    return 1 - _dot(guess, seen) * _inverse_norm(guess) * _inverse_norm(seen)


def sign_distance(simulated: PyTree, observed: PyTree, mask: PyTree | None = None) -> jax.Array:
    """Share of the simulated upload's energy that has the wrong sign.

    `sum max(-sign(observed) simulated, 0)^2 / sum simulated^2`, for uploads that tell signs and little else. Zeros of
    `observed` are not read.

    Args:
      simulated: the upload of a guess.
      observed: the upload as it was decompressed.
      mask: what was sent, everything by default.

    Returns:
      Scalar in [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> print(sign_distance({"a": jnp.array([1.0, 3.0])}, {"a": jnp.array([1.0, -1.0])}))
      0.9
    """
    seen, guess = _sent(observed, mask), _sent(simulated, mask)
    wrong = [jnp.maximum(-jnp.sign(b) * a, 0) for a, b in zip(guess, seen, strict=True)]
    return _relative(_dot(wrong, wrong), _dot(guess, guess))


def total_variation(x: jax.Array) -> jax.Array:
    """Mean absolute difference of neighbouring pixels, down and across, summed over the two directions.

    Args:
      x: images `[..., H, W, F]`.

    Returns:
      Scalar, in the accumulator's dtype.

    Raises:
      ValueError: if there are fewer than three axes, or one row or column.

    Example:
      >>> import jax.numpy as jnp
      >>> print(total_variation(jnp.array([[0.0, 1.0], [0.0, 1.0]])[..., None]))
      1.0
    """
    if x.ndim < 3 or min(x.shape[-3:-1]) < 2:
        raise ValueError(f"x must be [..., H, W, F] with H, W >= 2, got the shape {x.shape}.")
    x = x.astype(accumulator(x))
    down, across = jnp.diff(x, axis=-3), jnp.diff(x, axis=-2)
    return jnp.abs(down).mean() + jnp.abs(across).mean()
