"""Types, reductions over clients, the client axis, rounds and runs."""

from cedarjax.core.asynchrony import Arrival as Arrival
from cedarjax.core.asynchrony import AsyncServer as AsyncServer
from cedarjax.core.asynchrony import AsyncServerState as AsyncServerState
from cedarjax.core.asynchrony import Receipt as Receipt
from cedarjax.core.asynchrony import async_server as async_server
from cedarjax.core.asynchrony import finite_upload as finite_upload
from cedarjax.core.asynchrony import uploaded_model as uploaded_model
from cedarjax.core.axis import as_rows as as_rows
from cedarjax.core.axis import as_update as as_update
from cedarjax.core.axis import num_clients as num_clients
from cedarjax.core.axis import tree_structure as tree_structure
from cedarjax.core.batches import Stream as Stream
from cedarjax.core.batches import batch_indices as batch_indices
from cedarjax.core.batches import check_positive as check_positive
from cedarjax.core.batches import mean_loss as mean_loss
from cedarjax.core.batches import num_batches as num_batches
from cedarjax.core.batches import shuffled_epochs as shuffled_epochs
from cedarjax.core.batches import take_batch as take_batch
from cedarjax.core.batches import take_rows as take_rows
from cedarjax.core.chunks import ChunkSize as ChunkSize
from cedarjax.core.clock import DurationFn as DurationFn
from cedarjax.core.clock import RoundTimes as RoundTimes
from cedarjax.core.clock import exponential_durations as exponential_durations
from cedarjax.core.clock import fixed_durations as fixed_durations
from cedarjax.core.clock import lognormal_durations as lognormal_durations
from cedarjax.core.clock import shifted_exponential_durations as shifted_exponential_durations
from cedarjax.core.clock import synchronous_time as synchronous_time
from cedarjax.core.clock import time_to_target as time_to_target
from cedarjax.core.cohort import CohortMap as CohortMap
from cedarjax.core.cohort import MapFn as MapFn
from cedarjax.core.cohort import cohort_map as cohort_map
from cedarjax.core.columns import map_columns as map_columns
from cedarjax.core.correlation import pearson as pearson
from cedarjax.core.dataset import FederatedDataset as FederatedDataset
from cedarjax.core.dataset import pad_cohort as pad_cohort
from cedarjax.core.dataset import sample_cohort as sample_cohort
from cedarjax.core.dataset import take_clients as take_clients
from cedarjax.core.dtypes import accumulator as accumulator
from cedarjax.core.epochs import Epochs as Epochs
from cedarjax.core.epochs import LocalInfo as LocalInfo
from cedarjax.core.epochs import NumStepsFn as NumStepsFn
from cedarjax.core.epochs import in_sequence as in_sequence
from cedarjax.core.epochs import local_training as local_training
from cedarjax.core.epochs import pull_towards as pull_towards
from cedarjax.core.epochs import train_epochs as train_epochs
from cedarjax.core.events import AsyncHistory as AsyncHistory
from cedarjax.core.events import Simulation as Simulation
from cedarjax.core.events import SimulationState as SimulationState
from cedarjax.core.events import simulate as simulate
from cedarjax.core.events import staleness_histogram as staleness_histogram
from cedarjax.core.inner import centered_gram as centered_gram
from cedarjax.core.inner import products as products
from cedarjax.core.inner import with_inner as with_inner
from cedarjax.core.lowrank import LowRank as LowRank
from cedarjax.core.lowrank import Representation as Representation
from cedarjax.core.lowrank import dense as dense
from cedarjax.core.lowrank import represented as represented
from cedarjax.core.memory import MemoryEstimate as MemoryEstimate
from cedarjax.core.memory import memory_estimate as memory_estimate
from cedarjax.core.mixed import mixed_value_and_grad as mixed_value_and_grad
from cedarjax.core.mixture import Mixture as Mixture
from cedarjax.core.names import layer_bytes as layer_bytes
from cedarjax.core.names import layer_leaves as layer_leaves
from cedarjax.core.names import layer_mask as layer_mask
from cedarjax.core.names import layer_names as layer_names
from cedarjax.core.names import leaf_names as leaf_names
from cedarjax.core.names import leaf_owners as leaf_owners
from cedarjax.core.parts import Part as Part
from cedarjax.core.parts import freeze as freeze
from cedarjax.core.parts import in_part as in_part
from cedarjax.core.parts import merge as merge
from cedarjax.core.parts import partition as partition
from cedarjax.core.parts import train_only as train_only
from cedarjax.core.rounds import federated_round as federated_round
from cedarjax.core.run import History as History
from cedarjax.core.run import RunState as RunState
from cedarjax.core.run import init_run as init_run
from cedarjax.core.run import run_rounds as run_rounds
from cedarjax.core.selection import FixedSizeSampling as FixedSizeSampling
from cedarjax.core.selection import PoissonSampling as PoissonSampling
from cedarjax.core.selection import Selection as Selection
from cedarjax.core.selection import Selector as Selector
from cedarjax.core.selection import take_selection as take_selection
from cedarjax.core.simulation import simulation as simulation
from cedarjax.core.steps import masked_scan as masked_scan
from cedarjax.core.streaming import RoundStream as RoundStream
from cedarjax.core.streaming import Totals as Totals
from cedarjax.core.streaming import stream_blocks as stream_blocks
from cedarjax.core.streaming import streamed_round as streamed_round
from cedarjax.core.told import take_info as take_info
from cedarjax.core.training import displacement as displacement
from cedarjax.core.training import optimiser_step as optimiser_step
from cedarjax.core.training import train as train
from cedarjax.core.trees import finite_rows as finite_rows
from cedarjax.core.trees import gram as gram
from cedarjax.core.trees import inner_with as inner_with
from cedarjax.core.trees import sq_norms as sq_norms
from cedarjax.core.trees import weighted_mean as weighted_mean
from cedarjax.core.trees import weighted_sum as weighted_sum
from cedarjax.core.types import Aggregator as Aggregator
from cedarjax.core.types import ClientData as ClientData
from cedarjax.core.types import Cohort as Cohort
from cedarjax.core.types import FederatedAlgorithm as FederatedAlgorithm
from cedarjax.core.types import LocalUpdate as LocalUpdate
from cedarjax.core.types import LossFn as LossFn
from cedarjax.core.types import Params as Params
from cedarjax.core.types import PyTree as PyTree
from cedarjax.core.types import RoundInfo as RoundInfo
from cedarjax.core.types import ServerState as ServerState
from cedarjax.core.types import Shared as Shared
from cedarjax.core.types import Upload as Upload

__all__ = [
    "Aggregator",
    "Arrival",
    "AsyncHistory",
    "AsyncServer",
    "AsyncServerState",
    "ChunkSize",
    "ClientData",
    "Cohort",
    "CohortMap",
    "DurationFn",
    "Epochs",
    "FederatedAlgorithm",
    "FederatedDataset",
    "FixedSizeSampling",
    "History",
    "LocalInfo",
    "LocalUpdate",
    "LossFn",
    "LowRank",
    "MapFn",
    "MemoryEstimate",
    "Mixture",
    "NumStepsFn",
    "Params",
    "Part",
    "PoissonSampling",
    "PyTree",
    "Receipt",
    "Representation",
    "RoundInfo",
    "RoundStream",
    "RoundTimes",
    "RunState",
    "Selection",
    "Selector",
    "ServerState",
    "Shared",
    "Simulation",
    "SimulationState",
    "Stream",
    "Totals",
    "Upload",
    "accumulator",
    "as_rows",
    "as_update",
    "async_server",
    "batch_indices",
    "centered_gram",
    "check_positive",
    "cohort_map",
    "dense",
    "displacement",
    "exponential_durations",
    "federated_round",
    "finite_rows",
    "finite_upload",
    "fixed_durations",
    "freeze",
    "gram",
    "in_part",
    "in_sequence",
    "init_run",
    "inner_with",
    "layer_bytes",
    "layer_leaves",
    "layer_mask",
    "layer_names",
    "leaf_names",
    "leaf_owners",
    "local_training",
    "lognormal_durations",
    "map_columns",
    "masked_scan",
    "mean_loss",
    "memory_estimate",
    "merge",
    "mixed_value_and_grad",
    "num_batches",
    "num_clients",
    "optimiser_step",
    "pad_cohort",
    "partition",
    "pearson",
    "products",
    "pull_towards",
    "represented",
    "run_rounds",
    "sample_cohort",
    "shifted_exponential_durations",
    "shuffled_epochs",
    "simulate",
    "simulation",
    "sq_norms",
    "staleness_histogram",
    "stream_blocks",
    "streamed_round",
    "synchronous_time",
    "take_batch",
    "take_clients",
    "take_info",
    "take_rows",
    "take_selection",
    "time_to_target",
    "train",
    "train_epochs",
    "train_only",
    "tree_structure",
    "uploaded_model",
    "weighted_mean",
    "weighted_sum",
    "with_inner",
]
