"""Classification tasks as clients: everybody names a few of the classes in an order of their own.

A client draws `num_classes` of the classes and numbers them in a private random order, so no single model can be right
for two clients, and a new client must be learned from its few support examples. The few-shot episodes of Vinyals et
al., `Matching Networks for One Shot Learning <https://arxiv.org/abs/1606.04080>`_, 2016, become lasting clients of a
federation. Split the images into disjoint pools first, or the classes for a test on new classes, and build one
federation on each.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from cedarjax.core.dataset import FederatedDataset
from cedarjax.data._host import Seed, as_count, as_generator, as_indices, as_labels, as_positive
from cedarjax.data.federated import from_partition
from cedarjax.data.partition import natural


def split_pools(labels: ArrayLike, fractions: Sequence[float], *, seed: Seed) -> tuple[np.ndarray, ...]:
    """Splits the examples into disjoint pools, class by class.

    Args:
      labels: `[n]` discrete labels.
      fractions: share of each pool in every class, above 0, with a sum of at most 1. What is left over belongs to no
        pool.
      seed: integer or generator.

    Returns:
      One sorted int64 index array for each fraction; together an exact partition of `range(n)` when the fractions sum
      to 1.

    Raises:
      ValueError: if the fractions are out of range, or a pool gets no example of some class.
      TypeError: if the labels are continuous.

    Example:
      >>> import numpy as np
      >>> train, test = split_pools(np.repeat([0, 1], 4), [0.75, 0.25], seed=0)
      >>> len(train), len(test)
      (6, 2)
    """
    labels = as_labels("labels", labels)
    shares = [as_positive(f"fractions[{index}]", share) for index, share in enumerate(fractions)]
    if not 0.0 < sum(shares) <= 1.0 + 1e-9:
        raise ValueError(f"fractions must satisfy 0 < sum(fractions) <= 1, got {list(fractions)}.")
    rng = as_generator(seed)
    bounds = np.minimum(np.cumsum([0.0, *shares]), 1.0)
    pieces: list[list[np.ndarray]] = [[] for _ in shares]
    for members in natural(labels):
        members = rng.permutation(members)
        cuts = np.floor(bounds * len(members) + 0.5 - 1e-9).astype(np.int64)
        if (np.diff(cuts) == 0).any():
            pool = int(np.argmin(np.diff(cuts)))
            raise ValueError(
                f"fractions[{pool}] must leave an example of every class, got none of the {len(members)} of class "
                f"{labels[members[0]]}."
            )
        for piece, start, stop in zip(pieces, cuts[:-1], cuts[1:], strict=True):
            piece.append(members[start:stop])
    return tuple(np.sort(np.concatenate(piece)) for piece in pieces)


def class_tasks(
    x: ArrayLike,
    labels: ArrayLike,
    *,
    num_clients: int,
    num_classes: int,
    num_support: int,
    num_query: int,
    pool: ArrayLike | None = None,
    seed: Seed,
) -> FederatedDataset:
    """Builds a federation in which every client is a classification task of its own.

    A client draws `num_classes` classes, in an order that is its labelling, then `num_support + num_query` examples of
    each without replacement. Different clients may hold the same example. All clients have the same size.

    Args:
      x: `[n, ...]` inputs.
      labels: `[n]` discrete labels.
      num_clients: clients, `N`.
      num_classes: classes of a client, the ways.
      num_support: support examples for each class, the shots.
      num_query: query examples for each class.
      pool: `[p]` indices that clients may draw from, for example one of `split_pools`; everything when None.
      seed: integer or generator.

    Returns:
      A `FederatedDataset` with examples `{"x": [..., ...], "y": [...]}`, `y` int32 between 0 and `num_classes - 1`, and
      `num_classes * (num_support + num_query)` rows a client. Support rows come first; either set is in random order.

    Raises:
      ValueError: if a count is out of range, `pool` names an index twice, or a class of the pool has too few examples.
      TypeError: if the labels are continuous.

    Example:
      >>> import numpy as np
      >>> dataset = class_tasks(
      ...     np.zeros((40, 3)),
      ...     np.repeat(np.arange(4), 10),
      ...     num_clients=6,
      ...     num_classes=2,
      ...     num_support=1,
      ...     num_query=3,
      ...     seed=0,
      ... )
      >>> dataset.num_clients, dataset.max_examples, dataset.num_support.tolist()
      (6, 8, [2, 2, 2, 2, 2, 2])
    """
    x, labels = np.asarray(x), as_labels("labels", labels)
    if x.shape[:1] != labels.shape:
        raise ValueError(f"labels must have n = {np.shape(x)[:1]} rows like x, got {labels.shape}.")
    num_clients = as_count("num_clients", num_clients)
    num_classes = as_count("num_classes", num_classes)
    num_support = as_count("num_support", num_support)
    shots = num_support + as_count("num_query", num_query)
    pool = np.arange(len(labels)) if pool is None else as_indices("pool", pool, len(labels))
    if pool.size == 0 or np.unique(pool).size < pool.size:
        raise ValueError("pool must name at least one example and none twice.")
    members = [pool[rows] for rows in natural(labels[pool])]
    if num_classes > len(members):
        raise ValueError(f"num_classes must satisfy 1 <= num_classes <= {len(members)} (classes), got {num_classes}.")
    smallest = min(members, key=len)
    if shots > len(smallest):
        raise ValueError(
            f"num_support + num_query must satisfy num_support + num_query <= {len(smallest)} (examples of class "
            f"{labels[smallest[0]]} in the pool), got {shots}."
        )
    rng = as_generator(seed)
    parts, names = [], []
    for _ in range(num_clients):
        classes = rng.permutation(len(members))[:num_classes]
        rows = np.stack([rng.choice(members[index], size=shots, replace=False) for index in classes], axis=1)
        name = np.broadcast_to(np.arange(num_classes, dtype=np.int32), rows.shape)
        support = num_support * num_classes
        order = np.concatenate([rng.permutation(support), support + rng.permutation(rows.size - support)])
        parts.append(rows.reshape(-1)[order])
        names.append(name.reshape(-1)[order])
    examples = {"x": x[np.concatenate(parts)], "y": np.concatenate(names)}
    partition = np.arange(len(examples["y"])).reshape(num_clients, -1)
    return from_partition(examples, list(partition), num_support=num_support * num_classes)
