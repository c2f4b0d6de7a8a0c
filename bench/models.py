"""The models of the benchmarks: what runs, what it costs, and what its parameters are called elsewhere."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

import cedarjax as cj
from bench.floor import Layer, conv, dense
from cedarjax import nn

SIDE, NUM_CLASSES = 28, 10


class Network(NamedTuple):
    """A model and what is known of it."""

    title: str
    """One line."""
    make: Callable[[nnx.Rngs], nnx.Module]
    """The flax module."""
    input_shape: tuple[int, ...]
    """Of one example."""
    layers: tuple[Layer, ...]
    """What it costs, layer by layer."""
    names: dict[str, str]
    """Names of the parameters as peers know them, and as flax does."""

    @property
    def model(self) -> nn.Model:
        """The module as pure functions."""
        return nn.functional(self.make)

    @property
    def num_params(self) -> int:
        """Numbers in all layers."""
        return sum(layer.num_params for layer in self.layers)

    def flat(self, params: Any) -> dict[str, np.ndarray]:
        """Parameters, or what is shaped like them, in float32 by the names that peers know."""
        leaves = dict(zip(cj.leaf_names(params), jax.tree.leaves(params), strict=True))
        return {theirs: np.asarray(leaves[ours], np.float32) for theirs, ours in self.names.items()}


class ConvNet(nnx.Module):
    """Two square convolutions with bias, each followed by ReLU and 2 x 2 max pooling; then linear maps.

    Args:
      window: side of the convolutions' kernels.
      channels: outputs of the two convolutions.
      hidden: outputs of the linear maps before the last.
      rngs: random streams of flax.
    """

    def __init__(self, window: int, channels: tuple[int, int], hidden: Sequence[int], *, rngs: nnx.Rngs):
        make = functools.partial(
            nnx.Conv, kernel_size=(window, window), conv_general_dilated=nn.conv_general_dilated, rngs=rngs
        )
        self.conv1, self.conv2 = make(1, channels[0]), make(*channels)
        sizes = ((SIDE // 4) ** 2 * channels[1], *hidden, NUM_CLASSES)
        self.num_dense = len(sizes) - 1
        for number, (num_in, num_out) in enumerate(itertools.pairwise(sizes), start=1):
            setattr(self, f"dense{number}", nnx.Linear(num_in, num_out, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs `[B, 10]` for `x [B, 28, 28, 1]`."""
        for layer in (self.conv1, self.conv2):
            x = nn.max_pool(nnx.relu(layer(x)), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for number in range(1, self.num_dense):
            x = nnx.relu(getattr(self, f"dense{number}")(x))
        return getattr(self, f"dense{self.num_dense}")(x)


def _mlp(sizes: tuple[int, ...]) -> Network:
    num_layers = len(sizes) - 1
    modules = [*(f"block{number}" for number in range(1, num_layers)), "head"]
    names = {
        f"{letter}{number}": f"{module}/{leaf}"
        for number, module in enumerate(modules, start=1)
        for letter, leaf in (("w", "kernel"), ("b", "bias"))
    }
    return Network(
        f"MLP {'-'.join(map(str, sizes))}",
        lambda rngs: nn.MLP(sizes[0], sizes[1:-1], sizes[-1], rngs=rngs),
        sizes[:1],
        tuple(dense(*pair) for pair in itertools.pairwise(sizes)),
        names,
    )


def _convnet(window: int, channels: tuple[int, int], hidden: tuple[int, ...], names: dict[str, str]) -> Network:
    sizes = ((SIDE // 4) ** 2 * channels[1], *hidden, NUM_CLASSES)
    layers = (
        conv(SIDE, window, 1, channels[0]),
        conv(SIDE // 2, window, *channels),
        *(dense(*pair) for pair in itertools.pairwise(sizes)),
    )
    return Network(
        f"CNN {', '.join(f'{window}x{window}x{count}, pool' for count in channels)}, dense "
        + ", ".join(map(str, sizes[1:])),
        lambda rngs: ConvNet(window, channels, hidden, rngs=rngs),
        (SIDE, SIDE, 1),
        layers,
        names,
    )


CONV_NAMES = {"k1": "conv1/kernel", "c1": "conv1/bias", "k2": "conv2/kernel", "c2": "conv2/bias"}
NETWORKS = {
    "tiny": _mlp((16, 16, 4)),
    "small": _mlp((64, 64, NUM_CLASSES)),
    "medium": _mlp((128, 128, 128, NUM_CLASSES)),
    "mlp": _mlp((SIDE**2, 128, NUM_CLASSES)),
    "deep": _mlp((SIDE**2, 128, 64, 64, 64, NUM_CLASSES)),
    "cnn": _convnet(3, (16, 32), (), CONV_NAMES | {"w": "dense1/kernel", "b": "dense1/bias"}),
    "femnist": _convnet(
        5,
        (32, 64),
        (512,),
        CONV_NAMES | {"w1": "dense1/kernel", "b1": "dense1/bias", "w2": "dense2/kernel", "b2": "dense2/bias"},
    ),
}
