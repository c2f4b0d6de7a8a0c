"""Batches of one client's examples, never a row of padding among them.

A `LossFn` takes full batches and knows of no mask. So batches are cut from a stream: the client's valid rows in a fresh
order each epoch, one epoch after another, the last batch filled up from the start of the last order. When the batch
size divides the number of examples these are the usual shuffled epochs; a client with fewer examples than a batch
repeats them. The width of the padding never changes a batch.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from cedarjax.core.types import LossFn, Params, PyTree


class Stream(NamedTuple):
    """Shuffled epochs over rows `[start, start + num_rows)` of one client's examples."""

    orders: jax.Array
    """`[num_epochs, M]` int32; in each row the first `num_rows` entries are a permutation of
    `[0, num_rows)`."""
    start: jax.Array
    """int32 scalar, first row."""
    num_rows: jax.Array
    """int32 scalar, number of rows."""


def shuffled_epochs(key: jax.Array, start: jax.Array, count: jax.Array, *, length: int, num_epochs: int) -> Stream:
    """Draws the order of every epoch.

    Args:
      key: PRNG key; epoch `e` uses `fold_in(key, e)`.
      start: int32 scalar, first row.
      count: int32 scalar, number of rows; an empty stream reads row 0, whose loss the caller must drop.
      length: static bound on `count`, usually `M`.
      num_epochs: static number of epochs, at least 1.

    Returns:
      A `Stream` for `batch_indices`.
    """

    def order(epoch: jax.Array) -> jax.Array:
        draws = jax.random.uniform(jax.random.fold_in(key, epoch), (length,), jnp.float32)
        present = jnp.arange(length, dtype=jnp.int32) < count
        return jnp.argsort(jnp.where(present, draws, jnp.inf)).astype(jnp.int32)

    orders = jax.vmap(order)(jnp.arange(num_epochs, dtype=jnp.int32))
    start = jnp.where(count > 0, start, 0)
    return Stream(orders, jnp.asarray(start, jnp.int32), jnp.asarray(count, jnp.int32))


def check_positive(**counts: int) -> None:
    """Raises unless every count is a positive integer.

    Args:
      **counts: the arguments by name.

    Raises:
      ValueError: naming the argument and its value.
    """
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


Count = TypeVar("Count", int, jax.Array)


def num_batches(count: Count, batch_size: int, num_epochs: int) -> Count:
    """Batches that cover `num_epochs` epochs of `count` examples: `ceil(count * num_epochs / batch_size)`.

    Args:
      count: number of examples, a Python int or an int32 scalar.
      batch_size: examples per batch.
      num_epochs: passes over the data.

    Returns:
      The count in the type of `count`.

    Example:
      >>> num_batches(25, batch_size=10, num_epochs=2)
      5
    """
    return (count * num_epochs + batch_size - 1) // batch_size


def batch_indices(stream: Stream, step: jax.Array, batch_size: int) -> jax.Array:
    """Rows of the batch number `step`.

    Args:
      stream: from `shuffled_epochs`.
      step: int32 scalar, counted from 0.
      batch_size: static number of rows.

    Returns:
      `[B]` int32 indices into the examples; all valid when `stream.num_rows` is at least 1.
    """
    position = step * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
    count = jnp.maximum(stream.num_rows, 1)
    epoch = jnp.minimum(position // count, stream.orders.shape[0] - 1)
    return stream.start + stream.orders[epoch, position % count]


def take_rows(examples: PyTree, indices: jax.Array) -> PyTree:
    """Gathers rows of every leaf.

    Args:
      examples: leaves `[M, ...]`.
      indices: `[B]` int32 within `[0, M)`.

    Returns:
      Leaves `[B, ...]`.
    """
    return jax.tree.map(lambda x: x.at[indices].get(mode="promise_in_bounds"), examples)


def take_batch(examples: PyTree, stream: Stream, step: jax.Array, batch_size: int) -> PyTree:
    """The batch of a step; zeros for a client without rows, whose padding may hold anything.

    Args:
      examples: leaves `[M, ...]`.
      stream: from `shuffled_epochs`.
      step: int32 scalar, counted from 0.
      batch_size: static number of rows.

    Returns:
      Leaves `[B, ...]`, finite where the client's rows are.
    """
    batch = take_rows(examples, batch_indices(stream, step, batch_size))
    return jax.tree.map(lambda x: jnp.where(stream.num_rows > 0, x, jnp.zeros((), x.dtype)), batch)


def mean_loss(loss_fn: LossFn, params: Params, examples: PyTree, mask: jax.Array, key: jax.Array) -> jax.Array:
    """Exact mean of a loss over the rows of a mask.

    The loss is vmapped over batches of one row, so it must be a mean of per-example terms. A masked row costs time and
    nothing else: its value and its gradient are dropped, even when they are NaN, because row 0 of the mask stands in
    for it.

    Args:
      loss_fn: the contract `LossFn`.
      params: parameters.
      examples: leaves `[M, ...]`.
      mask: `[M]` bool; with no row at all the loss is 0.
      key: PRNG key, split over the rows.

    Returns:
      Scalar.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> square = lambda w, batch, key: jnp.mean((batch - w) ** 2)
      >>> rows, mask = jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])
      >>> mean_loss(square, jnp.float32(0.0), rows, mask, jax.random.key(0))
      Array(5., dtype=float32)
    """
    # A valid row stands in for the masked ones: where() alone would let NaN into the gradient.
    first = jnp.argmax(mask)
    rows = jnp.where(mask, jnp.arange(mask.shape[0], dtype=jnp.int32), first.astype(jnp.int32))
    batches = jax.tree.map(lambda x: x[:, None], take_rows(examples, rows))
    losses = jax.vmap(lambda batch, k: loss_fn(params, batch, k))(batches, jax.random.split(key, mask.shape[0]))
    total = jnp.where(mask, losses, jnp.zeros((), losses.dtype)).sum()
    return total / jnp.maximum(mask.sum(), 1).astype(losses.dtype)
