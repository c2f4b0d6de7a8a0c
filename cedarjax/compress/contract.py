"""The contract of a compressor.

A compressor is written for ONE client, as a local update is. What it sends is a tree of arrays, so that it can be
stacked over clients, moved and summed; what the receiver knows anyway (shapes, dtypes, settings) is static and costs
nothing. The bits are those of a dense serialisation in which every field has its own width: indices of `ceil(log2 d)`
bits, codes of `b` bits, scale factors and seeds of 32.

A simulation needs the numbers that the server reads, and not the words that travel. `roundtrip` gives these numbers
and the count of bits in one go, so that nothing is packed or compacted on the way.

What is not finite must not vanish on the way: numbers among which there is a NaN or an Inf are decompressed to numbers
among which there is one, so that the server can tell that the client has failed.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax

from cedarjax.core.types import PyTree

Scope = Literal["leaf", "model"]
"""What one vector is: each leaf of the tree, or all of them together."""


class BitsFn(Protocol):
    """`bits(compressed, mask=None, *, num_layers=None) -> int32 scalar`."""

    def __call__(self, compressed: PyTree, mask: PyTree | None = None, *, num_layers: int | None = None) -> jax.Array:
        """Exact size of one client's upload in bits.

        With a `mask`, a tree of scalars as in `Upload.mask`, leaves of mask 0 are not sent, and a bitmap of
        `ceil(num_layers / 8)` bytes tells which came (`num_layers`: by default the layers that hold parameters).
        """
        ...


class Compressor(NamedTuple):
    """Lossy compression of one client's update as pure functions."""

    init: Callable[[PyTree], PyTree]
    """`init(params) -> state` that the client keeps between rounds, `()` for most."""
    compress: Callable[[PyTree, PyTree, jax.Array], tuple[PyTree, PyTree]]
    """`compress(delta, state, key) -> (compressed, state)`."""
    decompress: Callable[[PyTree], PyTree]
    """`decompress(compressed) -> delta`, in the structure, shapes and dtypes of what was compressed."""
    bits: BitsFn
    """`bits(compressed, mask=None, *, num_layers=None) -> int32 scalar`, exact."""
    roundtrip: Callable[[PyTree, PyTree, jax.Array], tuple[PyTree, PyTree, Callable[..., jax.Array]]] | None = None
    """`roundtrip(delta, state, key) -> (decompressed, state, count)`: what `decompress` makes of what `compress` makes,
    and `count(mask=None, *, num_layers=None)`, its bits; None if there is no shorter way."""
    entropy_bits: BitsFn | None = None
    """As `bits`, float32: an estimate of the size if codes and indices were entropy-coded; None if there is none."""


class ToldBits(NamedTuple):
    """Bits that depend on the numbers."""

    bits: jax.Array
    """int32 scalar."""
    most: int
    """What they cannot exceed."""


class Codec(NamedTuple):
    """Lossy compression of one vector of floats; `leafwise` and `whole` make a `Compressor` of it."""

    encode: Callable[[jax.Array, jax.Array], PyTree]
    """`encode(vector, key) -> payload`; `vector` is `[d]`, in the dtype of the parameters (its arithmetic runs in
    float32 or wider). The payload is arrays, and nothing that the receiver knows."""
    decode: Callable[[PyTree, int], jax.Array]
    """`decode(payload, d) -> [d]` floats."""
    bits: Callable[[PyTree, int], ToldBits | int]
    """`bits(payload, d)`, of a dense serialisation of the payload."""
    roundtrip: Callable[[jax.Array, jax.Array], tuple[jax.Array, ToldBits | int]] | None = None
    """`roundtrip(vector, key) -> (decode(encode(vector, key), d), bits)`, if there is a shorter way."""
    entropy: Callable[[PyTree, int], jax.Array | float] | None = None
    """`entropy(payload, d)`: bits with an ideal entropy coder for codes and indices, an estimate."""
    prepare: Callable[[list[jax.Array]], list[jax.Array]] | None = None
    """`prepare(vectors)`: what `encode` and `roundtrip` get with each vector in place of a key; for a codec that draws
    nothing and has something to look up that is looked up faster in all vectors at once."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A payload, and what its receiver knows beforehand: the tree of arrays that it stands for."""

    payload: PyTree
    """What is sent."""
    structure: Any = dataclasses.field(metadata={"static": True})
    """`PyTreeDef` of the arrays."""
    arrays: tuple[jax.ShapeDtypeStruct, ...] = dataclasses.field(metadata={"static": True})
    """Shape and dtype of each."""

    @property
    def size(self) -> int:
        """Numbers that the payload stands for, `d`."""
        return sum(math.prod(array.shape) for array in self.arrays)
