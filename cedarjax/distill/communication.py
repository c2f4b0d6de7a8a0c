"""Bytes that algorithms of exchanged knowledge send, exactly: of Python integers, or of arrays with one entry a client.

Totals of a run do not fit int32: add the clients' numbers up in Python, as `metrics.communication` does.
"""

from typing import Any, NamedTuple

from cedarjax.core import check_positive


class KnowledgeBytes(NamedTuple):
    """Bytes of one client; integers, or `[C]` as the counts that they were made of."""

    once: Any
    """Up, before the first round."""
    up: Any
    """Up, a round."""
    down: Any
    """Down, a round, if the server reduces what it sends."""
    down_raw: Any
    """Down, a round, if the client does."""


def fedcache_bytes(
    num_rows: Any, num_classes: int, num_related: int, embedding_dim: int, *, num_epochs: int = 1, itemsize: int = 4
) -> KnowledgeBytes:
    """Bytes of FedCache: `n d b` once, `E n K b` up and down in each round, `R E n K b` down if raw.

    Down, a sample without a teacher counts like any other, and raw samples as having all `R` related ones. The label
    and the index of each sample, which the server also needs once, are not counted.

    Args:
      num_rows: `n`, the client's samples: a Python integer, or an integer array with one entry a client, in whose dtype
        the results are: an int32 holds less than 2 GiB.
      num_classes: `K`.
      num_related: `R`.
      embedding_dim: `d`.
      num_epochs: `E`, passes over the samples in a round. Give 1 with `FedCacheInfo.num_rows`, which counts them.
      itemsize: `b`, bytes of a number.

    Returns:
      `KnowledgeBytes`.

    Raises:
      ValueError: if a count is not positive, or `num_rows` is a negative Python integer.

    Example:
      >>> fedcache_bytes(3000, num_classes=10, num_related=16, embedding_dim=576)
      KnowledgeBytes(once=6912000, up=120000, down=120000, down_raw=1920000)
    """
    check_positive(
        num_classes=num_classes,
        num_related=num_related,
        embedding_dim=embedding_dim,
        num_epochs=num_epochs,
        itemsize=itemsize,
    )
    _check_count("num_rows", num_rows)
    a_round = num_rows * (num_epochs * num_classes * itemsize)
    return KnowledgeBytes(num_rows * (embedding_dim * itemsize), a_round, a_round, a_round * num_related)


def fd_bytes(num_held: Any, num_classes: int, *, itemsize: int = 4) -> KnowledgeBytes:
    """Bytes of federated distillation: a mean and a bit for each class up, a teacher for each class down.

    `H K b + ceil(K / 8)` up for `H` classes that the client holds, `K^2 b + ceil(K / 8)` down.

    Args:
      num_held: `H`, classes of which the client uploads a mean (`FDInfo.num_held`), integer or integer array.
      num_classes: `K`.
      itemsize: `b`, bytes of a number.

    Returns:
      `KnowledgeBytes`; `down_raw` is `down`.

    Raises:
      ValueError: if a count is not positive, or `num_held` is a negative Python integer.

    Example:
      >>> fd_bytes(2, 10)
      KnowledgeBytes(once=0, up=82, down=402, down_raw=402)
    """
    check_positive(num_classes=num_classes, itemsize=itemsize)
    _check_count("num_held", num_held)
    bits = -(-num_classes // 8)
    down = num_held * 0 + (num_classes * num_classes * itemsize + bits)
    return KnowledgeBytes(num_held * 0, num_held * (num_classes * itemsize) + bits, down, down)


def dsfl_bytes(num_public: Any, num_classes: int, *, itemsize: int = 4) -> KnowledgeBytes:
    """Bytes of DS-FL: `P K b` up and `P K b` down; the public samples themselves are with the clients already.

    Args:
      num_public: `P`, public samples that are labelled in a round, integer or integer array.
      num_classes: `K`.
      itemsize: `b`, bytes of a number.

    Returns:
      `KnowledgeBytes`; `down_raw` is `down`.

    Raises:
      ValueError: if a count is not positive, or `num_public` is a negative Python integer.

    Example:
      >>> dsfl_bytes(1000, 10).up
      40000
    """
    check_positive(num_classes=num_classes, itemsize=itemsize)
    _check_count("num_public", num_public)
    size = num_public * (num_classes * itemsize)
    return KnowledgeBytes(num_public * 0, size, size, size)


def fedcache2_bytes(num_sent: Any, num_received: Any, sample_size: int, *, itemsize: int = 4) -> KnowledgeBytes:
    """Bytes of FedCache 2.0: `s b` for each prototype, and 4 for its label.

    Args:
      num_sent: prototypes up, integer or integer array (`FedCache2Info.num_sent`).
      num_received: prototypes down (`FedCache2Info.num_received`).
      sample_size: `s`, numbers in one sample.
      itemsize: `b`, bytes of a number.

    Returns:
      `KnowledgeBytes`; `down_raw` is `down`.

    Raises:
      ValueError: if a count is not positive, or a number of prototypes is a negative Python integer.

    Example:
      >>> fedcache2_bytes(20, 100, 784)
      KnowledgeBytes(once=0, up=62800, down=314000, down_raw=314000)
    """
    check_positive(sample_size=sample_size, itemsize=itemsize)
    _check_count("num_sent", num_sent)
    _check_count("num_received", num_received)
    one = sample_size * itemsize + 4
    return KnowledgeBytes(num_sent * 0, num_sent * one, num_received * one, num_received * one)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, int) and value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}.")
