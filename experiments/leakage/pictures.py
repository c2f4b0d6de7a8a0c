"""Pictures: how alike two are, the space that public ones span, and pictures as text."""

import base64
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cedarjax import metrics

NUM_COMPONENTS = 48
"""Principal components of the public pictures within which an attacker who has them searches."""
MOST_PSNR = 60.0
"""Decibels that count; more is as good as exact."""
NUM_PICTURES = 4
"""Victims whose pictures are kept: the first of every seed, then the second, ..."""


class Scores(NamedTuple):
    """How well a reconstruction did, means over the pictures of an upload; leaves `[V]` of one seed."""

    mse: jax.Array
    """Mean squared error."""
    psnr: jax.Array
    """Decibels, at most `MOST_PSNR`."""
    ssim: jax.Array
    """Structural similarity."""
    label_accuracy: jax.Array
    """Share of the labels that were found."""
    recognised: jax.Array
    """Share of reconstructions to which none of the public pictures is more alike than the true one."""
    picture: jax.Array
    """`[V, H, W]`, what became of the victim's own picture."""


def score(x: jax.Array, y: jax.Array, truth: dict[str, jax.Array], public: jax.Array) -> Scores:
    """Scores of one upload.

    Args:
      x: `[B, H, W, 1]` reconstructions.
      y: `[B]` labels.
      truth: `{"x", "y"}` of the same shapes.
      public: `[P, H, W, 1]` pictures among which the true ones are to be recognised.
    """
    found = metrics.reconstruction(x, truth["x"])
    matched = x[found.order]

    def directions(images: jax.Array) -> jax.Array:
        flat = images.reshape(images.shape[0], -1)
        flat = flat - flat.mean(axis=1, keepdims=True)
        return flat / (jnp.linalg.norm(flat, axis=1, keepdims=True) + 1e-6)

    own = (directions(matched) * directions(truth["x"])).sum(axis=1)
    others = (directions(matched) @ directions(public).T).max(axis=1)
    return Scores(
        mse=found.mse.mean(),
        psnr=jnp.minimum(found.psnr, MOST_PSNR).mean(),
        ssim=found.ssim.mean(),
        label_accuracy=metrics.label_accuracy(y, truth["y"]),
        recognised=(own > others).mean(),
        picture=matched[0, ..., 0],
    )


class Space(NamedTuple):
    """Pictures as combinations of the principal components of the public ones."""

    mean: jax.Array
    """`[H, W, 1]`."""
    components: jax.Array
    """`[NUM_COMPONENTS, H, W, 1]`, each of the length of its standard deviation."""

    def pictures(self, z: jax.Array) -> jax.Array:
        """`[B, H, W, 1]` of coordinates `[B, NUM_COMPONENTS]` in standard deviations."""
        return self.mean[None] + jnp.tensordot(z, self.components, axes=1)


def picture_space(public: jax.Array) -> Space:
    """The space of the public pictures `[P, H, W, 1]`."""
    mean = public.mean(axis=0)
    flat = (public - mean[None]).reshape(public.shape[0], -1)
    _, sizes, directions = jnp.linalg.svd(flat, full_matrices=False)
    scaled = directions * sizes[:, None] / public.shape[0] ** 0.5
    return Space(mean, scaled[:NUM_COMPONENTS].reshape(-1, *mean.shape))


def pack_pictures(pictures: np.ndarray) -> str:
    """The first of the pictures `[seeds, V, H, W]` in [0, 1] as text, one byte a pixel."""
    pictures = pictures.swapaxes(0, 1).reshape(-1, *pictures.shape[2:])[:NUM_PICTURES]
    return base64.b64encode(np.uint8(np.clip(np.nan_to_num(pictures), 0, 1) * 255 + 0.5).tobytes()).decode()


def unpack_pictures(text: str, side: int) -> np.ndarray:
    """`[n, side, side]` in [0, 1]."""
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, side, side) / 255
