"""Reference models in flax nnx, with named blocks."""

from cedarjax.nn.models.cnn import CNN as CNN
from cedarjax.nn.models.cnn1d import CNN1D as CNN1D
from cedarjax.nn.models.mlp import MLP as MLP

__all__ = ("CNN", "CNN1D", "MLP")
