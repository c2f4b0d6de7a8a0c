"""All clients' numbers for a block of parameters at a time: `[C, B]`, and memory that does not grow with `D`.

Coordinate-wise rules and inner products about a centre read the updates column by column. A block stays in the cache
of a CPU; what is computed from it (masked, centred, ranked) is as large as the block, never as large as the updates.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cedarjax.core.dtypes import accumulator
from cedarjax.core.lowrank.node import LowRank, dense, is_low_rank
from cedarjax.core.mixture import Mixture
from cedarjax.core.sharded import divides, share_of_parameters
from cedarjax.core.types import PyTree

_BLOCK_ON_CPU = 2**17  # numbers in a block: half a megabyte of float32
_BLOCK = 2**25
_HIGHEST = lax.Precision.HIGHEST


def on_cpu(mesh: Mesh | None = None) -> bool:
    """Whether a computation will run on CPUs.

    Args:
      mesh: where it will run; default: the first device.

    Returns:
      A Python bool.
    """
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    return device.platform == "cpu"


def block_width(num_rows: int, mesh: Mesh | None = None, factor: int = 1) -> int:
    """Columns in a block.

    Args:
      num_rows: rows of the block.
      mesh: where it will run.
      factor: how many times more numbers than a block on a CPU usually has.

    Returns:
      `B`, a power of two, at least 64: rows that end where a vector ends are read half as fast again on a CPU.
    """
    most = (_BLOCK_ON_CPU * factor if on_cpu(mesh) else _BLOCK) // num_rows
    return 1 << max(6, most.bit_length() - 1)


def even_width(length: int, width: int) -> int:
    """Columns in a block if all blocks are to be about equally wide, so that the last one repeats few columns.

    Args:
      length: columns in all.
      width: the most columns in a block, a power of two from `block_width`.

    Returns:
      `B`, a multiple of 16 unless it is `length`.

    Example:
      >>> even_width(100_000, 8192), even_width(100, 64), even_width(10, 64)
      (7696, 64, 10)
    """
    if length <= width:
        return length
    num_blocks = -(-length // width)
    even = -(-length // num_blocks)
    return -(-even // 16) * 16


def _grouped(updates: PyTree, width: int) -> list[tuple[list[int], Callable[[list], jax.Array]]]:
    """Leaves that are walked together, as indices and how they become `[C, K]`: small ones share a walk."""
    leaves = jax.tree.leaves(updates, is_leaf=is_low_rank)
    small: dict[jnp.dtype, list[int]] = {}
    groups: list[list[int]] = []
    for i, leaf in enumerate(leaves):
        if leaf.size // leaf.shape[0] > width:
            groups.append([i])
        elif leaf.size:
            small.setdefault(leaf.dtype, []).append(i)

    def joined(leaves: list[jax.Array | LowRank]) -> jax.Array:
        rows = [x.reshape(x.shape[0], -1) for x in dense(leaves)]
        return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)

    return [(group, joined) for group in [*groups, *small.values()]]


def walk(fun: Callable[..., jax.Array], rows: Sequence[jax.Array], width: int) -> jax.Array:
    """`fun` of blocks of columns, put side by side.

    Args:
      fun: `fun(*blocks) -> [B]` for blocks `[C_p, B]`.
      rows: arrays `[C_p, K]`.
      width: columns in a block.

    Returns:
      `[K]`.

    Example:
      >>> import jax.numpy as jnp
      >>> walk(lambda block: block.max(axis=0), [jnp.array([[1, 5, 2], [4, 3, 3]])], width=2).tolist()
      [4, 5, 3]
    """
    length = rows[0].shape[1]
    if length <= width:
        return fun(*rows)
    # The last block ends where the columns end and overlaps the one before.
    starts = jnp.minimum(jnp.arange(-(-length // width), dtype=jnp.int32) * width, length - width)
    blocks = lax.map(lambda s: fun(*(lax.dynamic_slice_in_dim(x, s, width, axis=1) for x in rows)), starts)
    overlap = blocks.size - length
    return jnp.concatenate([blocks[:-1].reshape(-1), blocks[-1, overlap:]])


def map_columns(
    fun: Callable[[jax.Array], jax.Array], updates: PyTree | Mixture, *, mesh: Mesh | None = None
) -> PyTree:
    """Applies a function of the clients' numbers for some parameters to all parameters.

    Args:
      fun: `fun(block [C, B]) -> [B]`, column by column, for blocks of any width; the rows come in the dtype of the
        updates, those of a `Mixture` in the accumulators'.
      updates: tree with leaves `[C, ...]`, or a `Mixture`.
      mesh: mesh over which the client axis lies. Then each device works on its share of the parameters of all clients,
        so that `C D / n` numbers are exchanged and no device ever holds all updates.

    Returns:
      Tree with leaves `[...]` in the dtype of `updates`.

    Example:
      >>> import jax.numpy as jnp
      >>> map_columns(lambda block: block.max(axis=0), {"a": jnp.array([[1.0, 5.0], [4.0, 3.0]])})
      {'a': Array([4., 5.], dtype=float32)}
    """
    if isinstance(updates, Mixture):
        parts, matrices = list(updates.parts), updates.matrices

        def block_fun(*blocks: jax.Array) -> jax.Array:
            return fun(mixed(matrices, blocks))
    else:
        parts = [updates]

        def block_fun(*blocks: jax.Array) -> jax.Array:
            return fun(*blocks)

    counts = [jax.tree.leaves(part)[0].shape[0] for part in parts]
    num_rows = max(*counts, updates.num_rows) if isinstance(updates, Mixture) else counts[0]
    width = block_width(num_rows, mesh)
    leaves = [jax.tree.leaves(part, is_leaf=is_low_rank) for part in parts]
    out: list[jax.Array | None] = [None] * len(leaves[0])
    # A part beside the clients' updates is an attacker's and lies on no mesh.
    spread = len(parts) == 1 and divides(mesh, counts[0])
    for group, joined in _grouped(parts[0], width):
        chosen = [[part[i] for i in group] for part in leaves]
        if spread:
            assert mesh is not None
            flat = _on_shares(block_fun, joined, chosen[0], width, mesh)
        else:
            flat = walk(block_fun, [joined(part) for part in chosen], width)
        start = 0
        for i in group:
            shape = leaves[0][i].shape[1:]
            size = leaves[0][i].size // leaves[0][i].shape[0]
            out[i] = flat[start : start + size].reshape(shape).astype(leaves[0][i].dtype)
            start += size
    done = [jnp.zeros(x.shape[1:], x.dtype) if y is None else y for x, y in zip(leaves[0], out, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(parts[0], is_leaf=is_low_rank), done)


def _on_shares(
    fun: Callable[[jax.Array], jax.Array], joined: Callable[[list], jax.Array], leaves: list, width: int, mesh: Mesh
) -> jax.Array:
    """`walk` on each device's share of the parameters."""

    def own(leaves: list) -> jax.Array:
        return walk(fun, [share_of_parameters(joined(leaves), mesh)], width)

    run = jax.shard_map(own, mesh=mesh, in_specs=P(mesh.axis_names), out_specs=P(mesh.axis_names), check_vma=False)
    return run(leaves)


def mixed(matrices: Sequence[jax.Array], blocks: Sequence[jax.Array]) -> jax.Array:
    """Blocks of a mixture's rows, `sum_p matrices[p] @ blocks[p]`.

    Args:
      matrices: `[K, C_p]`.
      blocks: `[C_p, B]`; rows that are not read may hold anything.

    Returns:
      `[K, B]`, float32 or wider.
    """
    total = None
    for matrix, block in zip(matrices, blocks, strict=True):
        dtype = accumulator(block)
        kept = jnp.where((matrix != 0).any(axis=0)[:, None], block, jnp.zeros((), block.dtype)).astype(dtype)
        term = jnp.matmul(matrix.astype(dtype), kept, precision=_HIGHEST)
        total = term if total is None else total + term
    assert total is not None
    return total
