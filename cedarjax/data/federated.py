"""Federations from host arrays: check, sort by client, put on the device.

Clients of a result are always numbered `0..N-1`. Everything here runs once and on the host; what is drawn from a
federation in every round is drawn on the device, by `sample_cohort`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from cedarjax.core.dataset import FederatedDataset
from cedarjax.core.types import PyTree
from cedarjax.data._host import as_indices, as_labels
from cedarjax.data.partition import natural


def federated_dataset(
    examples: PyTree, client_id: ArrayLike, *, num_support: ArrayLike | None = None
) -> FederatedDataset:
    """Builds a federation from flat arrays and a column of client ids.

    Args:
      examples: arrays `[n, ...]` of numbers, for example `{"x": [n, ...], "y": [n]}`.
      client_id: `[n]` integers or strings. Ids are compacted: client `i` of the result is `numpy.unique(client_id)[i]`.
        The rows of a client keep their order.
      num_support: how many of a client's first rows are its support set, one number or `[N]`; all of them when None.

    Returns:
      A `FederatedDataset` on the default device.

    Raises:
      ValueError: if lengths differ, there are no examples, a value is not finite or does not fit the device's dtype, or
        `num_support` is out of range.
      TypeError: if a leaf does not hold numbers or the ids are floating point.

    Example:
      >>> import numpy as np
      >>> dataset = federated_dataset({"x": np.arange(4.0)}, client_id=["b", "a", "b", "b"])
      >>> dataset.num_clients, dataset.counts.tolist(), dataset.examples["x"].tolist()
      (2, [1, 3], [1.0, 0.0, 2.0, 3.0])
    """
    client_id = as_labels("client_id", client_id)
    if len(client_id) != (num_examples := _num_examples(examples)):
        raise ValueError(f"client_id must have n = {num_examples} rows like the examples, got {len(client_id)}.")
    return from_partition(examples, natural(client_id), num_support=num_support)


def from_partition(
    examples: PyTree, partition: Sequence[ArrayLike], *, num_support: ArrayLike | None = None
) -> FederatedDataset:
    """Builds a federation from flat arrays and one index array for each client.

    An example may belong to several clients or to none; the rows of a client come in the order of its indices.

    Args:
      examples: arrays `[n, ...]` of numbers.
      partition: `N` integer index arrays, as the partitioners return them.
      num_support: how many of a client's first rows are its support set, one number or `[N]`; all of them when None.

    Returns:
      A `FederatedDataset` on the default device.

    Raises:
      ValueError: as `federated_dataset`, and if a client is empty or an index is out of range.
      TypeError: if a leaf does not hold numbers or an index is not an integer.

    Example:
      >>> import numpy as np
      >>> dataset = from_partition({"x": np.arange(4.0)}, [np.array([3]), np.array([0, 1])])
      >>> dataset.num_clients, dataset.max_examples, dataset.examples["x"].tolist()
      (2, 2, [3.0, 0.0, 1.0])
    """
    num_examples = _num_examples(examples)
    if len(partition) == 0:
        raise ValueError("partition must hold at least one client, got none.")
    parts = [as_indices(f"partition[{client}]", part, num_examples) for client, part in enumerate(partition)]
    for client, part in enumerate(parts):
        if part.size == 0:
            raise ValueError(f"partition[{client}] must hold at least one example, got an empty client.")
    counts = np.array([part.size for part in parts], np.int64)
    if counts.sum() > np.iinfo(np.int32).max:
        raise ValueError(f"examples of all clients must number at most {np.iinfo(np.int32).max}, got {counts.sum()}.")
    order = np.concatenate(parts)
    return FederatedDataset(
        examples=jax.tree_util.tree_map_with_path(lambda path, leaf: _to_device(_name(path), leaf, order), examples),
        offsets=jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32),
        num_support=jnp.asarray(_support_sizes(num_support, counts), jnp.int32),
        max_examples=int(counts.max()),
    )


def select_clients(dataset: FederatedDataset, client_ids: ArrayLike) -> FederatedDataset:
    """Keeps some clients of a federation, with their support sets.

    Ids are compacted: client `i` of the result is client `client_ids[i]` of the given federation, and `max_examples`
    becomes the largest count among those kept.

    Args:
      dataset: a federation of `N` clients.
      client_ids: `[K]` distinct integers between 0 and `N - 1`.

    Returns:
      A `FederatedDataset` of `K` clients.

    Raises:
      ValueError: if no client is named, or one twice, or one that does not exist.
      TypeError: if the ids are not integers.

    Example:
      >>> import numpy as np
      >>> dataset = federated_dataset({"x": np.arange(4.0)}, client_id=[0, 0, 1, 2])
      >>> select_clients(dataset, [2, 0]).examples["x"].tolist()
      [3.0, 0.0, 1.0]
    """
    client_ids = as_indices("client_ids", client_ids, dataset.num_clients)
    if client_ids.size == 0 or np.unique(client_ids).size < client_ids.size:
        raise ValueError(f"client_ids must name at least one client and none twice, got {client_ids.tolist()}.")
    offsets = np.asarray(dataset.offsets)
    return from_partition(
        dataset.examples,
        [np.arange(offsets[client], offsets[client + 1]) for client in client_ids],
        num_support=np.asarray(dataset.num_support)[client_ids],
    )


def _name(path: tuple) -> str:
    """`examples/x` for the leaf `{"x": ...}`."""
    return "/".join(["examples", jax.tree_util.keystr(path, simple=True, separator="/")]).rstrip("/")


def _num_examples(examples: PyTree) -> int:
    """Rows that all leaves agree on."""
    leaves = jax.tree_util.tree_leaves_with_path(examples)
    if not leaves:
        raise ValueError("examples must hold at least one array, got an empty tree.")
    sizes = {}
    for path, leaf in leaves:
        if np.ndim(leaf) == 0:
            raise ValueError(f"{_name(path)} must be an array [n, ...], got a scalar; pass lists as arrays.")
        sizes[_name(path)] = np.shape(leaf)[0]
    if len(set(sizes.values())) > 1:
        raise ValueError(f"examples must have the same number of rows in every leaf, got {sizes}.")
    num_examples = next(iter(sizes.values()))
    if num_examples == 0:
        raise ValueError("examples must have at least one row, got 0.")
    return num_examples


def _to_device(name: str, leaf: ArrayLike, order: np.ndarray) -> jax.Array:
    """The rows `order` of a leaf as a device array, once every value is known to survive the way."""
    array = np.asarray(leaf)
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == np.bool_):
        raise TypeError(f"{name} must hold numbers, got {array.dtype}.")
    array = array[order]
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if jnp.issubdtype(dtype, jnp.integer) and array.size:
        limits = jnp.iinfo(dtype)
        if array.min() < limits.min or array.max() > limits.max:
            raise ValueError(
                f"{name} must fit {dtype}, between {limits.min} and {limits.max}, got values from {array.min()} to "
                f"{array.max()}."
            )
    with np.errstate(over="ignore"):
        array = array.astype(dtype)
    if jnp.issubdtype(dtype, jnp.inexact):
        bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if bad.any():
            first = order[np.argmax(bad)]
            raise ValueError(
                f"{name} must be finite in {dtype}, got {bad.sum()} rows that are not, one of them {first}."
            )
    return jnp.asarray(array)


def _support_sizes(num_support: ArrayLike | None, counts: np.ndarray) -> np.ndarray:
    """`[N]` support sizes, each between 0 and the client's count."""
    if num_support is None:
        return counts
    sizes = np.asarray(num_support)
    if not np.issubdtype(sizes.dtype, np.integer):
        raise TypeError(f"num_support must be an integer or integers, got {sizes.dtype}.")
    if sizes.shape not in ((), counts.shape):
        raise ValueError(f"num_support must be one number or have shape [N] = [{len(counts)}], got {sizes.shape}.")
    sizes = np.broadcast_to(sizes, counts.shape)
    bad = (sizes < 0) | (sizes > counts)
    if bad.any():
        client = int(np.argmax(bad))
        raise ValueError(
            f"num_support must satisfy 0 <= num_support <= {counts[client]} (examples) for client {client}, "
            f"got {sizes[client]}."
        )
    return sizes
