"""The convolutional block that `CNN` and `CNN1D` share, and the network made of a row of them."""

import itertools
from collections.abc import Sequence

import jax
from flax import nnx

from cedarjax.nn.conv import conv_general_dilated
from cedarjax.nn.norm import GroupNorm
from cedarjax.nn.pool import max_pool


class ConvBlock(nnx.Module):
    """Convolution, GroupNorm, ReLU, and max pooling by 2 along every spatial axis longer than 1.

    The convolution has no bias of its own: the one of GroupNorm takes its place.

    Args:
      in_features: channels in.
      out_features: channels out, a multiple of `num_groups`.
      window: size of the convolution's kernel, one number a spatial dimension.
      stride: stride of the convolution, the same along every spatial dimension.
      num_groups: groups of channels that are normalised together.
      rngs: random streams of flax.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        window: tuple[int, ...],
        *,
        stride: int = 1,
        num_groups: int,
        rngs: nnx.Rngs,
    ):
        self.conv = nnx.Conv(
            in_features,
            out_features,
            window,
            strides=stride,
            use_bias=False,
            conv_general_dilated=conv_general_dilated,
            rngs=rngs,
        )
        self.norm = GroupNorm(out_features, num_groups, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, *spatial, in_features]` to `[B, *spatial // (2 * stride), out_features]`."""
        x = nnx.relu(self.norm(self.conv(x)))
        return max_pool(x, tuple(min(2, length) for length in x.shape[1:-1]))


class ConvNet(nnx.Module):
    """Blocks `block1` ... `blockK`, the mean over space, then the linear map `head`.

    Parameters are `block1/conv/kernel`, `block1/norm/scale`, `block1/norm/bias`, ..., `head/kernel`, `head/bias`. The
    head reads the mean over space, so that one set of parameters takes inputs of any length.

    Args:
      in_features: channels of the input.
      channels: channels of each block, at least one block.
      windows: kernel of each block, one number a spatial dimension.
      num_outputs: classes, or regression targets.
      first_stride: stride of the first block's convolution.
      num_groups: groups of GroupNorm; every number of channels is a multiple of it.
      rngs: random streams of flax.
    """

    def __init__(
        self,
        in_features: int,
        channels: Sequence[int],
        windows: Sequence[tuple[int, ...]],
        num_outputs: int,
        *,
        first_stride: int = 1,
        num_groups: int,
        rngs: nnx.Rngs,
    ):
        sizes = (in_features, *channels, num_outputs)
        if not channels or min(sizes) < 1:
            raise ValueError(
                f"in_features, channels and num_outputs must be at least 1, and channels not empty, got {sizes}."
            )
        if len(windows) != len(channels):
            raise ValueError(f"kernel sizes must be one a block, got {len(windows)} for {len(channels)} blocks.")
        if any(size < 1 for window in windows for size in window):
            raise ValueError(f"kernel sizes must be at least 1, got {tuple(windows)}.")
        if first_stride < 1:
            raise ValueError(f"first_stride must be at least 1, got {first_stride}.")
        if num_groups < 1 or any(number % num_groups for number in channels):
            raise ValueError(f"num_groups must be at least 1 and divide channels {tuple(channels)}, got {num_groups}.")
        self.input_shape = ("B", *("S",) * len(windows[0]), in_features)
        self.block_names = tuple(f"block{number}" for number in range(1, len(channels) + 1))
        for name, (fan_in, fan_out), window in zip(
            self.block_names, itertools.pairwise(sizes[:-1]), windows, strict=True
        ):
            stride = first_stride if name == "block1" else 1
            setattr(self, name, ConvBlock(fan_in, fan_out, window, stride=stride, num_groups=num_groups, rngs=rngs))
        self.head = nnx.Linear(sizes[-2], num_outputs, rngs=rngs)

    def _activations(self, x: jax.Array) -> dict[str, jax.Array]:
        """Activations `[B, *spatial, F]` of every block, in order."""
        if x.ndim != len(self.input_shape) or x.shape[-1] != self.input_shape[-1]:
            raise ValueError(f"x must have the shape {self.input_shape}, channels last, got {x.shape}.")
        activations = {}
        for name in self.block_names:
            x = activations[name] = getattr(self, name)(x)
        return activations

    def features(self, x: jax.Array) -> dict[str, jax.Array]:
        """Flattened activations `[B, F_l]` of every block, in order."""
        return {name: value.reshape(value.shape[0], -1) for name, value in self._activations(x).items()}

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs `[B, num_outputs]`."""
        last = self._activations(x)[self.block_names[-1]]
        return self.head(last.mean(axis=tuple(range(1, last.ndim - 1))))
