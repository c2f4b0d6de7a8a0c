"""Importance of a layer by means other than its representation: size of the update, gradients, direction.

References: Fisher information as the mean squared gradient, Kirkpatrick et al., `Overcoming catastrophic forgetting
<https://arxiv.org/abs/1612.00796>`_, 2017; first-order Taylor importance, Molchanov et al., `Importance Estimation for
Neural Network Pruning <https://arxiv.org/abs/1906.10771>`_, 2019. Every function returns `[L]` float32, larger = more
important.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from cedarjax.core.dtypes import accumulator
from cedarjax.core.names import layer_leaves
from cedarjax.core.types import Params, PyTree


def _sums(fun: Callable[..., jax.Array], names: Sequence[str], *trees: PyTree) -> jax.Array:
    """`[L]` float32 sums of `fun(*leaves)` over the entries of each layer."""

    def total(*leaves: jax.Array) -> jax.Array:
        wide = (x.astype(accumulator(x)) for x in leaves)
        return fun(*wide).sum().astype(jnp.float32)

    layers = zip(*(layer_leaves(tree, names) for tree in trees), strict=True)
    return jnp.stack([jnp.stack([total(*leaves) for leaves in zip(*layer, strict=True)]).sum() for layer in layers])


def update_norm(delta: Params, names: Sequence[str]) -> jax.Array:
    """Euclidean norm of each layer's update.

    Args:
      delta: pseudo-gradient.
      names: `L` layer names.

    Returns:
      `[L]`.

    Example:
      >>> import jax.numpy as jnp
      >>> update_norm({"a": {"kernel": jnp.array([3.0, 4.0])}, "b": {"bias": jnp.array([1.0])}}, ("a", "b"))
      Array([5., 1.], dtype=float32)
    """
    return jnp.sqrt(_sums(jnp.square, names, delta))


def fisher(gradient: Params, names: Sequence[str]) -> jax.Array:
    """Mean squared gradient over the parameters of each layer.

    Args:
      gradient: gradient of the mean loss over the client's data at the trained parameters.
      names: `L` layer names.

    Returns:
      `[L]`.

    Example:
      >>> import jax.numpy as jnp
      >>> fisher({"a": {"kernel": jnp.array([1.0, 3.0])}, "b": {"bias": jnp.array([2.0])}}, ("a", "b"))
      Array([5., 4.], dtype=float32)
    """
    sizes = [sum(leaf.size for leaf in leaves) for leaves in layer_leaves(gradient, names)]
    return _sums(jnp.square, names, gradient) / jnp.asarray(sizes, jnp.float32)


def taylor(params: Params, gradient: Params, names: Sequence[str]) -> jax.Array:
    """First-order estimate of what each layer contributes to the loss, `sum |theta * gradient|`.

    Args:
      params: trained parameters.
      gradient: gradient of the mean loss over the client's data at `params`.
      names: `L` layer names.

    Returns:
      `[L]`.

    Example:
      >>> import jax.numpy as jnp
      >>> params, gradient = {"a": jnp.array([1.0, -2.0])}, {"a": jnp.array([3.0, 1.0])}
      >>> taylor(params, gradient, ("a",))
      Array([5.], dtype=float32)
    """
    return _sums(lambda theta, g: jnp.abs(theta * g), names, params, gradient)


def cosine_change(delta: Params, previous: Params, names: Sequence[str]) -> jax.Array:
    """How much each layer's update turned since the previous one, `1 - cos(delta_l, previous_l)`.

    Args:
      delta: this round's pseudo-gradient.
      previous: the previous round's, of the same structure at least below `names`.
      names: `L` layer names.

    Returns:
      `[L]` in `[0, 2]`; 1 where either update is zero.

    Example:
      >>> import jax.numpy as jnp
      >>> now, before = jnp.array([1.0, 0.0]), jnp.array([-2.0, 0.0])
      >>> cosine_change({"a": now, "b": now}, {"a": before, "b": 0 * before}, ("a", "b"))
      Array([2., 1.], dtype=float32)
    """
    dots = _sums(lambda x, y: x * y, names, delta, previous)
    lengths = update_norm(delta, names) * update_norm(previous, names)
    cosine = dots / jnp.where(lengths > 0, lengths, jnp.ones_like(lengths))
    return 1 - jnp.clip(jnp.where(lengths > 0, cosine, jnp.zeros_like(cosine)), -1, 1)
