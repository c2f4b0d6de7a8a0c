"""Splits of a federation: support and query rows inside each client, training and held-out clients.

Rows are shuffled inside a client before they are split. Published federated data sets, those of Cedar among them, come
sorted by label, and halves of a sorted client hold different classes. `order="keep"` is for rows in time.
"""

import dataclasses
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from cedarjax.core.dataset import FederatedDataset
from cedarjax.core.types import PyTree
from cedarjax.data._host import Seed, as_count, as_generator, as_indices, as_labels
from cedarjax.data.federated import select_clients

_ORDERS = ("shuffle", "keep")


def split_support_query(
    dataset: FederatedDataset,
    *,
    support_fraction: float | None = None,
    num_support: int | None = None,
    per_class: int | None = None,
    label_fn: Callable[[PyTree], ArrayLike] = operator.itemgetter("y"),
    order: str = "shuffle",
    seed: Seed | None = None,
) -> FederatedDataset:
    """Reorders each client's rows into a support set, first, and a query set, after it.

    At most one of `support_fraction`, `num_support` and `per_class` is given; without any the fraction is 0.5.

    Args:
      dataset: a federation of `N` clients.
      support_fraction: share of a client's rows, strictly between 0 and 1. The product with the count is rounded down
        and then kept between 1 and the count less 1.
      num_support: rows of every client.
      per_class: rows of each class of every client, the first ones of the class; a class with fewer gives all it has.
      label_fn: `label_fn(examples) -> [n]` discrete labels, read with `per_class` only.
      order: `"shuffle"` shuffles inside each client first; `"keep"` takes rows as they are stored, for data in time.
      seed: integer or generator; needed to shuffle.

    Returns:
      A `FederatedDataset` of the same clients and rows. Within the support set and within the query set, rows are in
      shuffled or in stored order.

    Raises:
      ValueError: if an argument is out of range, or a client is left without query rows.
      TypeError: if labels are continuous, or rows are to be shuffled without a seed.

    Example:
      >>> import numpy as np
      >>> from cedarjax.data import federated_dataset
      >>> dataset = federated_dataset({"x": np.arange(6.0), "y": np.array([0, 0, 0, 1, 1, 1])}, np.zeros(6, int))
      >>> split = split_support_query(dataset, per_class=1, order="keep")
      >>> split.num_support.tolist(), split.examples["x"].tolist()
      ([2], [0.0, 3.0, 1.0, 2.0, 4.0, 5.0])
    """
    chosen = {"support_fraction": support_fraction, "num_support": num_support, "per_class": per_class}
    given = [name for name, value in chosen.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"at most one of {', '.join(chosen)} may be given, got {', '.join(given)}.")
    if order not in _ORDERS:
        raise ValueError(f"order must be one of {_ORDERS}, got {order!r}.")
    counts = np.asarray(dataset.counts, np.int64)
    client = np.repeat(np.arange(len(counts)), counts)
    rows = np.arange(len(client))
    if order == "shuffle":
        rows = np.lexsort((as_generator(seed).random(len(client)), client))

    if per_class is not None:
        labels = as_labels("label_fn(examples)", label_fn(dataset.examples))
        if labels.shape != client.shape:
            raise ValueError(f"label_fn must return labels of shape [n] = [{len(client)}], got {labels.shape}.")
        first = _rank_in_class(client, labels[rows]) < as_count("per_class", per_class)
        rows = rows[np.lexsort((~first, client))]
        sizes = np.bincount(client, weights=first).astype(np.int64)
    elif num_support is not None:
        sizes = np.full_like(counts, as_count("num_support", num_support))
    else:
        fraction = _as_fraction("support_fraction", 0.5 if support_fraction is None else support_fraction)
        sizes = np.clip(np.floor(counts * fraction + 1e-9).astype(np.int64), 1, np.maximum(counts - 1, 1))

    bad = sizes >= counts
    if bad.any():
        worst = int(np.argmax(bad))
        raise ValueError(
            f"client {worst} must keep at least one query example, got {counts[worst]} examples of which "
            f"{sizes[worst]} would be support."
        )
    return dataclasses.replace(
        dataset,
        examples=jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[rows]), dataset.examples),
        num_support=jnp.asarray(sizes, jnp.int32),
    )


def split_ids(
    num_clients: int,
    *,
    held_out: float | ArrayLike,
    validation: float | ArrayLike | None = None,
    seed: Seed | None = None,
) -> tuple[np.ndarray, ...]:
    """Splits the client ids `0..N-1` into training, held-out and, if asked for, validation clients.

    Args:
      num_clients: clients in the federation, `N`.
      held_out: share of all clients, strictly between 0 and 1, rounded to the nearest number and at least one; or their
        ids.
      validation: a share of all clients again, or ids; None for no validation clients.
      seed: integer or generator; needed where a share is given. Explicit ids are set aside first.

    Returns:
      `(train, held_out)` or `(train, held_out, validation)`: disjoint sorted int64 arrays that cover `range(N)`.

    Raises:
      ValueError: if a part is empty, an id is out of range, or a client is named twice.
      TypeError: if a part is neither a share nor ids, or a share is given without a seed.

    Example:
      >>> train, held_out = split_ids(5, held_out=[1, 4])
      >>> train.tolist(), held_out.tolist()
      ([0, 2, 3], [1, 4])
    """
    num_clients = as_count("num_clients", num_clients)
    wanted = {"held_out": held_out} if validation is None else {"held_out": held_out, "validation": validation}
    shares = {name: value for name, value in wanted.items() if np.ndim(value) == 0}
    parts = {}
    free = np.arange(num_clients)
    for name, value in wanted.items():
        if name in shares:
            continue
        ids = np.sort(as_indices(name, value, num_clients))
        if ids.size == 0 or np.setdiff1d(ids, free).size or np.unique(ids).size < ids.size:
            raise ValueError(
                f"{name} must name at least one client and none that is already taken, got {ids.tolist()}."
            )
        parts[name], free = ids, np.setdiff1d(free, ids)
    if shares:
        rng = as_generator(seed)
        free = rng.permutation(free)
        for name, value in shares.items():
            size = max(1, int(np.floor(num_clients * _as_fraction(name, value) + 0.5)))
            parts[name], free = np.sort(free[:size]), free[size:]
    if free.size == 0:
        raise ValueError(f"at least one of {num_clients} clients must be left to train, got none.")
    return (np.sort(free), *(parts[name] for name in wanted))


def split_clients(
    dataset: FederatedDataset,
    *,
    held_out: float | ArrayLike,
    validation: float | ArrayLike | None = None,
    seed: Seed | None = None,
) -> tuple[FederatedDataset, ...]:
    """Splits a federation into training clients and clients that never train.

    Ids are compacted in each part: client `i` of a part is client `ids[i]` of the given federation, with `ids` the
    arrays that `split_ids` returns for the same arguments. Support sets stay as they are.

    Args:
      dataset: a federation of `N` clients.
      held_out: share of all clients, or their ids.
      validation: share of all clients, or their ids; None for no validation clients.
      seed: integer or generator; needed where a share is given.

    Returns:
      `(train, held_out)` or `(train, held_out, validation)`, each a `FederatedDataset`.

    Raises:
      ValueError: if a part is empty, an id is out of range, or a client is named twice.
      TypeError: if a part is neither a share nor ids, or a share is given without a seed.

    Example:
      >>> import numpy as np
      >>> from cedarjax.data import federated_dataset
      >>> dataset = federated_dataset({"x": np.arange(8.0)}, client_id=np.arange(8))
      >>> [part.num_clients for part in split_clients(dataset, held_out=0.25, validation=0.125, seed=0)]
      [5, 2, 1]
    """
    ids = split_ids(dataset.num_clients, held_out=held_out, validation=validation, seed=seed)
    return tuple(select_clients(dataset, part) for part in ids)


def _as_fraction(name: str, value: float | ArrayLike) -> float:
    """The argument as a float strictly between 0 and 1."""
    share = np.asarray(value)
    if share.ndim or not np.issubdtype(share.dtype, np.floating):
        raise TypeError(f"{name} must be a share, a float between 0 and 1, got {value!r}.")
    if not 0.0 < share < 1.0:
        raise ValueError(f"{name} must satisfy 0 < {name} < 1, got {share}.")
    return float(share)


def _rank_in_class(client: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`[n]`, how many earlier rows share a row's client and class."""
    order = np.lexsort((labels, client))
    new = np.ones(len(order), bool)
    new[1:] = (client[order][1:] != client[order][:-1]) | (labels[order][1:] != labels[order][:-1])
    position = np.arange(len(order))
    rank = np.empty(len(order), np.int64)
    rank[order] = position - np.maximum.accumulate(np.where(new, position, 0))
    return rank
