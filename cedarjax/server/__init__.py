"""What stands behind the mean of the uploads: optimisers, servers that do not wait, edges, and no server at all."""

from cedarjax.server.afm3d import afm3d as afm3d
from cedarjax.server.aifed import aifed as aifed
from cedarjax.server.buffered import Buffer as Buffer
from cedarjax.server.buffered import BufferedMemory as BufferedMemory
from cedarjax.server.buffered import add_model as add_model
from cedarjax.server.buffered import buffered as buffered
from cedarjax.server.buffered import empty_buffer as empty_buffer
from cedarjax.server.buffered import merged_model as merged_model
from cedarjax.server.fedasync import fedasync as fedasync
from cedarjax.server.fedasync import mix_model as mix_model
from cedarjax.server.fedbuff import FedBuffMemory as FedBuffMemory
from cedarjax.server.fedbuff import fedbuff as fedbuff
from cedarjax.server.feddyn import FedDynServerState as FedDynServerState
from cedarjax.server.feddyn import feddyn as feddyn
from cedarjax.server.fedfd import fedfd as fedfd
from cedarjax.server.fednova import fednova as fednova
from cedarjax.server.gossip import GossipClient as GossipClient
from cedarjax.server.gossip import GossipInfo as GossipInfo
from cedarjax.server.gossip import gossip_round as gossip_round
from cedarjax.server.gossip import metropolis_weights as metropolis_weights
from cedarjax.server.gossip import mix as mix
from cedarjax.server.gossip import ring as ring
from cedarjax.server.gossip import spectral_gap as spectral_gap
from cedarjax.server.hierarchy import HierarchyInfo as HierarchyInfo
from cedarjax.server.hierarchy import HierarchyState as HierarchyState
from cedarjax.server.hierarchy import LinkBytes as LinkBytes
from cedarjax.server.hierarchy import LinkMessages as LinkMessages
from cedarjax.server.hierarchy import hierarchical_round as hierarchical_round
from cedarjax.server.hierarchy import link_bytes as link_bytes
from cedarjax.server.optimisers import FedOptState as FedOptState
from cedarjax.server.optimisers import fedadagrad as fedadagrad
from cedarjax.server.optimisers import fedadam as fedadam
from cedarjax.server.optimisers import fedavgm as fedavgm
from cedarjax.server.optimisers import fedyogi as fedyogi
from cedarjax.server.slmfed import slmfed_async as slmfed_async
from cedarjax.server.slmfed import slmfed_smoothing as slmfed_smoothing
from cedarjax.server.staleness import StalenessFn as StalenessFn
from cedarjax.server.staleness import constant as constant
from cedarjax.server.staleness import exponential as exponential
from cedarjax.server.staleness import hinge as hinge
from cedarjax.server.staleness import polynomial as polynomial

__all__ = [
    "Buffer",
    "BufferedMemory",
    "FedBuffMemory",
    "FedDynServerState",
    "FedOptState",
    "GossipClient",
    "GossipInfo",
    "HierarchyInfo",
    "HierarchyState",
    "LinkBytes",
    "LinkMessages",
    "StalenessFn",
    "add_model",
    "afm3d",
    "aifed",
    "buffered",
    "constant",
    "empty_buffer",
    "exponential",
    "fedadagrad",
    "fedadam",
    "fedasync",
    "fedavgm",
    "fedbuff",
    "feddyn",
    "fedfd",
    "fednova",
    "fedyogi",
    "gossip_round",
    "hierarchical_round",
    "hinge",
    "link_bytes",
    "merged_model",
    "metropolis_weights",
    "mix",
    "mix_model",
    "polynomial",
    "ring",
    "slmfed_async",
    "slmfed_smoothing",
    "spectral_gap",
]
