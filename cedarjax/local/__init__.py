"""One client's plain training."""

from cedarjax.local.sgd import LocalInfo as LocalInfo
from cedarjax.local.sgd import prox as prox
from cedarjax.local.sgd import sgd as sgd

__all__ = ["LocalInfo", "prox", "sgd"]
