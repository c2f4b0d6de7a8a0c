"""Local updates that upload what a linear compressor makes of their delta."""

import jax

from cedarjax.compress.codec import Compressor
from cedarjax.compress.feedback import CompressionInfo, CompressionState, compression_info
from cedarjax.core.lowrank import dense
from cedarjax.core.types import LocalUpdate, Params, PyTree, Shared, Upload

_SEND_STREAM = 0x73656E64  # keeps the compressor's draws apart from those of the wrapped update


def send_compressed(local_update: LocalUpdate, compressor: Compressor) -> LocalUpdate:
    """Uploads compressed deltas as they are, for a server that reads them so.

    The server averages what it is sent, so the compressor must be linear, as `count_sketch` is. Rules that read the
    updates themselves need `with_compression` or `with_error_feedback`, which upload what arrives.

    Args:
      local_update: one client's work. It must not leave layers out.
      compressor: a linear one.

    Returns:
      A `LocalUpdate` whose `Upload.delta` is the compressed tree, with `CompressionState` and `CompressionInfo`.

    Raises:
      ValueError: at trace time, if the wrapped update leaves layers out.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> local = cj.local.sgd(lambda w, x, key: 0.5 * jnp.sum((w - x) ** 2), optax.sgd(1.0), batch_size=1)
      >>> sending = send_compressed(local, cj.compress.count_sketch(3, 4))
      >>> one, params = jnp.int32(1), jnp.zeros(9)
      >>> data = cj.ClientData(jnp.ones((1, 9)), num_examples=one, num_support=one)
      >>> upload, _, info = sending.update(params, sending.init(params), data, jax.random.key(0))
      >>> print(upload.delta.payload.shape, info.uploaded_bits)
      (3, 4) 384
    """

    def init(params: Params) -> CompressionState:
        return CompressionState(local_update.init(params), compressor.init(local_update.share(params)))

    def update(
        shared: Shared, state: CompressionState, data: PyTree, key: jax.Array
    ) -> tuple[Upload, CompressionState, CompressionInfo]:
        upload, client_state, local_info = local_update.update(shared, state.client_state, data, key)
        if upload.mask is not None:
            raise ValueError(
                "local_update must upload all layers to be sent compressed, got one that leaves layers out: averages "
                "of compressed updates cannot tell who sent which layer."
            )
        own_key = jax.random.fold_in(key, _SEND_STREAM)
        compressed, compressor_state = compressor.compress(upload.delta, state.compressor, own_key)
        info = compression_info(local_info, compressor.bits(compressed), dense(upload.delta))
        return Upload(compressed), CompressionState(client_state, compressor_state), info

    def model(shared: Shared, state: CompressionState) -> Params:
        return local_update.model(shared, state.client_state)

    return LocalUpdate(init, update, local_update.share, model)
