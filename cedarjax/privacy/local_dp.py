"""Clients that trust nobody: each clips and noises its own upload before it leaves.

References:
  Duchi, Jordan, Wainwright, `Local Privacy and Statistical Minimax Rates <https://arxiv.org/abs/1302.3203>`_, 2013.

  Dwork, McSherry, Nissim, Smith, `Calibrating Noise to Sensitivity in Private Data Analysis
  <https://doi.org/10.1007/11681878_14>`_, 2006: the Laplace mechanism.

The price is accuracy: the noise of `n` clients adds up, where a trusted server would add that of one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cedarjax.core.lowrank import keep
from cedarjax.core.types import LocalUpdate, Params, PyTree, Shared, Upload
from cedarjax.privacy.clip import ClippedInfo, as_leaves_of, check_above_zero, clip_wide
from cedarjax.privacy.mechanism import check_noise, gaussian_noise

_LOCAL_STREAM = 0x6C6F6361  # keeps the noise apart from the draws of the wrapped update


def _noised(
    local_update: LocalUpdate,
    max_norm: jax.Array | float,
    order: int,
    noise_fn: Callable[[jax.Array, PyTree], PyTree],
    mask_is_public: bool,
) -> LocalUpdate:
    def update(shared: Shared, client_state: PyTree, data: PyTree, key: jax.Array) -> tuple[Upload, PyTree, PyTree]:
        upload, client_state, info = local_update.update(shared, client_state, data, key)
        if upload.mask is not None and not mask_is_public:
            raise ValueError(
                "local_update must not send a mask: which layers were left out is told in the clear, and where the "
                "data decide it the accounting is wrong. Let the filter read what was noised already, "
                "upload_filter(local_gaussian(...), ...), or, for masks that do not depend on data, give "
                "mask_is_public=True."
            )
        clipped, told = clip_wide(upload.delta, max_norm, order)
        noise = noise_fn(jax.random.fold_in(key, _LOCAL_STREAM), clipped)
        noised = as_leaves_of(jax.tree.map(jnp.add, clipped, noise), upload.delta)
        if upload.mask is not None:
            noised = jax.tree.map(lambda m, x: keep(m > 0, x), upload.mask, noised)
        return upload._replace(delta=noised), client_state, ClippedInfo(info, told)

    def model(shared: Shared, client_state: PyTree) -> Params:
        return local_update.model(shared, client_state)

    return LocalUpdate(local_update.init, update, local_update.share, model)


def local_gaussian(
    local_update: LocalUpdate,
    max_norm: jax.Array | float,
    noise_multiplier: jax.Array | float,
    *,
    mask_is_public: bool = False,
) -> LocalUpdate:
    """Wraps a local update so that a client uploads `clip(delta, C) + N(0, (z C)^2 I)`.

    Guarantee: `accounting.local_epsilon(noise_multiplier=z, num_reports=..., delta=...)`, against the server and
    everybody behind it, for the upload. The client's info (its loss, for one) is not private and must stay on it. What
    wraps this wrapper only sees noised uploads: compressors and filters outside cost no privacy as long as they read
    nothing else of the client.

    Args:
      local_update: any local update.
      max_norm: `C`, Euclidean, above 0 and finite; may be traced.
      noise_multiplier: `z`, at least 0; may be traced.
      mask_is_public: whether a mask of the wrapped update does not depend on the client's data.

    Returns:
      A `LocalUpdate` with the states of the wrapped one and a `ClippedInfo`. Noise comes from the client's key.

    Raises:
      ValueError: if a Python number is out of range (here), or the wrapped update sends a mask that is not said to be
        public (when `update` is traced).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cedarjax.core import LocalUpdate, Upload
      >>> local = LocalUpdate(lambda params: (), lambda shared, state, data, key: (Upload(shared), state, ()))
      >>> noised = local_gaussian(local, max_norm=1.0, noise_multiplier=2.0)
      >>> upload, _, info = noised.update(jnp.full(10_000, 3.0), (), None, jax.random.key(0))
      >>> print(f"{upload.delta.std():.1f} {info.clip.norm:.0f}")
      2.0 300
    """
    check_above_zero("max_norm", max_norm)
    check_noise(noise_multiplier)

    def noise_fn(key: jax.Array, like: PyTree) -> PyTree:
        def of_leaf(z: jax.Array) -> jax.Array:
            return jnp.asarray(noise_multiplier, z.dtype) * jnp.asarray(max_norm, z.dtype) * z

        return jax.tree.map(of_leaf, gaussian_noise(key, like))

    return _noised(local_update, max_norm, 2, noise_fn, mask_is_public)


def local_laplace(
    local_update: LocalUpdate,
    max_norm: jax.Array | float,
    epsilon: jax.Array | float,
    *,
    mask_is_public: bool = False,
) -> LocalUpdate:
    """Wraps a local update so that a client uploads `clip_1(delta, C) + Laplace(2 C / epsilon)`.

    Guarantee: `epsilon` with `delta = 0` for each upload, since two uploads whose absolute values add up to `C` at most
    differ by `2 C` at most; after `k` uploads `k epsilon`. Otherwise as `local_gaussian`.

    Args:
      local_update: any local update.
      max_norm: `C`, greatest sum of absolute values, above 0 and finite; may be traced.
      epsilon: of one upload, above 0 and finite; may be traced.
      mask_is_public: as in `local_gaussian`.

    Returns:
      A `LocalUpdate` with the states of the wrapped one and a `ClippedInfo`, whose `norm` sums absolute values.

    Raises:
      ValueError: as in `local_gaussian`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cedarjax.core import LocalUpdate, Upload
      >>> local = LocalUpdate(lambda params: (), lambda shared, state, data, key: (Upload(shared), state, ()))
      >>> noised = local_laplace(local, max_norm=1.0, epsilon=4.0)
      >>> upload, _, _ = noised.update(jnp.zeros(10_000), (), None, jax.random.key(0))
      >>> print(f"{jnp.abs(upload.delta).mean():.2f}")
      0.50
    """
    check_above_zero("max_norm", max_norm)
    check_above_zero("epsilon", epsilon)

    def noise_fn(key: jax.Array, like: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten(like)
        drawn = [
            2
            * jnp.asarray(max_norm, x.dtype)
            / jnp.asarray(epsilon, x.dtype)
            * jax.random.laplace(jax.random.fold_in(key, i), x.shape, x.dtype)
            for i, x in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, drawn)

    return _noised(local_update, max_norm, 1, noise_fn, mask_is_public)
