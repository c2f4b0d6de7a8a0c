"""What a server does with the mean of the uploads: optimisers, and the server's part of an algorithm."""

from cedarjax.server.feddyn import FedDynServerState as FedDynServerState
from cedarjax.server.feddyn import feddyn as feddyn
from cedarjax.server.fednova import fednova as fednova
from cedarjax.server.optimisers import FedOptState as FedOptState
from cedarjax.server.optimisers import fedadagrad as fedadagrad
from cedarjax.server.optimisers import fedadam as fedadam
from cedarjax.server.optimisers import fedavgm as fedavgm
from cedarjax.server.optimisers import fedyogi as fedyogi

__all__ = [
    "FedDynServerState",
    "FedOptState",
    "fedadagrad",
    "fedadam",
    "fedavgm",
    "feddyn",
    "fednova",
    "fedyogi",
]
