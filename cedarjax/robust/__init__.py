"""Aggregation rules: the mean, and Cedar's representational screening."""

from cedarjax.robust.cedar import CedarInfo as CedarInfo
from cedarjax.robust.cedar import CedarState as CedarState
from cedarjax.robust.cedar import cedar as cedar
from cedarjax.robust.cedar import lower_minority as lower_minority
from cedarjax.robust.cedar import published_minority as published_minority
from cedarjax.robust.cedar import similarity_weights as similarity_weights
from cedarjax.robust.clusters import two_means as two_means
from cedarjax.robust.mean import MeanState as MeanState
from cedarjax.robust.mean import mean as mean
from cedarjax.robust.rdm import euclidean_rdm as euclidean_rdm
from cedarjax.robust.rdm import rdm as rdm
from cedarjax.robust.rdm import rdm_similarity as rdm_similarity

__all__ = [
    "CedarInfo",
    "CedarState",
    "MeanState",
    "cedar",
    "euclidean_rdm",
    "lower_minority",
    "mean",
    "published_minority",
    "rdm",
    "rdm_similarity",
    "similarity_weights",
    "two_means",
]
