"""Compressed uploads of any local update, with a memory of what was lost or without.

References: Seide, Fu, Droppo, Li, Yu, `1-Bit Stochastic Gradient Descent and its Application to Data-Parallel
Distributed Training of Speech DNNs <https://www.microsoft.com/en-us/research/publication/1-bit-stochastic-gradient-
descent-and-application-to-data-parallel-distributed-training-of-speech-dnns/>`_, 2014; Karimireddy, Rebjock, Stich,
Jaggi, `Error Feedback Fixes SignSGD and other Gradient Compression Schemes <https://arxiv.org/abs/1901.09847>`_, 2019.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.compress.codec import Compressor, sent
from cedarjax.core.dtypes import accumulator
from cedarjax.core.lowrank import dense
from cedarjax.core.types import LocalUpdate, Params, PyTree, Shared, Upload

_STREAM = 0x636F6D70  # keeps the compressor's draws apart from those of the wrapped update


class FeedbackState(NamedTuple):
    """What a client keeps between its rounds."""

    client_state: PyTree
    """State of the wrapped update."""
    error: PyTree
    """What was not sent yet, shaped like the upload, in float32 or wider."""
    compressor: PyTree
    """State of the compressor."""


class CompressionState(NamedTuple):
    """What a client without a memory keeps between its rounds."""

    client_state: PyTree
    """State of the wrapped update."""
    compressor: PyTree
    """State of the compressor."""


class CompressionInfo(NamedTuple):
    """What is told about one client's round."""

    local: PyTree
    """Info of the wrapped update."""
    uploaded_bits: jax.Array
    """int32 scalar, exact, bitmap of the layers included."""
    uploaded_bytes: jax.Array
    """int32 scalar, the same in whole bytes."""
    full_bytes: jax.Array
    """int32 scalar, bytes of an upload that is not compressed."""


def compression_info(local: PyTree, bits: jax.Array, delta: PyTree) -> CompressionInfo:
    """What is told about one client's round.

    Args:
      local: info of the wrapped update.
      bits: int32 scalar, what was sent.
      delta: what would have been sent without compression.

    Returns:
      A `CompressionInfo`.

    Raises:
      ValueError: if `delta` has 2^31 bytes or more.
    """
    full = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(delta))
    if full >= 2**31:
        raise ValueError(f"delta must hold less than 2^31 bytes, got {full}.")
    return CompressionInfo(local, bits, bits // 8 + (bits % 8 > 0).astype(jnp.int32), jnp.asarray(full, jnp.int32))


def _only_sent(mask: PyTree | None, new: PyTree, old: PyTree) -> PyTree:
    """The new leaves where a layer is sent, the old ones elsewhere."""
    return new if mask is None else jax.tree.map(lambda m, a, b: jnp.where(m > 0, a, b), mask, new, old)


def with_compression(
    local_update: LocalUpdate, compressor: Compressor, *, num_layers: int | None = None
) -> LocalUpdate:
    """Uploads what arrives of the delta after compression; what is lost is lost, so use a compressor without a bias.

    A layer that the wrapped update leaves out sends nothing.

    Args:
      local_update: one client's work; it receives its key and its data unchanged.
      compressor: how to compress, best an unbiased one.
      num_layers: layers that the bitmap of a masked upload speaks of; default: those that hold parameters. Behind
        `upload_filter` it is the number of judged layers.

    Returns:
      A `LocalUpdate` with `CompressionState` and `CompressionInfo`, and the mask of the wrapped one. A delta that is
      not finite is uploaded so.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> local = cj.local.sgd(lambda w, x, key: 0.5 * jnp.sum((w - x) ** 2), optax.sgd(1.0), batch_size=1)
      >>> sending = with_compression(local, cj.compress.terngrad())
      >>> one, params = jnp.int32(1), jnp.zeros(8)
      >>> data = cj.ClientData(jnp.ones((1, 8)), num_examples=one, num_support=one)
      >>> upload, _, info = sending.update(params, sending.init(params), data, jax.random.key(0))
      >>> print(upload.delta, info.uploaded_bytes, info.full_bytes)
      [-1. -1. -1. -1. -1. -1. -1. -1.] 6 32
    """

    def init(params: Params) -> CompressionState:
        return CompressionState(local_update.init(params), compressor.init(local_update.share(params)))

    def update(
        shared: Shared, state: CompressionState, data: PyTree, key: jax.Array
    ) -> tuple[Upload, CompressionState, CompressionInfo]:
        upload, client_state, local_info = local_update.update(shared, state.client_state, data, key)
        delta = dense(upload.delta)
        arrived, compressor_state, count = sent(compressor, delta, state.compressor, jax.random.fold_in(key, _STREAM))
        arrived = _only_sent(upload.mask, arrived, jax.tree.map(jnp.zeros_like, delta))
        info = compression_info(local_info, count(upload.mask, num_layers=num_layers), delta)
        return Upload(arrived, upload.mask), CompressionState(client_state, compressor_state), info

    def model(shared: Shared, state: CompressionState) -> Params:
        return local_update.model(shared, state.client_state)

    return LocalUpdate(init, update, local_update.share, model)


def with_error_feedback(
    local_update: LocalUpdate, compressor: Compressor, *, num_layers: int | None = None
) -> LocalUpdate:
    """Uploads what arrives after compression, and adds what was lost to the client's next delta.

    `p = delta + e; c = C(p); e <- p - c`: so whatever the compressor does, `sum_t c_t = sum_t delta_t - e_T`, and
    nothing is lost but delayed. A layer that the wrapped update leaves out sends nothing, and its error waits.

    Args:
      local_update: one client's work; it receives its key and its data unchanged.
      compressor: how to compress, best a contractive one. An unbiased one of large variance makes errors grow.
      num_layers: layers that the bitmap of a masked upload speaks of; default: those that hold parameters. Behind
        `upload_filter` it is the number of judged layers.

    Returns:
      A `LocalUpdate` with `FeedbackState` and `CompressionInfo`, and the mask of the wrapped one. A round whose `p` is
      not finite is uploaded so, for the server to leave out, and changes neither the error nor the compressor's state.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> local = cj.local.sgd(lambda w, x, key: 0.5 * jnp.sum((w - x) ** 2), optax.sgd(1.0), batch_size=1)
      >>> sending = with_error_feedback(local, cj.compress.top_k(0.5))
      >>> one, params = jnp.int32(1), jnp.zeros(4)
      >>> data = cj.ClientData(-jnp.arange(4.0)[None], num_examples=one, num_support=one)
      >>> upload, state, info = sending.update(params, sending.init(params), data, jax.random.key(0))
      >>> print(upload.delta, state.error, info.uploaded_bits)
      [0. 0. 2. 3.] [0. 1. 0. 0.] 68
    """

    def init(params: Params) -> FeedbackState:
        shared = local_update.share(params)
        error = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), accumulator(x)), shared)
        return FeedbackState(local_update.init(params), error, compressor.init(shared))

    def update(
        shared: Shared, state: FeedbackState, data: PyTree, key: jax.Array
    ) -> tuple[Upload, FeedbackState, CompressionInfo]:
        upload, client_state, local_info = local_update.update(shared, state.client_state, data, key)
        delta, mask = dense(upload.delta), upload.mask
        wanted = jax.tree.map(lambda d, e: d.astype(e.dtype) + e, delta, state.error)
        rounded = jax.tree.map(lambda p, d: p.astype(d.dtype), wanted, delta)
        arrived, after, count = sent(compressor, rounded, state.compressor, jax.random.fold_in(key, _STREAM))
        arrived = _only_sent(mask, arrived, jax.tree.map(jnp.zeros_like, delta))
        # What is not finite arrives so: the contract of a compressor.
        finite = jnp.stack([jnp.isfinite(c).all() for c in jax.tree.leaves(arrived)] or [jnp.ones((), bool)]).all()

        def lost(p: jax.Array, c: jax.Array, e: jax.Array) -> jax.Array:
            rest = p - c.astype(p.dtype)
            return jnp.where(finite & jnp.isfinite(rest), rest, e)

        error = _only_sent(mask, jax.tree.map(lost, wanted, arrived, state.error), state.error)
        compressor_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), after, state.compressor)
        info = compression_info(local_info, count(mask, num_layers=num_layers), delta)
        return Upload(arrived, mask), FeedbackState(client_state, error, compressor_state), info

    def model(shared: Shared, state: FeedbackState) -> Params:
        return local_update.model(shared, state.client_state)

    return LocalUpdate(init, update, local_update.share, model)
