"""Simulated attacks: on the updates (they keep the client axis), on the data, and on what an upload tells of them."""

from cedarjax.attacks import inversion as inversion
from cedarjax.attacks.alie import alie as alie
from cedarjax.attacks.alie import alie_strength as alie_strength
from cedarjax.attacks.backdoor import backdoor_cohort as backdoor_cohort
from cedarjax.attacks.backdoor import stamp as stamp
from cedarjax.attacks.crash import nonfinite as nonfinite
from cedarjax.attacks.crash import zero as zero
from cedarjax.attacks.fang import fang as fang
from cedarjax.attacks.gaussian import gaussian as gaussian
from cedarjax.attacks.ipm import ipm as ipm
from cedarjax.attacks.label_flip import flip_cohort as flip_cohort
from cedarjax.attacks.label_flip import label_flip as label_flip
from cedarjax.attacks.mimic import MimicState as MimicState
from cedarjax.attacks.mimic import mimic as mimic
from cedarjax.attacks.min_max import min_max as min_max
from cedarjax.attacks.min_max import min_sum as min_sum
from cedarjax.attacks.model_replacement import model_replacement as model_replacement
from cedarjax.attacks.optimised import optimised_alie as optimised_alie
from cedarjax.attacks.optimised import optimised_ipm as optimised_ipm
from cedarjax.attacks.search import SearchInfo as SearchInfo
from cedarjax.attacks.search import SearchState as SearchState
from cedarjax.attacks.sign_flip import sign_flip as sign_flip
from cedarjax.attacks.targeted_flip import targeted_flip as targeted_flip
from cedarjax.attacks.targeted_flip import targeted_flip_cohort as targeted_flip_cohort

__all__ = [
    "MimicState",
    "SearchInfo",
    "SearchState",
    "alie",
    "alie_strength",
    "backdoor_cohort",
    "fang",
    "flip_cohort",
    "gaussian",
    "inversion",
    "ipm",
    "label_flip",
    "mimic",
    "min_max",
    "min_sum",
    "model_replacement",
    "nonfinite",
    "optimised_alie",
    "optimised_ipm",
    "sign_flip",
    "stamp",
    "targeted_flip",
    "targeted_flip_cohort",
    "zero",
]
