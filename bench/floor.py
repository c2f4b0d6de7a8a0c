"""The time below which no program can go: the operations at the rate of a large matmul, the bytes at that of a copy.

Work is counted from the algorithm and never from a program: multiplications and additions of the model's matmuls, in
the fewest that give the exact result, and what must come from memory and go back at least once. What is elementwise
(activations, losses, optimisers) is not counted. So a program can come close to its floor and not below it, unless its
data fit into a cache, which is faster than the copy.
"""

import time
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Work(NamedTuple):
    """What a program has to do."""

    operations: float
    """Multiplications and additions."""
    bytes: float
    """Bytes read and written."""


class Ceilings(NamedTuple):
    """What the hardware can do, measured: all cores of a CPU, or one accelerator."""

    operations: float
    """Multiplications and additions a second in a large matmul."""
    bytes: float
    """Bytes a second, read and written, where every number of a large array is changed in place."""

    def seconds(self, work: Work) -> float:
        """The floor, `max(operations / rate, bytes / rate)`."""
        return max(work.operations / self.operations, work.bytes / self.bytes)


def measure_ceilings(dtype: jax.typing.DTypeLike, *, side: int | None = None, repeats: int = 25) -> Ceilings:
    """Times a matmul of two square matrices, and a change of sign in place, and takes the fastest of several calls.

    In place, because a new array is written to memory that the operating system has to hand out first.

    Args:
      dtype: of the matrices.
      side: rows of a matrix; default: what keeps the backend busy for milliseconds. The array that changes its sign
        holds sixteen matrices.
      repeats: calls of each.

    Returns:
      The two rates.
    """
    side = side or (2048 if jax.default_backend() == "cpu" else 8192)
    matrix = jax.random.uniform(jax.random.key(0), (side, side), jnp.float32).astype(dtype)
    product = jax.jit(jnp.matmul)
    array = jnp.ones(16 * side**2, dtype)
    num_bytes = 2 * array.nbytes
    negative = jax.jit(jnp.negative, donate_argnums=0)
    matmul_seconds, copy_seconds = [], []
    for _ in range(repeats + 1):  # the first compiles
        start = time.perf_counter()
        jax.block_until_ready(product(matrix, matrix))
        middle = time.perf_counter()
        array = jax.block_until_ready(negative(array))
        matmul_seconds.append(middle - start)
        copy_seconds.append(time.perf_counter() - middle)
    return Ceilings(2 * side**3 / min(matmul_seconds[1:]), num_bytes / min(copy_seconds[1:]))


class Layer(NamedTuple):
    """A layer whose work is a matmul."""

    num_in: int
    """Rows of the kernel as a matrix."""
    num_out: int
    """Columns of the kernel."""
    num_positions: int
    """Rows of the matmul that one example makes: positions of a convolution."""
    products: int
    """Multiplications for one example; those with padding are not counted."""

    @property
    def operations(self) -> int:
        """Multiplications and additions for one example, in one of the layer's matmuls."""
        return 2 * self.products

    @property
    def num_params(self) -> int:
        """Numbers in kernel and bias."""
        return (self.num_in + 1) * self.num_out


def dense(num_in: int, num_out: int) -> Layer:
    """A linear map with bias."""
    return Layer(num_in, num_out, num_positions=1, products=num_in * num_out)


def conv(side: int, window: int, num_in: int, num_out: int) -> Layer:
    """A convolution of a square image, stride 1, as much padding as keeps the side (`window` odd), with bias.

    A row of `side` positions meets `side * window - 2 * (1 + ... + window // 2)` pixels that are not padding.
    """
    reach = window // 2
    pixels = side * window - reach * (reach + 1)
    return Layer(window**2 * num_in, num_out, num_positions=side**2, products=pixels**2 * num_in * num_out)


def forward(layers: Iterable[Layer], num_examples: int) -> int:
    """Operations of the outputs alone, `sum_l B f_l` with `f_l` those of layer `l` for one example."""
    return num_examples * sum(layer.operations for layer in layers)


def gradient(layers: Iterable[Layer], num_examples: int) -> int:
    """Operations of a gradient with respect to all parameters.

    Outputs, gradient of the weights, gradient of the inputs, and the last not at the first layer:
    `B (2 f_1 + 3 f_2 + ... + 3 f_L)`. A client's SGD step needs no more.

    Args:
      layers: of the model, the first one first.
      num_examples: `B`.

    Returns:
      Multiplications and additions.
    """
    return num_examples * sum((3 if index else 2) * layer.operations for index, layer in enumerate(layers))


def meta_gradient(layers: Iterable[Layer], num_support: int, num_query: int) -> int:
    """Operations of the exact gradient through one SGD step, `v - lr H v`.

    `v` is the gradient of the query loss at the adapted parameters and `H` the Hessian of the support loss at the
    first ones. Each layer goes the cheaper of two ways:

    - with matrices: the gradient on the support set, `v`, and `H v`, which takes two matmuls where a gradient takes
      one, save outputs and gradients of the support set, which are there. In all `4 f` a support example at the first
      layer (outputs and weights, then both along `v`), `9 f` at the others, and `2 f` and `3 f` a query example;
    - with factors: a change of weights `x_s^T d_s` or `x_q^T d_q` is only ever multiplied by the other set's rows, so
      `x_q x_s^T` and `d_q d_s^T` take its place. The first layer is rid of the gradient on the support set and of
      the product with `v`, `2 f`; the others of two products with `v` and the same gradient, `3 f`. For it they pay
      `2 R_s R_q (n + 2 m)` and `6 R_s R_q (n + m)` with `R` rows of the matmul and a kernel `[n, m]`.

    Args:
      layers: of the model, the first one first.
      num_support: support examples.
      num_query: query examples.

    Returns:
      Multiplications and additions.
    """
    total = 0
    for index, layer in enumerate(layers):
        n, m = layer.num_in, layer.num_out
        pairs = num_support * num_query * layer.num_positions**2
        with_matrices = (9 if index else 4) * num_support * layer.operations
        saved = (3 if index else 2) * num_support * layer.operations
        paid = 2 * pairs * (3 * (n + m) if index else n + 2 * m)
        total += (3 if index else 2) * num_query * layer.operations + with_matrices - max(0, saved - paid)
    return total
