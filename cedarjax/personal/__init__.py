"""Personalised federated learning: clients that end up with models of their own."""

from cedarjax.personal.apfl import ApflInfo as ApflInfo
from cedarjax.personal.apfl import ApflState as ApflState
from cedarjax.personal.apfl import apfl as apfl
from cedarjax.personal.ditto import DittoInfo as DittoInfo
from cedarjax.personal.ditto import DittoState as DittoState
from cedarjax.personal.ditto import ditto as ditto
from cedarjax.personal.fedala import FedALAInfo as FedALAInfo
from cedarjax.personal.fedala import FedALAState as FedALAState
from cedarjax.personal.fedala import fedala as fedala
from cedarjax.personal.fedproto import FedProtoState as FedProtoState
from cedarjax.personal.fedproto import Prototype as Prototype
from cedarjax.personal.fedproto import fedproto as fedproto
from cedarjax.personal.fedproto import nearest_prototype as nearest_prototype
from cedarjax.personal.moon import MoonState as MoonState
from cedarjax.personal.moon import cosine as cosine
from cedarjax.personal.moon import model_contrast as model_contrast
from cedarjax.personal.moon import moon as moon
from cedarjax.personal.pfedme import PFedMeState as PFedMeState
from cedarjax.personal.pfedme import pfedme as pfedme
from cedarjax.personal.split import SplitState as SplitState
from cedarjax.personal.split import fedbabu as fedbabu
from cedarjax.personal.split import fedbn as fedbn
from cedarjax.personal.split import fedper as fedper
from cedarjax.personal.split import fedrep as fedrep
from cedarjax.personal.split import lg_fedavg as lg_fedavg
from cedarjax.personal.split import split as split

__all__ = [
    "ApflInfo",
    "ApflState",
    "DittoInfo",
    "DittoState",
    "FedALAInfo",
    "FedALAState",
    "FedProtoState",
    "MoonState",
    "PFedMeState",
    "Prototype",
    "SplitState",
    "apfl",
    "cosine",
    "ditto",
    "fedala",
    "fedbabu",
    "fedbn",
    "fedper",
    "fedproto",
    "fedrep",
    "lg_fedavg",
    "model_contrast",
    "moon",
    "nearest_prototype",
    "pfedme",
    "split",
]
