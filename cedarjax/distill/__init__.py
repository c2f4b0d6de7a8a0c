"""Knowledge distillation between clients: models of any architecture, and no parameter exchanged."""

from cedarjax.distill.cache import KnowledgeCache as KnowledgeCache
from cedarjax.distill.cache import fetch as fetch
from cedarjax.distill.cache import init_cache as init_cache
from cedarjax.distill.cache import mean_logits as mean_logits
from cedarjax.distill.cache import with_index as with_index
from cedarjax.distill.cache import write as write
from cedarjax.distill.candidates import relations_from_candidates as relations_from_candidates
from cedarjax.distill.clients import ClientModel as ClientModel
from cedarjax.distill.clients import Group as Group
from cedarjax.distill.clients import init_client as init_client
from cedarjax.distill.clients import init_clients as init_clients
from cedarjax.distill.communication import KnowledgeBytes as KnowledgeBytes
from cedarjax.distill.communication import dsfl_bytes as dsfl_bytes
from cedarjax.distill.communication import fd_bytes as fd_bytes
from cedarjax.distill.communication import fedcache2_bytes as fedcache2_bytes
from cedarjax.distill.communication import fedcache_bytes as fedcache_bytes
from cedarjax.distill.dsfl import DSFLInfo as DSFLInfo
from cedarjax.distill.dsfl import DSFLKnowledge as DSFLKnowledge
from cedarjax.distill.dsfl import dsfl as dsfl
from cedarjax.distill.dsfl import sharpen as sharpen
from cedarjax.distill.encoders import embed as embed
from cedarjax.distill.encoders import random_features as random_features
from cedarjax.distill.encoders import self_trained_encoder as self_trained_encoder
from cedarjax.distill.fd import FDClient as FDClient
from cedarjax.distill.fd import FDInfo as FDInfo
from cedarjax.distill.fd import FDKnowledge as FDKnowledge
from cedarjax.distill.fd import fd as fd
from cedarjax.distill.fd import leave_one_out as leave_one_out
from cedarjax.distill.fedcache import FedCacheInfo as FedCacheInfo
from cedarjax.distill.fedcache import fedcache as fedcache
from cedarjax.distill.fedcache2 import FedCache2Info as FedCache2Info
from cedarjax.distill.fedcache2 import PrototypeCache as PrototypeCache
from cedarjax.distill.fedcache2 import fedcache2 as fedcache2
from cedarjax.distill.losses import distillation_loss as distillation_loss
from cedarjax.distill.losses import knowledge_loss as knowledge_loss
from cedarjax.distill.poison import peaked_logits as peaked_logits
from cedarjax.distill.poison import permuted_logits as permuted_logits
from cedarjax.distill.poison import poison_logits as poison_logits
from cedarjax.distill.prototypes import device_centric as device_centric
from cedarjax.distill.prototypes import distil_prototypes as distil_prototypes
from cedarjax.distill.prototypes import init_prototypes as init_prototypes
from cedarjax.distill.prototypes import krr_loss as krr_loss
from cedarjax.distill.prototypes import krr_predict as krr_predict
from cedarjax.distill.prototypes import sample_prototypes as sample_prototypes
from cedarjax.distill.relations import Relations as Relations
from cedarjax.distill.relations import approximate_relations as approximate_relations
from cedarjax.distill.relations import build_relations as build_relations
from cedarjax.distill.relations import recall as recall
from cedarjax.distill.robust_fetch import median_logits as median_logits
from cedarjax.distill.robust_fetch import trimmed_logits as trimmed_logits

__all__ = [
    "ClientModel",
    "DSFLInfo",
    "DSFLKnowledge",
    "FDClient",
    "FDInfo",
    "FDKnowledge",
    "FedCache2Info",
    "FedCacheInfo",
    "Group",
    "KnowledgeBytes",
    "KnowledgeCache",
    "PrototypeCache",
    "Relations",
    "approximate_relations",
    "build_relations",
    "device_centric",
    "distil_prototypes",
    "distillation_loss",
    "dsfl",
    "dsfl_bytes",
    "embed",
    "fd",
    "fd_bytes",
    "fedcache",
    "fedcache2",
    "fedcache2_bytes",
    "fedcache_bytes",
    "fetch",
    "init_cache",
    "init_client",
    "init_clients",
    "init_prototypes",
    "knowledge_loss",
    "krr_loss",
    "krr_predict",
    "leave_one_out",
    "mean_logits",
    "median_logits",
    "peaked_logits",
    "permuted_logits",
    "poison_logits",
    "random_features",
    "recall",
    "relations_from_candidates",
    "sample_prototypes",
    "self_trained_encoder",
    "sharpen",
    "trimmed_logits",
    "with_index",
    "write",
]
