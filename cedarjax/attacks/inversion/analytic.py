"""The input of a fully connected layer, read off its gradient.

Reference: Phong, Aono, Hayashi, Wang, Moriai, `Privacy-Preserving Deep Learning via Additively Homomorphic Encryption
<https://doi.org/10.1109/TIFS.2017.2787987>`_, 2018; Geiping et al. (`inverting_gradients.py`), proposition 3.1.

For one example and `z = x W + b` the chain rule gives `dL/dW[:, j] = x dL/db[j]`, so the quotient of the two is the
input, whatever the loss and the layers above. The quotient does not change when both are scaled: the update of one SGD
step serves as well as the gradient, and the learning rate need not be known. Of a batch, a unit gives the mean of its
inputs weighted by their `dL/db[j]`: an example of the batch where it alone activates the unit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core.dtypes import accumulator


class LinearInput(NamedTuple):
    """The input that a layer's gradient gives away."""

    x: jax.Array
    """`[in]`; zeros where `ok` is False."""
    unit: jax.Array
    """int32 scalar, the unit from which it was read."""
    ok: jax.Array
    """bool scalar: False where no unit has a finite bias gradient other than 0, so that nothing can be read."""


def _check(kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    kernel, bias = jnp.asarray(kernel), jnp.asarray(bias)
    if kernel.ndim != 2 or bias.shape != kernel.shape[1:] or bias.size == 0:
        raise ValueError(
            f"kernel and bias must be [in, out] and [out] with out >= 1, got {kernel.shape}, {bias.shape}."
        )
    return kernel, bias


def linear_input(kernel: jax.Array, bias: jax.Array) -> LinearInput:
    """Exact input of a fully connected layer, of one example.

    `x = (dL/dW[:, j]) / (dL/db[j])` for the unit `j` of largest finite `|dL/db[j]|`.

    Args:
      kernel: `[in, out]`, gradient of the kernel, or the update of one SGD step.
      bias: `[out]`, gradient of the bias, or the update of the same step.

    Returns:
      A `LinearInput` in the dtype of the kernel, exact up to rounding for a batch of one example.

    Raises:
      ValueError: for shapes that do not belong together.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> loss = lambda w: jnp.sum((jnp.array([1.0, 2.0]) @ w["kernel"] + w["bias"]) ** 2)
      >>> gradient = jax.grad(loss)({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})
      >>> linear_input(**gradient).x
      Array([1., 2.], dtype=float32)
    """
    kernel, bias = _check(kernel, bias)
    dtype = accumulator(kernel, bias)
    size = jnp.where(jnp.isfinite(bias), jnp.abs(bias), jnp.zeros((), bias.dtype))
    unit = jnp.argmax(size).astype(jnp.int32)
    ok = size[unit] > 0
    divisor = jnp.where(ok, bias[unit].astype(dtype), jnp.ones((), dtype))
    x = jnp.where(ok, kernel[:, unit].astype(dtype) / divisor, jnp.zeros((), dtype))
    return LinearInput(x.astype(kernel.dtype), unit, ok)


def linear_inputs(kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What every unit of a fully connected layer gives away of a batch.

    Row `j` is `sum_i w_ij x_i / sum_i w_ij` with `w_ij = dL_i/db[j]`: example `i` itself if only it activates unit `j`.

    Args:
      kernel: `[in, out]`, gradient of the kernel.
      bias: `[out]`, gradient of the bias.

    Returns:
      `[out, in]` in the dtype of the kernel, and `[out]` bool, where a row could be read; other rows are zeros.

    Raises:
      ValueError: for shapes that do not belong together.

    Example:
      >>> import jax.numpy as jnp
      >>> linear_inputs(jnp.array([[2.0, 0.0], [4.0, 0.0]]), jnp.array([2.0, 0.0]))
      (Array([[1., 2.],
             [0., 0.]], dtype=float32), Array([ True, False], dtype=bool))
    """
    kernel, bias = _check(kernel, bias)
    dtype = accumulator(kernel, bias)
    ok = jnp.isfinite(bias) & (bias != 0)
    divisor = jnp.where(ok, bias.astype(dtype), jnp.ones((), dtype))
    rows = jnp.where(ok[:, None], kernel.T.astype(dtype) / divisor[:, None], jnp.zeros((), dtype))
    return rows.astype(kernel.dtype), ok
