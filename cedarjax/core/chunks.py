"""How many clients to map at once: what `cohort_map(chunk_size="auto")` decides.

Measured with `python -m bench` (docs/performance.md). On a CPU what a chunk works on should stay in a core's cache, and
small clients share the cost of starting each operation: as many are taken as fit, and never fewer than two. On an
accelerator all are taken, unless their memory does not suffice.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
from jax.sharding import Mesh

from cedarjax.core.axis import num_clients
from cedarjax.core.memory import memory_estimate
from cedarjax.core.types import PyTree

ChunkSize: TypeAlias = int | Literal["auto"] | None
"""Clients that are mapped together on each device: a number, all of them (None), or what suits the hardware."""

_CACHE_BYTES = 2**21
_CACHE_BYTES_STREAMED = 2**23  # each chunk is added to the sums so far, which pays for larger ones
_FEWEST = 2  # two large clients together are still better than one: they share what it costs to start an operation
_MEMORY_SHARE = 0.6  # of an accelerator's memory: the data, the updates and the server need the rest


def check_chunk_size(chunk_size: ChunkSize) -> None:
    """Raises unless a chunk size is one.

    Args:
      chunk_size: what the caller gave.

    Raises:
      ValueError: naming the value.
    """
    given: Any = chunk_size
    if given is not None and given != "auto" and not (isinstance(given, int) and given >= 1):
        raise ValueError(f'chunk_size must be "auto", None or at least 1, got {chunk_size!r}.')


def resolve_chunk_size(
    chunk_size: ChunkSize,
    fun: Callable[..., PyTree],
    shared: PyTree,
    per_client: tuple[PyTree, ...],
    mesh: Mesh | None = None,
    *,
    streamed: bool = False,
) -> int | None:
    """Clients per chunk, with a number or None in the place of `"auto"`.

    Args:
      chunk_size: what the caller gave.
      fun: `fun(shared, *one_client)`.
      shared: what all clients are given.
      per_client: leaves `[C, ...]`.
      mesh: where they will run; default: the first device.
      streamed: whether the results of each chunk are summed up before the next.

    Returns:
      A number, or None for all clients at once. It depends on shapes and hardware alone.
    """
    if chunk_size != "auto":
        return chunk_size
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    one_client = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), per_client)
    estimate = memory_estimate(fun, shared, *one_client)
    num_bytes = max(1, estimate.temporaries + estimate.results)
    if device.platform == "cpu":
        most = max(_FEWEST, (_CACHE_BYTES_STREAMED if streamed else _CACHE_BYTES) // num_bytes)
    else:
        available = (device.memory_stats() or {}).get("bytes_limit")
        if available is None:
            return None
        most = max(1, int(_MEMORY_SHARE * available) // num_bytes)
    count = num_clients(per_client)
    return _even(most, -(-count // (1 if mesh is None else mesh.size)))


def _even(most: int, count: int) -> int:
    """The largest number of clients up to `most` that divides `count`, unless it is less than half of what could be.

    A chunk that is left over is compiled on its own, or filled up by a copy of all clients' data.
    """
    if most >= count:
        return count
    return next((size for size in range(most, most // 2, -1) if count % size == 0), most)
