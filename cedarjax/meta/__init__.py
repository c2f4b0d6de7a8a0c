"""Learning an initialisation that adapts in a few steps, and adapting it."""

from cedarjax.meta.adapt import adapt as adapt
from cedarjax.meta.anil import anil as anil
from cedarjax.meta.cedar import CedarLocalInfo as CedarLocalInfo
from cedarjax.meta.cedar import cedar as cedar
from cedarjax.meta.clip import clip_by_global_norm as clip_by_global_norm
from cedarjax.meta.imaml import ImamlInfo as ImamlInfo
from cedarjax.meta.imaml import imaml as imaml
from cedarjax.meta.maml import MamlInfo as MamlInfo
from cedarjax.meta.maml import maml as maml
from cedarjax.meta.meta_sgd import MetaSgdInfo as MetaSgdInfo
from cedarjax.meta.meta_sgd import MetaSgdParams as MetaSgdParams
from cedarjax.meta.meta_sgd import elementwise_sgd as elementwise_sgd
from cedarjax.meta.meta_sgd import meta_sgd as meta_sgd
from cedarjax.meta.per_fedavg import PerFedAvgInfo as PerFedAvgInfo
from cedarjax.meta.per_fedavg import per_fedavg as per_fedavg
from cedarjax.meta.reptile import ReptileInfo as ReptileInfo
from cedarjax.meta.reptile import reptile as reptile

__all__ = [
    "CedarLocalInfo",
    "ImamlInfo",
    "MamlInfo",
    "MetaSgdInfo",
    "MetaSgdParams",
    "PerFedAvgInfo",
    "ReptileInfo",
    "adapt",
    "anil",
    "cedar",
    "clip_by_global_norm",
    "elementwise_sgd",
    "imaml",
    "maml",
    "meta_sgd",
    "per_fedavg",
    "reptile",
]
