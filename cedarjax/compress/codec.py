"""The contract of a compressor, and how code for one vector is lifted to a tree.

A compressor is written for ONE client, as a local update is. What it sends is a tree of arrays, so that it can be
stacked over clients, moved and summed; what the receiver knows anyway (shapes, dtypes, settings) is static and costs
nothing. The bits are those of a dense serialisation in which every field has its own width: indices of `ceil(log2 d)`
bits, codes of `b` bits, scale factors and seeds of 32.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from cedarjax.core.lowrank import dense
from cedarjax.core.names import layer_names, leaf_names
from cedarjax.core.types import PyTree


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


class Codec(NamedTuple):
    """Lossy compression of one vector of floats; `leafwise` and `whole` make a `Compressor` of it."""

    encode: Callable[[jax.Array, jax.Array], PyTree]
    """`encode(vector, key) -> payload`; `vector` is `[d]`, in the dtype of the parameters (its arithmetic runs in
    float32 or wider). The payload is arrays, and nothing that the receiver knows."""
    decode: Callable[[PyTree, int], jax.Array]
    """`decode(payload, d) -> [d]` floats."""
    bits: Callable[[PyTree, int], jax.Array | int]
    """`bits(payload, d)`, of a dense serialisation of the payload."""


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


def _is_packed(node: Any) -> bool:
    return isinstance(node, Packed)


def pack(encode: Callable[[jax.Array, jax.Array], PyTree], tree: PyTree, key: jax.Array) -> Packed:
    """Encodes all numbers of a tree as one vector.

    Args:
      encode: as in `Codec`.
      tree: arrays of floats.
      key: PRNG key.

    Returns:
      A `Packed` node.

    Raises:
      TypeError: if a leaf does not hold floats.
    """
    tree = dense(tree)
    leaves, structure = jax.tree.flatten(tree)
    for name, leaf in zip(leaf_names(tree), leaves, strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"delta must hold floats, got {leaf.dtype} for {name!r}.")
    arrays = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    widest = max((leaf.dtype for leaf in leaves), key=lambda dtype: dtype.itemsize, default=jnp.dtype(jnp.float32))
    parts = [leaf.astype(widest).reshape(-1) for leaf in leaves]
    vector = parts[0] if len(parts) == 1 else jnp.concatenate([jnp.zeros(0, widest), *parts])
    return Packed(encode(vector, key), structure, arrays)


def unpack(decode: Callable[[PyTree, int], jax.Array], packed: Packed) -> PyTree:
    """The tree that a payload stands for.

    Args:
      decode: as in `Codec`.
      packed: from `pack`.

    Returns:
      Arrays in their shapes and dtypes.
    """
    vector = decode(packed.payload, packed.size)
    leaves, start = [], 0
    for array in packed.arrays:
        end = start + math.prod(array.shape)
        leaves.append(vector[start:end].reshape(array.shape).astype(array.dtype))
        start = end
    return jax.tree.unflatten(packed.structure, leaves)


def _counted(bits: list[jax.Array | int]) -> jax.Array:
    """The sum as int32; static parts are checked."""
    known = sum(count for count in bits if isinstance(count, int))
    if known >= 2**31:
        raise ValueError(f"delta must compress to less than 2^31 bits, got {known}.")
    total = jnp.asarray(known, jnp.int32)
    for count in bits:
        if not isinstance(count, int):
            total = total + count.astype(jnp.int32)
    return total


def leafwise(codec: Codec) -> Compressor:
    """Compresses every leaf as a vector of its own: scales and thresholds follow the layer, and layer masks compose.

    Args:
      codec: code for one vector.

    Returns:
      A `Compressor` without a state; leaf `i` draws from `fold_in(key, i)`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> half = Codec(lambda v, key: v.astype(jnp.float16), lambda p, d: p.astype(jnp.float32), lambda p, d: 16 * d)
      >>> compressor = leafwise(half)
      >>> compressed, _ = compressor.compress({"a": jnp.ones((2, 3)), "b": jnp.ones(2)}, (), jax.random.key(0))
      >>> print(compressor.bits(compressed), compressor.bits(compressed, {"a": 0.0, "b": 1.0}))
      128 40
      >>> compressor.decompress(compressed)["b"]
      Array([1., 1.], dtype=float32)
    """

    def compress(delta: PyTree, state: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        leaves, structure = jax.tree.flatten(dense(delta))
        packed = [pack(codec.encode, leaf, jax.random.fold_in(key, i)) for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(structure, packed), state

    def decompress(compressed: PyTree) -> PyTree:
        return jax.tree.map(lambda packed: unpack(codec.decode, packed), compressed, is_leaf=_is_packed)

    def bits(compressed: PyTree, mask: PyTree | None = None, *, num_layers: int | None = None) -> jax.Array:
        counts = [codec.bits(packed.payload, packed.size) for packed in jax.tree.leaves(compressed, is_leaf=_is_packed)]
        return masked_bits(counts, decompressed_names(compressed), mask, num_layers)

    return Compressor(lambda params: (), compress, decompress, bits)


def whole(codec: Codec) -> Compressor:
    """Compresses all leaves as one vector: one scale, one threshold, one sketch for the whole model.

    Args:
      codec: code for one vector.

    Returns:
      A `Compressor` without a state. Its `bits` refuse a mask: what is one vector cannot leave a layer out.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> half = Codec(lambda v, key: v.astype(jnp.float16), lambda p, d: p.astype(jnp.float32), lambda p, d: 16 * d)
      >>> compressed, _ = whole(half).compress({"a": jnp.ones((2, 3)), "b": jnp.ones(2)}, (), jax.random.key(0))
      >>> compressed.payload.shape
      (8,)
    """

    def compress(delta: PyTree, state: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        return pack(codec.encode, delta, key), state

    def bits(compressed: PyTree, mask: PyTree | None = None, *, num_layers: int | None = None) -> jax.Array:
        if mask is not None or num_layers is not None:
            raise ValueError(
                "mask must be None for a compressor of the whole model as one vector, which leaves no layer out; "
                "compress leaf by leaf to compose with layer masks."
            )
        return _counted([codec.bits(compressed.payload, compressed.size)])

    return Compressor(lambda params: (), compress, lambda packed: unpack(codec.decode, packed), bits)


def decompressed_names(compressed: PyTree) -> PyTree:
    """The tree that a leafwise compressor was given, with nothing at its leaves.

    Args:
      compressed: tree with a node per leaf.

    Returns:
      Tree of zeros, for its structure and names.
    """
    return jax.tree.map(lambda packed: 0, compressed, is_leaf=_is_packed)


def masked_bits(counts: list[jax.Array | int], like: PyTree, mask: PyTree | None, num_layers: int | None) -> jax.Array:
    """Bits of the leaves that are sent, and of the bitmap where layers were masked.

    Args:
      counts: bits of each leaf.
      like: tree with as many leaves, for its names.
      mask: `None`, or a tree of scalars of that structure; anything above 0 is sent.
      num_layers: layers that the bitmap speaks of; default: those that hold parameters.

    Returns:
      int32 scalar.

    Raises:
      ValueError: if the mask has another structure, `num_layers` is negative or comes without a mask, or the bits do
        not fit into int32.
    """
    if num_layers is not None and (mask is None or num_layers < 0):
        raise ValueError(f"num_layers must be at least 0 and come with a mask, got {num_layers}.")
    if mask is None:
        return _counted(counts)
    if jax.tree.structure(mask) != jax.tree.structure(like):
        raise ValueError(
            f"mask must have the structure of what was compressed, {jax.tree.structure(like)}, "
            f"got {jax.tree.structure(mask)}."
        )
    _counted(counts)  # refuses what does not fit even if all of it is sent
    sent = [
        jnp.where(jnp.asarray(m) > 0, jnp.asarray(count, jnp.int32), jnp.zeros((), jnp.int32))
        for m, count in zip(jax.tree.leaves(mask), counts, strict=True)
    ]
    num_layers = len(layer_names(like)) if num_layers is None else num_layers
    return _counted([*sent, 8 * -(-num_layers // 8)])
