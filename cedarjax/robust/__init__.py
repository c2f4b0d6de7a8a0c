"""Aggregation rules that withstand attackers, and Cedar's representational screening."""

from cedarjax.robust.autogm import autogm as autogm
from cedarjax.robust.bucketing import bucketing as bucketing
from cedarjax.robust.bulyan import bulyan as bulyan
from cedarjax.robust.bulyan import bulyan_selection as bulyan_selection
from cedarjax.robust.caf import caf as caf
from cedarjax.robust.caf import caf_coefficients as caf_coefficients
from cedarjax.robust.cedar import CedarInfo as CedarInfo
from cedarjax.robust.cedar import CedarState as CedarState
from cedarjax.robust.cedar import cedar as cedar
from cedarjax.robust.cedar import lower_minority as lower_minority
from cedarjax.robust.cedar import published_minority as published_minority
from cedarjax.robust.cedar import similarity_weights as similarity_weights
from cedarjax.robust.centered_clipping import CenteredClippingState as CenteredClippingState
from cedarjax.robust.centered_clipping import centered_clipping as centered_clipping
from cedarjax.robust.cge import cge as cge
from cedarjax.robust.clip import arc as arc
from cedarjax.robust.clip import clip as clip
from cedarjax.robust.clip import clip_factors as clip_factors
from cedarjax.robust.clusters import two_means as two_means
from cedarjax.robust.columns import from_columns as from_columns
from cedarjax.robust.dnc import dnc as dnc
from cedarjax.robust.fltrust import fltrust as fltrust
from cedarjax.robust.foolsgold import FoolsGoldState as FoolsGoldState
from cedarjax.robust.foolsgold import foolsgold as foolsgold
from cedarjax.robust.foolsgold import foolsgold_weights as foolsgold_weights
from cedarjax.robust.geometric_median import geometric_median as geometric_median
from cedarjax.robust.geometric_median import weiszfeld as weiszfeld
from cedarjax.robust.gram import from_gram as from_gram
from cedarjax.robust.krum import krum as krum
from cedarjax.robust.krum import krum_scores as krum_scores
from cedarjax.robust.krum import multi_krum as multi_krum
from cedarjax.robust.mda import mda as mda
from cedarjax.robust.meamed import meamed as meamed
from cedarjax.robust.meamed import phocas as phocas
from cedarjax.robust.mean import MeanState as MeanState
from cedarjax.robust.mean import mean as mean
from cedarjax.robust.median import median as median
from cedarjax.robust.monna import monna as monna
from cedarjax.robust.nnm import neighbour_means as neighbour_means
from cedarjax.robust.nnm import nnm as nnm
from cedarjax.robust.norm_clip import norm_clip as norm_clip
from cedarjax.robust.presence import Presence as Presence
from cedarjax.robust.presence import read_presence as read_presence
from cedarjax.robust.rdm import euclidean_rdm as euclidean_rdm
from cedarjax.robust.rdm import rdm as rdm
from cedarjax.robust.rdm import rdm_similarity as rdm_similarity
from cedarjax.robust.rule import Round as Round
from cedarjax.robust.rule import RuleInfo as RuleInfo
from cedarjax.robust.rule import RuleState as RuleState
from cedarjax.robust.rule import from_round as from_round
from cedarjax.robust.selection import distances_of as distances_of
from cedarjax.robust.selection import lowest as lowest
from cedarjax.robust.selection import mean_over as mean_over
from cedarjax.robust.selection import num_present as num_present
from cedarjax.robust.signs import rlr as rlr
from cedarjax.robust.signs import rsa as rsa
from cedarjax.robust.signs import sign_majority as sign_majority
from cedarjax.robust.smea import smea as smea
from cedarjax.robust.trimmed_mean import trimmed_mean as trimmed_mean
from cedarjax.robust.wrap import WrapState as WrapState
from cedarjax.robust.zeno import zeno as zeno

__all__ = [
    "CedarInfo",
    "CedarState",
    "CenteredClippingState",
    "FoolsGoldState",
    "MeanState",
    "Presence",
    "Round",
    "RuleInfo",
    "RuleState",
    "WrapState",
    "arc",
    "autogm",
    "bucketing",
    "bulyan",
    "bulyan_selection",
    "caf",
    "caf_coefficients",
    "cedar",
    "centered_clipping",
    "cge",
    "clip",
    "clip_factors",
    "distances_of",
    "dnc",
    "euclidean_rdm",
    "fltrust",
    "foolsgold",
    "foolsgold_weights",
    "from_columns",
    "from_gram",
    "from_round",
    "geometric_median",
    "krum",
    "krum_scores",
    "lower_minority",
    "lowest",
    "mda",
    "meamed",
    "mean",
    "mean_over",
    "median",
    "monna",
    "multi_krum",
    "neighbour_means",
    "nnm",
    "norm_clip",
    "num_present",
    "phocas",
    "published_minority",
    "rdm",
    "rdm_similarity",
    "read_presence",
    "rlr",
    "rsa",
    "sign_majority",
    "similarity_weights",
    "smea",
    "trimmed_mean",
    "two_means",
    "weiszfeld",
    "zeno",
]
