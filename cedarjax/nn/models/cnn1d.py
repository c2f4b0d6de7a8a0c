"""Small 1-D convolutional network for sensor windows, with GroupNorm."""

from collections.abc import Sequence

from flax import nnx

from cedarjax.nn.models.blocks import ConvNet


class CNN1D(ConvNet):
    """Blocks of a convolution, GroupNorm, ReLU and max pooling by 2; mean over time; `head`.

    Input `[B, T, in_features]`, output `[B, num_outputs]`; parameters as in `ConvNet`. With 3 channels in, 6 classes
    and the default sizes it has 57,766 parameters; the four blocks hold 0.9, 18.1, 36.0 and 45.0 % of the blocks'
    57,280, so that a byte budget of half of them can hold any one.

    Args:
      in_features: sensor channels.
      num_outputs: classes, or regression targets.
      channels: channels of each block.
      kernel_sizes: length of each block's kernel.
      first_stride: stride of the first convolution; 2 halves the work of all blocks.
      num_groups: groups of GroupNorm; every number of channels is a multiple of it.
      rngs: random streams of flax.

    Raises:
      ValueError: if a size is below 1, there is no block, the two sequences differ in length, or the groups do not
        divide the channels.

    Example:
      >>> import jax.numpy as jnp
      >>> model = CNN1D(3, 6, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 100, 3))).shape
      (2, 6)
      >>> {name: f.shape for name, f in model.features(jnp.ones((2, 100, 3))).items()}
      {'block1': (2, 800), 'block2': (2, 768), 'block3': (2, 384), 'block4': (2, 240)}
    """

    def __init__(
        self,
        in_features: int,
        num_outputs: int,
        *,
        channels: Sequence[int] = (32, 64, 64, 80),
        kernel_sizes: Sequence[int] = (5, 5, 5, 5),
        first_stride: int = 2,
        num_groups: int = 8,
        rngs: nnx.Rngs,
    ):
        windows = tuple((size,) for size in kernel_sizes)
        options = {"first_stride": first_stride, "num_groups": num_groups}
        super().__init__(in_features, channels, windows, num_outputs, **options, rngs=rngs)
