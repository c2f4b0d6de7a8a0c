"""The knowledge cache: the last logits of every sample of every client, and what a sample learns from its relations.

Reference: `FedCache <https://arxiv.org/abs/2308.07816>`_, as in `distill.relations`. The published code keeps the
logits with the graph of their gradient, and reads the zeros of what nobody has written yet as a uniform teacher. Here
no gradient passes through the cache in either direction, and only what has been written counts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core import FederatedDataset, accumulator, check_positive
from cedarjax.distill.relations import Relations

ReduceFn = Callable[[jax.Array, jax.Array], jax.Array]
"""`(logits [B, R, K], mask [B, R]) -> [B, K]`; a row without any mask may come out as anything."""


class KnowledgeCache(NamedTuple):
    """What the server holds; samples are numbered over all clients."""

    logits: jax.Array
    """`[M, K]`, what was last written of each sample; finite."""
    written: jax.Array
    """`[M]` bool, whether anything was."""
    relations: jax.Array
    """`[M, R]` int32, the related samples."""
    relation_mask: jax.Array
    """`[M, R]` bool, which of them exist."""


def init_cache(relations: Relations, num_classes: int, *, dtype: jnp.dtype = jnp.float32) -> KnowledgeCache:
    """An empty cache.

    Args:
      relations: from `build_relations`.
      num_classes: `K`.
      dtype: of the logits that are kept.

    Returns:
      A `KnowledgeCache` that nobody has written to.

    Raises:
      ValueError: if the relations are not `[M, R]` or `num_classes` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> relations = Relations(jnp.array([[1], [0]]), jnp.ones((2, 1), bool))
      >>> cache = write(init_cache(relations, 3), jnp.array([0]), jnp.array([[1.0, 2.0, 3.0]]))
      >>> zbar, has = fetch(cache, jnp.array([0, 1]))
      >>> zbar.tolist(), has.tolist()
      ([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]], [False, True])
    """
    check_positive(num_classes=num_classes)
    index, mask = jnp.asarray(relations.index, jnp.int32), jnp.asarray(relations.mask, bool)
    if index.ndim != 2 or mask.shape != index.shape:
        raise ValueError(f"relations must be [M, R] twice, got the shapes {index.shape} and {mask.shape}.")
    count = index.shape[0]
    return KnowledgeCache(jnp.zeros((count, num_classes), dtype), jnp.zeros(count, bool), index, mask)


def mean_logits(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the rows of a mask; a `ReduceFn`.

    Args:
      logits: `[B, R, K]`.
      mask: `[B, R]` bool.

    Returns:
      `[B, K]`, zeros where nothing counts; summed in at least float32.

    Example:
      >>> import jax.numpy as jnp
      >>> mean_logits(jnp.array([[[1.0], [3.0], [9.0]]]), jnp.array([[True, True, False]])).tolist()
      [[2.0]]
    """
    dtype = accumulator(logits)
    total = jnp.where(mask[:, :, None], logits, jnp.zeros_like(logits)).astype(dtype).sum(axis=1)
    return total / jnp.maximum(mask.sum(axis=1), 1).astype(dtype)[:, None]


def fetch(cache: KnowledgeCache, index: jax.Array, *, reduce_fn: ReduceFn = mean_logits) -> tuple[jax.Array, jax.Array]:
    """`zbar_i`: the mean of the cached logits of the samples related to `i` that have been written.

    Args:
      cache: the cache.
      index: `[B]` integers, global sample indices in `[0, M)`; one beyond reads the last sample.
      reduce_fn: `(logits [B, R, K], mask [B, R]) -> [B, K]`, for instance `median_logits`.

    Returns:
      `[B, K]` in the dtype of the cache, zeros where nothing is known; and `[B]` bool, whether anything is.

    Raises:
      ValueError: if `reduce_fn` returns another shape.
    """
    related = cache.relations.at[index].get(mode="clip")
    known = cache.relation_mask.at[index].get(mode="clip") & cache.written.at[related].get(mode="clip")
    logits = jax.lax.stop_gradient(cache.logits.at[related].get(mode="clip"))
    has = known.any(axis=1)
    zbar = reduce_fn(logits, known)
    if zbar.shape != (related.shape[0], logits.shape[2]):
        raise ValueError(
            f"reduce_fn must return [B, K] = {(related.shape[0], logits.shape[2])}, got the shape {zbar.shape}."
        )
    return jnp.where(has[:, None], zbar, jnp.zeros_like(zbar)).astype(cache.logits.dtype), has


def write(cache: KnowledgeCache, index: jax.Array, logits: jax.Array, mask: jax.Array | None = None) -> KnowledgeCache:
    """Keeps the logits of some samples, without their gradient.

    Of several rows of one sample the last one that counts is kept, on every backend. A row with a logit that is not
    finite is not written, so that a client whose training has diverged spoils nobody's teacher.

    Args:
      cache: the cache.
      index: `[B]` integers, global sample indices; a row outside `[0, M)` is not written.
      logits: `[B, K]`.
      mask: `[B]` bool, the rows that are written; default: all.

    Returns:
      The cache after that.

    Raises:
      ValueError: if the shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> cache = init_cache(Relations(jnp.zeros((3, 1)), jnp.zeros((3, 1), bool)), 1)
      >>> logits = jnp.array([[1.0], [2.0], [3.0], [4.0]])
      >>> cache = write(cache, jnp.array([2, 0, 2, 1]), logits, jnp.array([True, True, True, False]))
      >>> cache.logits.tolist(), cache.written.tolist()
      ([[2.0], [0.0], [3.0]], [True, False, True])
    """
    count, num_classes = cache.logits.shape
    if jnp.ndim(index) != 1 or logits.shape != (index.shape[0], num_classes):
        raise ValueError(
            f"logits must be [B, K] = {(*jnp.shape(index), num_classes)} for index [B], got the shape {logits.shape}."
        )
    index = index.astype(jnp.int32)
    logits = jax.lax.stop_gradient(logits).astype(cache.logits.dtype)
    kept = (index >= 0) & (index < count) & jnp.isfinite(logits).all(axis=1)
    if mask is not None:
        kept = kept & mask
    # A scatter may write equal indices in any order. So rows are sorted, stably, and the last of each run is written.
    index = jnp.where(kept, index, count)
    order = jnp.argsort(index, stable=True)
    index = index[order]
    last = jnp.pad(index[1:] != index[:-1], (0, 1), constant_values=True)
    index = jnp.where(last, index, count)
    return cache._replace(
        logits=cache.logits.at[index].set(logits[order], mode="drop"),
        written=cache.written.at[index].set(True, mode="drop"),
    )


def with_index(dataset: FederatedDataset, *, start: int = 0) -> FederatedDataset:
    """The federation with the global index of every sample among its examples, where the algorithms look for it.

    The index travels with the rows, whoever gathers them and however clients are numbered later on.

    Args:
      dataset: its examples are a dict, such as `{"x", "y"}`.
      start: index of the first sample, for a cache that several federations share.

    Returns:
      The same with an entry `"index"`, `[n]` int32: client `i`'s row `j` has `start + offsets[i] + j`.

    Raises:
      ValueError: if the examples are not a dict or `start` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from cedarjax.data import federated_dataset
      >>> dataset = with_index(federated_dataset({"x": jnp.array([1.0, 2.0, 3.0])}, client_id=[1, 0, 1]))
      >>> dataset.examples["x"].tolist(), dataset.examples["index"].tolist()
      ([2.0, 1.0, 3.0], [0, 1, 2])
    """
    if start < 0:
        raise ValueError(f"start must be at least 0, got {start}.")
    if not isinstance(dataset.examples, dict):
        raise ValueError(f"dataset.examples must be a dict, got {type(dataset.examples).__name__}.")
    index = start + jnp.arange(dataset.num_examples, dtype=jnp.int32)
    return FederatedDataset(
        {**dataset.examples, "index": index}, dataset.offsets, dataset.num_support, dataset.max_examples
    )
