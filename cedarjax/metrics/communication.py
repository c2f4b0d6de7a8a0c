"""Exact byte counters, on the host: a run's bytes do not fit the int32 of the device."""

from typing import Any, NamedTuple

import numpy as np


class Communication(NamedTuple):
    """Bytes of a run as Python integers, which do not overflow."""

    uploaded: int = 0
    """From the clients to the server."""
    downloaded: int = 0
    """From the server to the clients."""
    saved: int = 0
    """What whole uploads would have taken more; negative if they would have taken less."""

    def merge(self, other: "Communication") -> "Communication":
        """Bytes of both together."""
        return Communication(*(a + b for a, b in zip(self, other, strict=True)))


def communication(uploaded: Any, *, download: int, full_upload: int, weights: Any | None = None) -> Communication:
    """Counts the bytes of one round or of many.

    Args:
      uploaded: integers of any shape, usually `[C]` or `[R, C]` (rounds, clients): bytes that each client sent in
        each round.
      download: bytes that every present client received.
      full_upload: bytes of an upload with nothing left out.
      weights: mask or weights of the shape of `uploaded`, or `[C]`; clients are present where positive, all by
        default. Absent clients neither send nor receive, whatever `uploaded` says.

    Returns:
      The exact sums.

    Raises:
      TypeError: if `uploaded` does not hold integers.
      ValueError: if a present client sent, received, or would have sent, a negative number of bytes, or the shapes do
        not fit.

    Example:
      >>> a_round = communication([700, 1000], download=1000, full_upload=1000)
      >>> a_round.merge(a_round)
      Communication(uploaded=3400, downloaded=4000, saved=600)
    """
    uploaded = np.asarray(uploaded)
    if uploaded.size and not np.issubdtype(uploaded.dtype, np.integer):
        raise TypeError(f"uploaded must hold integers, got dtype {uploaded.dtype}.")
    present = np.ones(uploaded.shape, bool) if weights is None else np.asarray(weights) > 0
    if present.shape not in (uploaded.shape, uploaded.shape[-1:]):
        raise ValueError(f"weights must have the shape {uploaded.shape} or its last axis, got {present.shape}.")
    for name, size in (("download", download), ("full_upload", full_upload)):
        if size < 0:
            raise ValueError(f"{name} must be at least 0, got {size}.")
    sent = uploaded[np.broadcast_to(present, uploaded.shape)].tolist()
    if any(size < 0 for size in sent):
        raise ValueError(f"uploaded must be at least 0, got {min(sent)}.")
    total = sum(sent)
    return Communication(
        uploaded=total, downloaded=len(sent) * int(download), saved=len(sent) * int(full_upload) - total
    )
