"""Models as pure functions, and operations that stay fast when vmapped over weights."""

from cedarjax.nn.conv import conv_general_dilated as conv_general_dilated
from cedarjax.nn.functional import Model as Model
from cedarjax.nn.functional import functional as functional
from cedarjax.nn.losses import cross_entropy as cross_entropy
from cedarjax.nn.losses import squared_error as squared_error
from cedarjax.nn.models import CNN as CNN
from cedarjax.nn.models import CNN1D as CNN1D
from cedarjax.nn.models import MLP as MLP
from cedarjax.nn.norm import GroupNorm as GroupNorm
from cedarjax.nn.norm import group_norm as group_norm
from cedarjax.nn.pool import max_pool as max_pool

__all__ = (
    "CNN",
    "CNN1D",
    "GroupNorm",
    "MLP",
    "Model",
    "conv_general_dilated",
    "cross_entropy",
    "functional",
    "group_norm",
    "max_pool",
    "squared_error",
)
