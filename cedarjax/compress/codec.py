"""How code for one vector is lifted to a tree: leaf by leaf, or all leaves as one vector."""

import math
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp

from cedarjax.compress.contract import BitsFn as BitsFn
from cedarjax.compress.contract import Codec as Codec
from cedarjax.compress.contract import Compressor as Compressor
from cedarjax.compress.contract import Packed as Packed
from cedarjax.compress.contract import Scope as Scope
from cedarjax.compress.contract import ToldBits as ToldBits
from cedarjax.compress.dither import mix
from cedarjax.core.lowrank import dense
from cedarjax.core.names import layer_names, leaf_names
from cedarjax.core.types import PyTree


def _is_packed(node: Any) -> bool:
    return isinstance(node, Packed)


def pack(encode: Callable[[jax.Array, jax.Array], PyTree], tree: PyTree, prepared: jax.Array) -> Packed:
    """Encodes all numbers of a tree as one vector.

    Args:
      encode: as in `Codec`.
      tree: arrays of floats.
      prepared: PRNG key, or what the codec has prepared.

    Returns:
      A `Packed` node.

    Raises:
      TypeError: if a leaf does not hold floats.
    """
    vector, structure, arrays = _vector(tree)
    return Packed(encode(vector, prepared), structure, arrays)


def _vector(tree: PyTree) -> tuple[jax.Array, Any, tuple[jax.ShapeDtypeStruct, ...]]:
    """All numbers of a tree in the widest of its dtypes, and what is needed to go back."""
    tree = dense(tree)
    leaves, structure = jax.tree.flatten(tree)
    for name, leaf in zip(leaf_names(tree), leaves, strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"delta must hold floats, got {leaf.dtype} for {name!r}.")
    arrays = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    widest = max((leaf.dtype for leaf in leaves), key=lambda dtype: dtype.itemsize, default=jnp.dtype(jnp.float32))
    parts = [leaf.astype(widest).reshape(-1) for leaf in leaves]
    return parts[0] if len(parts) == 1 else jnp.concatenate([jnp.zeros(0, widest), *parts]), structure, arrays


def _tree(vector: jax.Array, structure: Any, arrays: tuple[jax.ShapeDtypeStruct, ...]) -> PyTree:
    """The inverse of `_vector`."""
    leaves, start = [], 0
    for array in arrays:
        end = start + math.prod(array.shape)
        leaves.append(vector[start:end].reshape(array.shape).astype(array.dtype))
        start = end
    return jax.tree.unflatten(structure, leaves)


def unpack(decode: Callable[[PyTree, int], jax.Array], packed: Packed) -> PyTree:
    """The tree that a payload stands for.

    Args:
      decode: as in `Codec`.
      packed: from `pack`.

    Returns:
      Arrays in their shapes and dtypes.
    """
    return _tree(decode(packed.payload, packed.size), packed.structure, packed.arrays)


def _counted(bits: list[ToldBits | int]) -> jax.Array:
    """The sum as int32, which is checked to fit."""
    most = sum(count if isinstance(count, int) else count.most for count in bits)
    if most >= 2**31:
        raise ValueError(f"delta must compress to less than 2^31 bits, got {most}.")
    known = sum(count for count in bits if isinstance(count, int))
    told = [count.bits for count in bits if not isinstance(count, int)]
    return sum(told, start=jnp.asarray(known, jnp.int32))


def _prepared(codec: Codec, leaves: list[Any], key: jax.Array) -> list[jax.Array]:
    """What the codec gets with each leaf: a key, unless it prepares something else."""
    if codec.prepare is None:
        return leaf_keys(key, len(leaves))
    return codec.prepare([_vector(leaf)[0] for leaf in leaves])


def leafwise(codec: Codec) -> Compressor:
    """Compresses every leaf as a vector of its own: scales and thresholds follow the layer, and layer masks compose.

    Args:
      codec: code for one vector.

    Returns:
      A `Compressor` without a state; leaf `i` draws from the `i`-th of `leaf_keys`.

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
        packed = [pack(codec.encode, leaf, k) for leaf, k in zip(leaves, _prepared(codec, leaves, key), strict=True)]
        return jax.tree.unflatten(structure, packed), state

    def decompress(compressed: PyTree) -> PyTree:
        return jax.tree.map(lambda packed: unpack(codec.decode, packed), compressed, is_leaf=_is_packed)

    def bits(compressed: PyTree, mask: PyTree | None = None, *, num_layers: int | None = None) -> jax.Array:
        counts = [codec.bits(packed.payload, packed.size) for packed in jax.tree.leaves(compressed, is_leaf=_is_packed)]
        return masked_bits(counts, decompressed_names(compressed), mask, num_layers)

    def roundtrip(delta: PyTree, state: PyTree, key: jax.Array) -> tuple[PyTree, PyTree, Callable[..., jax.Array]]:
        assert codec.roundtrip is not None
        leaves, structure = jax.tree.flatten(dense(delta))
        after, counts = [], []
        for leaf, prepared in zip(leaves, _prepared(codec, leaves, key), strict=True):
            vector, *shape = _vector(leaf)
            vector, count = codec.roundtrip(vector, prepared)
            after.append(_tree(vector, *shape))
            counts.append(count)
        like = jax.tree.unflatten(structure, [0] * len(leaves))

        def count_bits(mask: PyTree | None = None, *, num_layers: int | None = None) -> jax.Array:
            return masked_bits(counts, like, mask, num_layers)

        return jax.tree.unflatten(structure, after), state, count_bits

    def entropy_bits(compressed: PyTree, mask: PyTree | None = None, *, num_layers: int | None = None) -> jax.Array:
        assert codec.entropy is not None
        bits(compressed, mask, num_layers=num_layers)  # refuses what does not fit together
        nodes = jax.tree.leaves(compressed, is_leaf=_is_packed)
        counts = [jnp.asarray(codec.entropy(node.payload, node.size), jnp.float32) for node in nodes]
        like = decompressed_names(compressed)
        none = masked_bits([0] * len(counts), like, mask, num_layers).astype(jnp.float32)
        if mask is not None:
            sent = [jnp.asarray(m) > 0 for m in jax.tree.leaves(mask)]
            counts = [jnp.where(s, c, jnp.zeros_like(c)) for s, c in zip(sent, counts, strict=True)]
        return sum(counts, start=none)

    return Compressor(
        lambda params: (),
        compress,
        decompress,
        bits,
        None if codec.roundtrip is None else roundtrip,
        None if codec.entropy is None else entropy_bits,
    )


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

    def prepared(delta: PyTree, key: jax.Array) -> jax.Array:
        return key if codec.prepare is None else codec.prepare([_vector(delta)[0]])[0]

    def compress(delta: PyTree, state: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        return pack(codec.encode, delta, prepared(delta, key)), state

    def refuse(mask: PyTree | None, num_layers: int | None) -> None:
        if mask is not None or num_layers is not None:
            raise ValueError(
                "mask must be None for a compressor of the whole model as one vector, which leaves no layer out; "
                "compress leaf by leaf to compose with layer masks."
            )

    def bits(compressed: PyTree, mask: PyTree | None = None, *, num_layers: int | None = None) -> jax.Array:
        refuse(mask, num_layers)
        return _counted([codec.bits(compressed.payload, compressed.size)])

    def roundtrip(delta: PyTree, state: PyTree, key: jax.Array) -> tuple[PyTree, PyTree, Callable[..., jax.Array]]:
        assert codec.roundtrip is not None
        vector, *shape = _vector(delta)
        vector, count = codec.roundtrip(vector, prepared(delta, key))

        def count_bits(mask: PyTree | None = None, *, num_layers: int | None = None) -> jax.Array:
            refuse(mask, num_layers)
            return _counted([count])

        return _tree(vector, *shape), state, count_bits

    def entropy_bits(compressed: PyTree, mask: PyTree | None = None, *, num_layers: int | None = None) -> jax.Array:
        assert codec.entropy is not None
        refuse(mask, num_layers)
        return jnp.asarray(codec.entropy(compressed.payload, compressed.size), jnp.float32)

    return Compressor(
        lambda params: (),
        compress,
        lambda packed: unpack(codec.decode, packed),
        bits,
        None if codec.roundtrip is None else roundtrip,
        None if codec.entropy is None else entropy_bits,
    )


def lift(codec: Codec, scope: Scope) -> Compressor:
    """Makes a compressor of code for one vector, leaf by leaf or for the whole model.

    Args:
      codec: code for one vector.
      scope: `"leaf"` or `"model"`.

    Returns:
      `leafwise(codec)` or `whole(codec)`.

    Raises:
      ValueError: for another scope.
    """
    if scope not in get_args(Scope):
        raise ValueError(f"scope must be one of {get_args(Scope)}, got {scope!r}.")
    return leafwise(codec) if scope == "leaf" else whole(codec)


def leaf_keys(key: jax.Array, num_leaves: int) -> list[jax.Array]:
    """One key a leaf, each word of the given one hashed with the number of the leaf.

    `jax.random.fold_in` would do as well, but on a CPU it takes as long as the quantisation of a small layer.

    Args:
      key: PRNG key.
      num_leaves: leaves.

    Returns:
      `num_leaves` keys of the same implementation.
    """
    words, impl = jax.random.key_data(key), jax.random.key_impl(key)
    salts = mix(
        jnp.arange(num_leaves * words.shape[0], dtype=jnp.uint32).reshape(num_leaves, words.shape[0]) + jnp.uint32(1)
    )
    hashed = mix(mix(words[None] ^ salts) + words[None, ::-1])
    return [jax.random.wrap_key_data(hashed[i], impl=impl) for i in range(num_leaves)]


def sent(
    compressor: Compressor, delta: PyTree, state: PyTree, key: jax.Array
) -> tuple[PyTree, PyTree, Callable[..., jax.Array]]:
    """Compresses, and decompresses again, in the shortest way that the compressor offers.

    Args:
      compressor: any.
      delta: what to send.
      state: the compressor's state.
      key: PRNG key.

    Returns:
      What arrives, the compressor's next state and `count(mask=None, *, num_layers=None)`, the bits sent.
    """
    if compressor.roundtrip is not None:
        return compressor.roundtrip(delta, state, key)
    compressed, state = compressor.compress(delta, state, key)

    def count(mask: PyTree | None = None, *, num_layers: int | None = None) -> jax.Array:
        return compressor.bits(compressed, mask, num_layers=num_layers)

    return compressor.decompress(compressed), state, count


def decompressed_names(compressed: PyTree) -> PyTree:
    """The tree that a leafwise compressor was given, with nothing at its leaves.

    Args:
      compressed: tree with a node per leaf.

    Returns:
      Tree of zeros, for its structure and names.
    """
    return jax.tree.map(lambda packed: 0, compressed, is_leaf=_is_packed)


def masked_bits(counts: list[ToldBits | int], like: PyTree, mask: PyTree | None, num_layers: int | None) -> jax.Array:
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
    num_layers = len(layer_names(like)) if num_layers is None else num_layers
    total = _counted([8 * -(-num_layers // 8)])
    for layer, count in zip(jax.tree.leaves(mask), counts, strict=True):
        total = total + jnp.where(jnp.asarray(layer) > 0, _counted([count]), jnp.zeros((), jnp.int32))
    return total
