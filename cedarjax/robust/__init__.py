"""Aggregation rules: the mean, and Cedar's representational screening."""

from cedarjax.robust.cedar import CedarInfo as CedarInfo
from cedarjax.robust.cedar import CedarState as CedarState
from cedarjax.robust.cedar import cedar as cedar
from cedarjax.robust.cedar import lower_minority as lower_minority
from cedarjax.robust.cedar import published_minority as published_minority
from cedarjax.robust.cedar import similarity_weights as similarity_weights
from cedarjax.robust.clusters import two_means as two_means
from cedarjax.robust.krum import krum as krum
from cedarjax.robust.krum import krum_scores as krum_scores
from cedarjax.robust.krum import multi_krum as multi_krum
from cedarjax.robust.mean import MeanState as MeanState
from cedarjax.robust.mean import mean as mean
from cedarjax.robust.rdm import euclidean_rdm as euclidean_rdm
from cedarjax.robust.rdm import rdm as rdm
from cedarjax.robust.rdm import rdm_similarity as rdm_similarity
from cedarjax.robust.rule import RuleInfo as RuleInfo
from cedarjax.robust.rule import RuleState as RuleState
from cedarjax.robust.rule import from_columns as from_columns
from cedarjax.robust.rule import from_gram as from_gram
from cedarjax.robust.selection import distances_of as distances_of
from cedarjax.robust.selection import lowest as lowest
from cedarjax.robust.selection import mean_over as mean_over
from cedarjax.robust.selection import num_present as num_present

__all__ = [
    "CedarInfo",
    "CedarState",
    "MeanState",
    "RuleInfo",
    "RuleState",
    "cedar",
    "distances_of",
    "euclidean_rdm",
    "from_columns",
    "from_gram",
    "krum",
    "krum_scores",
    "lower_minority",
    "lowest",
    "mean",
    "mean_over",
    "multi_krum",
    "num_present",
    "published_minority",
    "rdm",
    "rdm_similarity",
    "similarity_weights",
    "two_means",
]
