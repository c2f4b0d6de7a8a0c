"""Small 2-D convolutional network for images, with GroupNorm."""

from collections.abc import Sequence

from flax import nnx

from cedarjax.nn.models.blocks import ConvNet


class CNN(ConvNet):
    """Blocks of a square convolution, GroupNorm, ReLU and 2 x 2 max pooling; mean over space; `head`.

    Input `[B, H, W, in_features]`, output `[B, num_outputs]`; parameters as in `ConvNet`.

    Args:
      in_features: channels of the image.
      channels: channels of each block.
      num_outputs: classes, or regression targets.
      kernel_size: side of every convolution's kernel.
      num_groups: groups of GroupNorm; every number of channels is a multiple of it.
      rngs: random streams of flax.

    Raises:
      ValueError: if a size is below 1, there is no block, or the groups do not divide the channels.

    Example:
      >>> import jax.numpy as jnp
      >>> model = CNN(1, (16, 32), 10, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 28, 28, 1))).shape
      (2, 10)
      >>> {name: f.shape for name, f in model.features(jnp.ones((2, 28, 28, 1))).items()}
      {'block1': (2, 3136), 'block2': (2, 1568)}
    """

    def __init__(
        self,
        in_features: int,
        channels: Sequence[int],
        num_outputs: int,
        *,
        kernel_size: int = 3,
        num_groups: int = 8,
        rngs: nnx.Rngs,
    ):
        windows = ((kernel_size, kernel_size),) * len(channels)
        super().__init__(in_features, channels, windows, num_outputs, num_groups=num_groups, rngs=rngs)
