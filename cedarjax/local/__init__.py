"""One client's plain training."""

from cedarjax.core import LocalInfo as LocalInfo
from cedarjax.local.feddyn import FedDynState as FedDynState
from cedarjax.local.feddyn import feddyn as feddyn
from cedarjax.local.fednova import FedNovaShared as FedNovaShared
from cedarjax.local.fednova import fednova as fednova
from cedarjax.local.fednova import total_rate as total_rate
from cedarjax.local.scaffold import ScaffoldShared as ScaffoldShared
from cedarjax.local.scaffold import ScaffoldState as ScaffoldState
from cedarjax.local.scaffold import next_control as next_control
from cedarjax.local.scaffold import scaffold as scaffold
from cedarjax.local.sgd import prox as prox
from cedarjax.local.sgd import sgd as sgd

__all__ = [
    "FedDynState",
    "FedNovaShared",
    "LocalInfo",
    "ScaffoldShared",
    "ScaffoldState",
    "feddyn",
    "fednova",
    "next_control",
    "prox",
    "scaffold",
    "sgd",
    "total_rate",
]
