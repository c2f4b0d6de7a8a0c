"""Encoders from files: the parameters of a network that was trained elsewhere, as flax writes them.

A file holds flax's msgpack of a nest of arrays with the names of `cedarjax.nn`'s models; what it is, a multi-layer
perceptron or a convolution, is read off its shapes. `save_params` writes one.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import serialization

from cedarjax import nn
from cedarjax.distill.encoders import Encoder
from experiments import files
from experiments.datasets import DataError


def save_params(path: str | os.PathLike[str], params: Any) -> None:
    """Writes parameters so that `load_encoder` reads them, atomically."""
    files.write_bytes(path, serialization.msgpack_serialize(jax.device_get(params)))


def model_of(params: Mapping[str, Any]) -> nn.Model:
    """The model of `cedarjax.nn` that has these parameters.

    Args:
      params: nest with `block1`, `block2`, ... and `head`.

    Raises:
      ValueError: if there is none.
    """
    blocks = [params[name] for name in sorted((n for n in params if n.startswith("block")), key=_number)]
    if not blocks or "head" not in params:
        raise ValueError(f"params must hold block1, block2, ... and head, got {', '.join(map(str, params))}.")
    kernels = [jnp.shape(block["conv"]["kernel"] if "conv" in block else block["kernel"]) for block in blocks]
    widths, first = [shape[-1] for shape in kernels], kernels[0]
    num_outputs = jnp.shape(params["head"]["kernel"])[-1]
    match len(first):
        case 2:
            return nn.functional(lambda rngs: nn.MLP(first[0], widths, num_outputs, rngs=rngs))
        case 3:
            sizes = [shape[0] for shape in kernels]
            return nn.functional(
                lambda rngs: nn.CNN1D(first[1], num_outputs, channels=widths, kernel_sizes=sizes, rngs=rngs)
            )
        case 4:
            side = first[0]
            return nn.functional(lambda rngs: nn.CNN(first[2], widths, num_outputs, kernel_size=side, rngs=rngs))
    raise ValueError(f"params must have kernels of rank 2, 3 or 4, got {len(first)}.")


def _number(name: str) -> int:
    return int(name.removeprefix("block")) if name.removeprefix("block").isdigit() else 0


def load_encoder(path: str | os.PathLike[str], shape: Sequence[int]) -> tuple[Encoder, int]:
    """The activations before the head of a network whose parameters are in a file.

    Args:
      path: what `save_params`, or flax's msgpack, wrote.
      shape: of one input.

    Returns:
      The encoder and `d`, its number of features.

    Raises:
      DataError: if the file is not there, is no msgpack, or does not fit.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: encoder must be a file of parameters, and there is none.")
    try:
        params = serialization.msgpack_restore(Path(path).read_bytes())
        model = model_of(params)

        def encode(x: jax.Array) -> jax.Array:
            return list(model.features(params, x).values())[-1]

        example = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        features = jax.eval_shape(encode, example)
    except Exception as error:
        told = f"encoder must hold parameters of a cedarjax.nn model for inputs {tuple(shape)}"
        raise DataError(f"{path}: {told}: {error}") from error
    return encode, math.prod(features.shape[1:])
