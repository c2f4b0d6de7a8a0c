"""Ways to deal a centralised data set out to clients.

Every function returns `N` int64 index arrays that are an exact partition of `range(n)`: each example belongs to one
client, and no client is empty. There is no rejection loop. Where a random draw leaves a client with too little,
examples are moved from the largest clients, always in the same way; where that cannot work, `n < N * min_examples`, a
`ValueError` says so. Inside a client the rows of a random partition are in random order: sorted by class, a split into
a first and a second half would give halves with different classes. Equal seeds give equal partitions.

References:
  shards: McMahan et al., `Communication-Efficient Learning of Deep Networks from Decentralized Data
  <https://arxiv.org/abs/1602.05629>`_, 2017.

  Dirichlet by class: Yurochkin et al., `Bayesian Nonparametric Federated Learning of Neural Networks
  <https://arxiv.org/abs/1905.12022>`_, 2019. Published code draws again until every client has ten examples; here the
  first draw is kept and repaired.

  Dirichlet by client: Hsu, Qi, Brown, `Measuring the Effects of Non-Identical Data Distribution for Federated Visual
  Classification <https://arxiv.org/abs/1909.06335>`_, 2019.

  Quantity skew: Li, Diao, Chen, He, `Federated Learning on Non-IID Data Silos: An Experimental Study
  <https://arxiv.org/abs/2102.02079>`_, 2022.
"""

import numpy as np
from numpy.typing import ArrayLike

from cedarjax.data._host import Seed, as_count, as_generator, as_labels, as_positive


def iid(num_examples: int, num_clients: int, *, seed: Seed) -> list[np.ndarray]:
    """Deals shuffled examples out evenly; sizes differ by at most one.

    Args:
      num_examples: examples in all, `n`.
      num_clients: clients, `N <= n`.
      seed: integer or generator.

    Returns:
      `N` int64 index arrays, an exact partition of `range(n)`.

    Raises:
      ValueError: if there are fewer examples than clients.

    Example:
      >>> [len(part) for part in iid(7, 3, seed=0)]
      [3, 2, 2]
    """
    num_examples, num_clients = _check_sizes(num_examples, num_clients, 1)
    return np.array_split(as_generator(seed).permutation(num_examples), num_clients)


def dirichlet_by_class(
    labels: ArrayLike, num_clients: int, *, alpha: float, min_examples: int = 1, seed: Seed
) -> list[np.ndarray]:
    """Splits each class over the clients by proportions from a symmetric Dirichlet.

    For each class `k`: `p_k ~ Dir_N(alpha, ..., alpha)`, and client `j` gets the share `p_kj` of the class. Client
    sizes come out unequal, the more so the smaller `alpha`; as `alpha` grows every client nears `1 / N` of every class.

    Args:
      labels: `[n]` discrete labels.
      num_clients: clients, `N`.
      alpha: concentration per client, above 0.
      min_examples: every client has at least so many; what is missing is moved from the largest clients.
      seed: integer or generator.

    Returns:
      `N` int64 index arrays, an exact partition of `range(n)`.

    Raises:
      ValueError: if `n < num_clients * min_examples` or an argument is out of range.
      TypeError: if the labels are continuous.

    Example:
      >>> parts = dirichlet_by_class([0, 0, 0, 1, 1, 1], 2, alpha=0.5, seed=0)
      >>> sorted(int(i) for part in parts for i in part)
      [0, 1, 2, 3, 4, 5]
    """
    labels = as_labels("labels", labels)
    _, num_clients = _check_sizes(len(labels), num_clients, min_examples)
    concentration = np.full(num_clients, as_positive("alpha", alpha))
    rng = as_generator(seed)
    pieces: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for members in _class_members(labels, rng):
        cuts = _cuts(_softmax(_log_dirichlet(rng, concentration)), len(members))
        for client, piece in zip(pieces, np.split(members, cuts), strict=True):
            client.append(piece)
    parts = [rng.permutation(np.concatenate(client)) for client in pieces]
    return _fill_up(parts, min_examples)


def dirichlet_by_client(labels: ArrayLike, num_clients: int, *, alpha: float, seed: Seed) -> list[np.ndarray]:
    """Gives every client a class distribution of its own and an equal number of examples.

    For each client: `q ~ Dir(alpha * p)` with `p` the class frequencies of the whole set, then examples one by one, the
    class from `q`, without replacement. A class that is used up leaves the draw and the others are rescaled. The
    clients choose in random order; the last of them get what is left, so their mixtures follow `q` less closely.

    Args:
      labels: `[n]` discrete labels.
      num_clients: clients, `N <= n`.
      alpha: total concentration, above 0: near 0 a client holds one class, at 100 and more it looks like the whole set.
      seed: integer or generator.

    Returns:
      `N` int64 index arrays, an exact partition of `range(n)`; sizes differ by at most one.

    Raises:
      ValueError: if there are fewer examples than clients or `alpha` is out of range.
      TypeError: if the labels are continuous.

    Example:
      >>> [len(part) for part in dirichlet_by_client([0, 0, 0, 1, 1, 1], 2, alpha=1.0, seed=0)]
      [3, 3]
    """
    labels = as_labels("labels", labels)
    num_examples, num_clients = _check_sizes(len(labels), num_clients, 1)
    alpha = as_positive("alpha", alpha)
    rng = as_generator(seed)
    pools = _class_members(labels, rng)
    left = np.array([len(pool) for pool in pools])
    prior = left / num_examples
    sizes = np.full(num_clients, num_examples // num_clients)
    sizes[: num_examples % num_clients] += 1
    parts: list[np.ndarray] = [np.empty(0, np.int64)] * num_clients
    for client in rng.permutation(num_clients):
        taken = _draw_counts(rng, _log_dirichlet(rng, alpha * prior), left, sizes[client])
        rows = [pool[end - count : end] for pool, end, count in zip(pools, left, taken, strict=True)]
        left = left - taken
        parts[client] = rng.permutation(np.concatenate(rows))
    return parts


def shards(labels: ArrayLike, num_clients: int, *, shards_per_client: int = 2, seed: Seed) -> list[np.ndarray]:
    """Sorts the examples by class, cuts them into equal shards and deals each client a few.

    Args:
      labels: `[n]` discrete labels.
      num_clients: clients, `N`.
      shards_per_client: shards of each client, so about the number of its classes.
      seed: integer or generator.

    Returns:
      `N` int64 index arrays, an exact partition of `range(n)`; shards differ by at most one example.

    Raises:
      ValueError: if there are fewer examples than shards.
      TypeError: if the labels are continuous.

    Example:
      >>> labels = [0, 0, 1, 1, 2, 2, 3, 3]
      >>> [len(part) for part in shards(labels, 2, shards_per_client=2, seed=0)]
      [4, 4]
    """
    labels = as_labels("labels", labels)
    shards_per_client = as_count("shards_per_client", shards_per_client)
    _, num_clients = _check_sizes(len(labels), num_clients, shards_per_client, name="shards_per_client")
    rng = as_generator(seed)
    pieces = np.array_split(np.concatenate(_class_members(labels, rng)), num_clients * shards_per_client)
    owners = rng.permutation(len(pieces)).reshape(num_clients, shards_per_client)
    return [rng.permutation(np.concatenate([pieces[shard] for shard in owned])) for owned in owners]


def natural(client_id: ArrayLike) -> list[np.ndarray]:
    """Groups the examples by a column of client ids: writers, wearers, stations.

    Args:
      client_id: `[n]` integers or strings.

    Returns:
      One int64 index array for each distinct id, in the sorted order of the ids, rows in stored order.

    Raises:
      ValueError: if the column is empty.
      TypeError: if the ids are floating point.

    Example:
      >>> [part.tolist() for part in natural(["b", "a", "b"])]
      [[1], [0, 2]]
    """
    return _group(as_labels("client_id", client_id))


def quantity_skew(
    num_examples: int, num_clients: int, *, alpha: float, min_examples: int = 1, seed: Seed
) -> list[np.ndarray]:
    """Deals shuffled examples out in unequal numbers, `sizes / n ~ Dir_N(alpha, ..., alpha)`.

    Args:
      num_examples: examples in all, `n`.
      num_clients: clients, `N`.
      alpha: concentration, above 0; the smaller, the more unequal.
      min_examples: every client has at least so many; what is missing is moved from the largest clients.
      seed: integer or generator.

    Returns:
      `N` int64 index arrays, an exact partition of `range(n)`.

    Raises:
      ValueError: if `n < num_clients * min_examples` or `alpha` is out of range.

    Example:
      >>> parts = quantity_skew(100, 4, alpha=0.5, min_examples=5, seed=0)
      >>> sum(len(part) for part in parts), min(len(part) for part in parts) >= 5
      (100, True)
    """
    num_examples, num_clients = _check_sizes(num_examples, num_clients, min_examples)
    concentration = np.full(num_clients, as_positive("alpha", alpha))
    rng = as_generator(seed)
    cuts = _cuts(_softmax(_log_dirichlet(rng, concentration)), num_examples)
    return _fill_up(np.split(rng.permutation(num_examples), cuts), min_examples)


def _check_sizes(num_examples: int, num_clients: int, min_examples: int, name: str = "min_examples") -> tuple[int, int]:
    """Refuses a federation that cannot give every client its examples."""
    num_examples = as_count("num_examples", num_examples)
    num_clients = as_count("num_clients", num_clients)
    min_examples = as_count(name, min_examples)
    if num_clients * min_examples > num_examples:
        raise ValueError(
            f"num_clients * {name} must satisfy num_clients * {name} <= {num_examples} (all examples), "
            f"got {num_clients} * {min_examples}."
        )
    return num_examples, num_clients


def _group(column: np.ndarray) -> list[np.ndarray]:
    """Row indices of each distinct value, in the sorted order of the values."""
    order = np.argsort(column, kind="stable")
    starts = np.flatnonzero(column[order][1:] != column[order][:-1]) + 1
    return np.split(order.astype(np.int64), starts)


def _class_members(labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Row indices of each class, shuffled."""
    return [rng.permutation(members) for members in _group(labels)]


def _log_dirichlet(rng: np.random.Generator, concentration: np.ndarray) -> np.ndarray:
    """Logarithms of unnormalised Dirichlet proportions, finite however small or large the concentrations."""
    concentration = np.clip(concentration, 1e-300, 1e12)
    boost = np.log1p(-rng.random(concentration.shape)) / concentration
    return np.log(rng.standard_gamma(concentration + 1.0)) + boost


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Proportions that sum to 1."""
    proportions = np.exp(logits - logits.max())
    return proportions / proportions.sum()


def _cuts(proportions: np.ndarray, size: int) -> np.ndarray:
    """Where to cut `size` examples so that the pieces have the proportions, to within one example."""
    return np.rint(np.minimum(np.cumsum(proportions)[:-1], 1.0) * size).astype(np.int64)


def _draw_counts(rng: np.random.Generator, logits: np.ndarray, left: np.ndarray, size: int) -> np.ndarray:
    """Class counts of `size` successive draws without replacement from pools of `left` examples.

    Draws from a pool that is used up are made again among the others. Each pass ends the draw or uses up one more pool.
    """
    taken = np.zeros_like(left)
    while (missing := size - taken.sum()) > 0:
        pools = np.flatnonzero(taken < left)
        drawn = rng.multinomial(missing, _softmax(logits[pools]))
        taken[pools] = np.minimum(taken[pools] + drawn, left[pools])
    return taken


def _fill_up(parts: list[np.ndarray], min_examples: int) -> list[np.ndarray]:
    """Moves examples one at a time from the largest client, the first among equals, to those below `min_examples`."""
    rows = [part.tolist() for part in parts]
    sizes = np.array([len(part) for part in rows])
    for client, part in enumerate(rows):
        while sizes[client] < min_examples:
            donor = int(np.argmax(sizes))
            part.append(rows[donor].pop())
            sizes[client] += 1
            sizes[donor] -= 1
    return [np.asarray(part, dtype=np.int64) for part in rows]
