"""PowerSGD: updates of matrices by two thin factors, on the clients or, because it is linear, on the server.

Reference: Vogels et al., `PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization
<https://arxiv.org/abs/1905.13727>`_, 2019. The paper takes the first axis of a kernel for the rows of its matrix, the
outputs in PyTorch; here they are the last axis, the outputs in flax. Its warm start and error feedback are here, its
momentum is the optimiser's.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cedarjax.compress.codec import Compressor, Packed, ToldBits, decompressed_names, masked_bits
from cedarjax.compress.low_rank import Factors, first_start, matrix_shape, power_step
from cedarjax.core.batches import check_positive
from cedarjax.core.client_mean import client_mean
from cedarjax.core.dtypes import accumulator
from cedarjax.core.lowrank import dense
from cedarjax.core.types import Aggregator, Params, PyTree


class PowerSGDState(NamedTuple):
    """State of `powersgd_mean` and `powersgd_of_mean`."""

    starts: PyTree
    """`Q` of every leaf that is a matrix, `[n, r]`, `None` for the others."""
    errors: PyTree
    """What was not applied yet of these leaves, in float32 or wider; `None` for the others."""
    num_nonfinite: jax.Array
    """int32 scalar, uploads left out so far because they were not finite; counted by `powersgd_mean`."""


def _is_none(x: Any) -> bool:
    return x is None


def _is_packed(x: Any) -> bool:
    return isinstance(x, Packed)


def _starts(params: Params, rank: int, seed: int) -> PyTree:
    leaves, structure = jax.tree.flatten(params)
    starts = [first_start(jnp.shape(x), rank, seed, i, jnp.result_type(x)) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, starts)


def powersgd(rank: int, *, seed: int = 0) -> Compressor:
    """PowerSGD of one client: each matrix by factors of rank `r`, from one step of a power iteration.

    `P = orth(M Q)`, `Q' = M^T P`; sent are `P` and `Q'`, and they stand for `P Q'^T`. The client starts its next round
    from `Q'`, so that over rounds of similar updates the step becomes an iteration. The error is never longer than the
    update: use error feedback. An update whose matrices have rank `r` at most is sent exactly.

    A leaf of two or more axes is the matrix of its last axis and all others. Other leaves, and those for which
    `r (m + n) >= m n`, are sent as they are.

    Args:
      rank: `r`, at least 1.
      seed: seed of the first `Q`.

    Returns:
      A `Compressor` whose state is the `Q` of every matrix. Factors are sent in the dtype of the leaf.

    Raises:
      ValueError: if `rank` is below 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> delta = {"kernel": jnp.outer(jnp.arange(20.0), jnp.arange(10.0)), "bias": jnp.ones(10)}
      >>> compressor = powersgd(1)
      >>> compressed, _ = compressor.compress(delta, compressor.init(delta), jax.random.key(0))
      >>> restored = compressor.decompress(compressed)
      >>> print(compressor.bits(compressed) // 32, jnp.allclose(restored["kernel"], delta["kernel"]))
      40 True
    """
    check_positive(rank=rank)

    def compress(delta: PyTree, state: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        del key
        leaves, structure = jax.tree.flatten(dense(delta))
        packed, starts = [], []
        for leaf, start in zip(leaves, jax.tree.leaves(state, is_leaf=_is_none), strict=True):
            payload, next_start = leaf, None
            if start is not None:
                payload, next_start = power_step(leaf.reshape(-1, leaf.shape[-1]), start)
            array = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            packed.append(Packed(payload, jax.tree.structure(0), (array,)))
            starts.append(next_start)
        return jax.tree.unflatten(structure, packed), jax.tree.unflatten(structure, starts)

    def restore(packed: Packed) -> jax.Array:
        (array,) = packed.arrays
        if not isinstance(packed.payload, Factors):
            return packed.payload
        return packed.payload.product().astype(array.dtype).reshape(array.shape)

    def decompress(compressed: PyTree) -> PyTree:
        return jax.tree.map(restore, compressed, is_leaf=_is_packed)

    def bits(compressed: PyTree, mask: PyTree | None = None, *, num_layers: int | None = None) -> jax.Array:
        counts: list[ToldBits | int] = [
            _leaf_bits(p.arrays[0], rank) for p in jax.tree.leaves(compressed, is_leaf=_is_packed)
        ]
        return masked_bits(counts, decompressed_names(compressed), mask, num_layers)

    return Compressor(lambda params: _starts(params, rank, seed), compress, decompress, bits)


def _leaf_bits(array: jax.Array | jax.ShapeDtypeStruct, rank: int) -> int:
    matrix = matrix_shape(array.shape, rank)
    count = array.size if matrix is None else rank * sum(matrix)
    return 8 * jnp.dtype(array.dtype).itemsize * count


def powersgd_bits(params: Params, rank: int) -> int:
    """Bits that each client sends in a round of PowerSGD, on its own or with the factors averaged.

    `r (m + n)` numbers for each matrix that is compressed, and all numbers of the other leaves. With averaged factors
    a client sends `m r` of them, waits for the mean to come back made orthogonal, and then sends the other `n r`.

    Args:
      params: arrays, or `jax.ShapeDtypeStruct`.
      rank: `r`, at least 1.

    Returns:
      A Python int.

    Raises:
      ValueError: if `rank` is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> powersgd_bits({"kernel": jnp.ones((20, 10)), "bias": jnp.ones(10)}, rank=1)  # 32 * (20 + 10 + 10)
      1280
    """
    check_positive(rank=rank)
    return sum(_leaf_bits(leaf, rank) for leaf in jax.tree.leaves(params))


def _empty_state(params: Params, rank: int, seed: int) -> PowerSGDState:
    def error(leaf: jax.Array) -> jax.Array | None:
        shape = jnp.shape(leaf)
        return None if matrix_shape(shape, rank) is None else jnp.zeros(shape, accumulator(jnp.asarray(leaf)))

    return PowerSGDState(_starts(params, rank, seed), jax.tree.map(error, params), jnp.zeros((), jnp.int32))


def _feed_back(mean: PyTree, sent: PyTree, state: PowerSGDState) -> tuple[PyTree, PowerSGDState]:
    """The low-rank part of mean and error, and what is left of them; nothing for leaves that nobody sent."""
    leaves, structure = jax.tree.flatten(mean)
    per_leaf = (
        jax.tree.leaves(sent),
        jax.tree.leaves(state.starts, is_leaf=_is_none),
        jax.tree.leaves(state.errors, is_leaf=_is_none),
    )
    outs: list[jax.Array] = []
    starts: list[jax.Array | None] = []
    errors: list[jax.Array | None] = []
    for leaf, there, start, error in zip(leaves, *per_leaf, strict=True):
        if start is None:
            outs.append(leaf)
            starts.append(None)
            errors.append(None)
            continue
        total = leaf.astype(error.dtype) + error
        factors, next_start = power_step(total.reshape(-1, leaf.shape[-1]), start)
        out = jnp.where(there, factors.product().reshape(leaf.shape), jnp.zeros_like(total)).astype(leaf.dtype)
        outs.append(out)
        starts.append(jnp.where(there, next_start, start))
        errors.append(jnp.where(there, total - out.astype(total.dtype), error))

    def in_tree(x: list) -> PyTree:
        return jax.tree.unflatten(structure, x)

    return in_tree(outs), PowerSGDState(in_tree(starts), in_tree(errors), state.num_nonfinite)


def powersgd_of_mean(rank: int, *, seed: int = 0) -> optax.GradientTransformation:
    """PowerSGD on a mean that was taken already, as in `streamed_round`.

    `chain(robust.mean(), powersgd_of_mean(r))` is `powersgd_mean(r)`, except that it cannot know which layers nobody
    sent. See there.

    Args:
      rank: as in `powersgd`.
      seed: as in `powersgd`.

    Returns:
      An optax transformation with the state `PowerSGDState`.

    Raises:
      ValueError: if `rank` is below 1.
    """
    check_positive(rank=rank)

    def update(updates: PyTree, state: PowerSGDState, params: Params | None = None) -> tuple[PyTree, PowerSGDState]:
        del params
        return _feed_back(updates, jax.tree.map(lambda _: jnp.ones((), bool), updates), state)

    return optax.GradientTransformation(lambda params: _empty_state(params, rank, seed), update)


def powersgd_mean(rank: int, *, seed: int = 0) -> Aggregator:
    """PowerSGD with averaged factors: the weighted mean of the updates, compressed once for all, with error feedback.

    `P = orth(sum_i w_i (M_i + e_i) Q)`, `Q' = sum_i w_i (M_i + e_i)^T P`; applied is `P Q'^T`, and each client's error
    becomes `M_i + e_i - P Q'^T`. All of it is linear in the clients, so the server that simulates them needs their mean
    update and mean error only, and no memory but that of the parameters.

    In a real system a client sends `powersgd_bits` in two messages, and its error lies with the client. The mean error
    that is kept here is the same while the same clients take part in every round with the same weights; else it is
    that of a client who is always there.

    Args:
      rank: as in `powersgd`.
      seed: as in `powersgd`.

    Returns:
      An `Aggregator` that reads `weights=` (`[C]`, a tree of `[C]` leaves, or `None` for equal weights) and `mesh=`.
      Its state is a `PowerSGDState`. A client whose upload is not finite is absent. A layer that nobody sent is not
      changed, nor is its error.

    Raises:
      ValueError: if `rank` is below 1; when `update` is traced, if the client axes or structures disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = powersgd_mean(1)
      >>> updates = {"w": jnp.stack([jnp.outer(jnp.arange(3.0), jnp.arange(4.0)), jnp.zeros((3, 4))])}
      >>> update, state = rule.update(updates, rule.init({"w": jnp.zeros((3, 4))}), weights=jnp.array([1.0, 3.0]))
      >>> print(jnp.allclose(update["w"], updates["w"][0] / 4, atol=1e-6))
      True
    """
    check_positive(rank=rank)

    def update(
        updates: PyTree,
        state: PowerSGDState,
        params: Params | None = None,
        *,
        weights: PyTree | None = None,
        mesh: Mesh | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, PowerSGDState]:
        del params, extra_args
        found = client_mean(updates, weights, mesh=mesh)
        out, state = _feed_back(found.mean, found.sent, state)
        return out, state._replace(num_nonfinite=state.num_nonfinite + found.num_nonfinite)

    return optax.GradientTransformationExtraArgs(lambda params: _empty_state(params, rank, seed), update)
