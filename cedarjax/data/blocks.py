"""Cohorts that do not fit on the device, brought to it block by block while it works.

Calls of a compiled function return before it has run, so a loop that asks for the next block right after it has handed
one over makes the host work beside the device. `prefetch` sends each block ahead of its turn; `core.stream_blocks`
adds it up.
"""

import collections
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from cedarjax.core.types import ClientData, Cohort, PyTree
from cedarjax.data._host import as_count


def prefetch(blocks: Iterable[PyTree], size: int = 2, sharding: Sharding | None = None) -> Iterator[PyTree]:
    """Puts blocks on the device ahead of their turn.

    Args:
      blocks: trees of host arrays, usually made as they are asked for. Where `sharding` reaches over several processes,
        each gives its own rows, as many as the others, of arrays that are split along their first axis.
      size: blocks that are on the device or on their way at once, the one that was handed out not counted; 2 is
        double buffering.
      sharding: where they go, for example the clients over a mesh; default: the first device.

    Returns:
      An iterator over the same blocks, on the device. Nothing is read from `blocks` before the first is asked for.

    Raises:
      ValueError: if `size` is not positive.

    Example:
      >>> import numpy as np
      >>> [block.sum().item() for block in prefetch(np.full(2, i) for i in range(3))]
      [0, 2, 4]
    """
    size = as_count("size", size)

    def put(block: PyTree) -> PyTree:
        if sharding is None or sharding.is_fully_addressable:
            return jax.device_put(block, sharding)
        return jax.tree.map(lambda own: jax.make_array_from_process_local_data(sharding, own), block)

    def ahead() -> Iterator[PyTree]:
        source, waiting = iter(blocks), collections.deque[PyTree]()
        for block in source:
            waiting.append(put(block))
            del block  # or it would stay on the host while the next is made
            if len(waiting) == size:
                yield waiting.popleft()
        yield from waiting

    return ahead()


def rows_as_cohort(examples: PyTree, first_client: int, num_clients: int, num_examples: int) -> Cohort:
    """Clients cut one after another from rows that lie on the host, memory-mapped files for instance.

    Client `i` has rows `[i * num_examples, (i + 1) * num_examples)`, counted around the end of the file; only the rows
    of these clients are read.

    Args:
      examples: leaves `[N, ...]`, arrays or `numpy.memmap`s.
      first_client: id of the first client.
      num_clients: clients in the cohort.
      num_examples: rows a client; the first half of them, rounded down, is its support set.

    Returns:
      A `Cohort` of host arrays, all of weight `num_examples`.

    Raises:
      ValueError: if a count is not positive, or the leaves have different or no rows.

    Example:
      >>> import numpy as np
      >>> rows_as_cohort(np.arange(5), first_client=1, num_clients=2, num_examples=2).data.examples.tolist()
      [[2, 3], [4, 0]]
    """
    first = as_count("first_client", first_client, minimum=0)
    count, size = as_count("num_clients", num_clients), as_count("num_examples", num_examples)
    lengths = {len(leaf) for leaf in jax.tree.leaves(examples)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"examples must have leaves with one number of rows, at least 1, got {sorted(lengths)}.")
    (length,) = lengths
    start, num_rows = first * size % length, count * size

    def cut(leaf: np.ndarray) -> np.ndarray:
        whole = leaf[start : start + num_rows]
        if len(whole) < num_rows:  # around the end, as often as it takes
            whole = np.take(leaf, np.arange(start, start + num_rows), axis=0, mode="wrap")
        return np.ascontiguousarray(whole).reshape(count, size, *leaf.shape[1:])

    counts: Any = np.full(count, size, np.int32)
    ids: Any = np.arange(first, first + count, dtype=np.int32)
    data = ClientData(jax.tree.map(cut, examples), counts, counts // 2)
    return Cohort(data, counts.astype(np.float32), ids)
