"""The models that are attacked: a smooth LeNet, on which gradient matching works best, and the library's own."""

from typing import Literal

import jax
from flax import nnx

from cedarjax import nn

ModelName = Literal["lenet", "mlp", "cnn"]


class LeNet(nnx.Module):
    """Four convolutions and a linear map on all of their last activations, `tanh` in between.

    After the network of Zhu et al. (`Deep Leakage from Gradients <https://arxiv.org/abs/1906.08935>`_, 2019), without
    normalisation and pooling, which keep information back: the case that is easiest to attack.

    Args:
      side: height and width of the image, a multiple of 4.
      num_outputs: classes.
      num_features: channels of every convolution.
      rngs: random streams of flax.
    """

    def __init__(self, side: int, num_outputs: int, num_features: int = 12, *, rngs: nnx.Rngs):
        self.block_names = ("block1", "block2", "block3", "block4")
        shapes = ((1, 5, 2), (num_features, 3, 2), (num_features, 3, 1), (num_features, 3, 1))
        for name, (features, size, stride) in zip(self.block_names, shapes, strict=True):
            made = nnx.Conv(
                features,
                num_features,
                (size, size),
                strides=stride,
                conv_general_dilated=nn.conv_general_dilated,
                rngs=rngs,
            )
            setattr(self, name, made)
        self.head = nnx.Linear(num_features * (side // 4) ** 2, num_outputs, rngs=rngs)

    def features(self, x: jax.Array) -> dict[str, jax.Array]:
        """Activations `[B, F_l]` of every block, in order."""
        found = {}
        for name in self.block_names:
            x = jax.nn.tanh(getattr(self, name)(x))
            found[name] = x.reshape(x.shape[0], -1)
        return found

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs `[B, num_outputs]` for images `[B, side, side, 1]`."""
        return self.head(self.features(x)[self.block_names[-1]])


def make_model(name: ModelName, side: int, num_outputs: int) -> nn.Model:
    """A model of images `[side, side, 1]` with four judged blocks, or two for `"cnn"`.

    Args:
      name: which.
      side: height and width.
      num_outputs: classes.

    Returns:
      The model.
    """
    match name:
        case "lenet":
            return nn.functional(lambda rngs: LeNet(side, num_outputs, rngs=rngs))
        case "mlp":
            return nn.functional(lambda rngs: nn.MLP(side * side, (64, 64, 64, 64), num_outputs, rngs=rngs))
        case "cnn":
            return nn.functional(lambda rngs: nn.CNN(1, (16, 32), num_outputs, rngs=rngs))
