"""Multi-layer perceptron with named blocks."""

import itertools
import math
from collections.abc import Sequence

import jax
from flax import nnx


class MLP(nnx.Module):
    """Blocks `block1` ... `blockK` of a linear map and a ReLU, then the linear map `head`.

    Parameters are `block1/kernel`, `block1/bias`, ..., `head/kernel`, `head/bias`.

    Args:
      in_features: numbers in one example.
      hidden: outputs of each block, at least one block.
      num_outputs: classes, or regression targets.
      rngs: random streams of flax.

    Raises:
      ValueError: if a size is below 1 or there is no block.

    Example:
      >>> import jax.numpy as jnp
      >>> model = MLP(64, (64, 32), 5, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 8, 8))).shape
      (2, 5)
      >>> {name: f.shape for name, f in model.features(jnp.ones((2, 64))).items()}
      {'block1': (2, 64), 'block2': (2, 32)}
    """

    def __init__(self, in_features: int, hidden: Sequence[int], num_outputs: int, *, rngs: nnx.Rngs):
        sizes = (in_features, *hidden, num_outputs)
        if not hidden or min(sizes) < 1:
            raise ValueError(
                f"in_features, hidden and num_outputs must be at least 1, and hidden not empty, got {sizes}."
            )
        self.in_features = in_features
        self.block_names = tuple(f"block{number}" for number in range(1, len(hidden) + 1))
        for name, (fan_in, fan_out) in zip(self.block_names, itertools.pairwise(sizes[:-1]), strict=True):
            setattr(self, name, nnx.Linear(fan_in, fan_out, rngs=rngs))
        self.head = nnx.Linear(sizes[-2], num_outputs, rngs=rngs)

    def features(self, x: jax.Array) -> dict[str, jax.Array]:
        """Activations `[B, F_l]` of every block, in order, for `x [B, ...]`."""
        if math.prod(x.shape[1:]) != self.in_features:
            raise ValueError(f"x must have {self.in_features} numbers an example, got shape {x.shape}.")
        x = x.reshape(x.shape[0], self.in_features)
        activations = {}
        for name in self.block_names:
            x = activations[name] = nnx.relu(getattr(self, name)(x))
        return activations

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs `[B, num_outputs]` for `x [B, ...]`, whose trailing axes are flattened."""
        return self.head(self.features(x)[self.block_names[-1]])
