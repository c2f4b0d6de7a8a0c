"""Federated meta-learning as pure JAX kernels over a client axis."""

from cedarjax import attacks as attacks
from cedarjax import compress as compress
from cedarjax import core as core
from cedarjax import data as data
from cedarjax import distill as distill
from cedarjax import layers as layers
from cedarjax import local as local
from cedarjax import meta as meta
from cedarjax import metrics as metrics
from cedarjax import nn as nn
from cedarjax import personal as personal
from cedarjax import privacy as privacy
from cedarjax import robust as robust
from cedarjax import select as select
from cedarjax import server as server
from cedarjax.core import Aggregator as Aggregator
from cedarjax.core import AsyncServer as AsyncServer
from cedarjax.core import ClientData as ClientData
from cedarjax.core import Cohort as Cohort
from cedarjax.core import FederatedAlgorithm as FederatedAlgorithm
from cedarjax.core import FederatedDataset as FederatedDataset
from cedarjax.core import History as History
from cedarjax.core import LocalUpdate as LocalUpdate
from cedarjax.core import LossFn as LossFn
from cedarjax.core import RoundInfo as RoundInfo
from cedarjax.core import RoundStream as RoundStream
from cedarjax.core import RunState as RunState
from cedarjax.core import Selection as Selection
from cedarjax.core import Selector as Selector
from cedarjax.core import ServerState as ServerState
from cedarjax.core import Upload as Upload
from cedarjax.core import cohort_map as cohort_map
from cedarjax.core import dense as dense
from cedarjax.core import federated_round as federated_round
from cedarjax.core import gram as gram
from cedarjax.core import init_run as init_run
from cedarjax.core import layer_names as layer_names
from cedarjax.core import leaf_names as leaf_names
from cedarjax.core import run_rounds as run_rounds
from cedarjax.core import simulate as simulate
from cedarjax.core import simulation as simulation
from cedarjax.core import sq_norms as sq_norms
from cedarjax.core import stream_blocks as stream_blocks
from cedarjax.core import streamed_round as streamed_round
from cedarjax.core import take_info as take_info
from cedarjax.core import take_selection as take_selection
from cedarjax.core import weighted_mean as weighted_mean
from cedarjax.core import weighted_sum as weighted_sum

__version__ = "0.1.0"

__all__ = [
    "Aggregator",
    "AsyncServer",
    "ClientData",
    "Cohort",
    "FederatedAlgorithm",
    "FederatedDataset",
    "History",
    "LocalUpdate",
    "LossFn",
    "RoundInfo",
    "RoundStream",
    "RunState",
    "Selection",
    "Selector",
    "ServerState",
    "Upload",
    "attacks",
    "cohort_map",
    "compress",
    "core",
    "data",
    "dense",
    "distill",
    "federated_round",
    "gram",
    "init_run",
    "layer_names",
    "layers",
    "leaf_names",
    "local",
    "meta",
    "metrics",
    "nn",
    "personal",
    "privacy",
    "robust",
    "run_rounds",
    "select",
    "server",
    "simulate",
    "simulation",
    "sq_norms",
    "stream_blocks",
    "streamed_round",
    "take_info",
    "take_selection",
    "weighted_mean",
    "weighted_sum",
]
