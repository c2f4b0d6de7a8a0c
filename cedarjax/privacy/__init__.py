"""What an upload gives away, bounded: clipping, noise, accounting, secure aggregation."""

from cedarjax.privacy.accounting import Accountant as Accountant
from cedarjax.privacy.accounting import calibrate_noise as calibrate_noise
from cedarjax.privacy.accounting import delta as delta
from cedarjax.privacy.accounting import epsilon as epsilon
from cedarjax.privacy.accounting import local_epsilon as local_epsilon
from cedarjax.privacy.adaptive import AdaptiveState as AdaptiveState
from cedarjax.privacy.adaptive import adaptive_clipping as adaptive_clipping
from cedarjax.privacy.adaptive import next_norm as next_norm
from cedarjax.privacy.adaptive import split_noise as split_noise
from cedarjax.privacy.clip import ClipInfo as ClipInfo
from cedarjax.privacy.clip import ClippedInfo as ClippedInfo
from cedarjax.privacy.clip import clip_by_norm as clip_by_norm
from cedarjax.privacy.clip import clip_upload as clip_upload
from cedarjax.privacy.correlated import CorrelatedState as CorrelatedState
from cedarjax.privacy.correlated import TurnState as TurnState
from cedarjax.privacy.correlated import banded_toeplitz as banded_toeplitz
from cedarjax.privacy.correlated import correlated_gaussian_mechanism as correlated_gaussian_mechanism
from cedarjax.privacy.correlated import correlated_plan as correlated_plan
from cedarjax.privacy.correlated import in_turns as in_turns
from cedarjax.privacy.homomorphic import EncryptedSumInfo as EncryptedSumInfo
from cedarjax.privacy.homomorphic import ckks_context as ckks_context
from cedarjax.privacy.homomorphic import encrypted_weighted_sum as encrypted_weighted_sum
from cedarjax.privacy.local_dp import local_gaussian as local_gaussian
from cedarjax.privacy.local_dp import local_laplace as local_laplace
from cedarjax.privacy.mechanism import MechanismInfo as MechanismInfo
from cedarjax.privacy.mechanism import MechanismState as MechanismState
from cedarjax.privacy.mechanism import gaussian_mechanism as gaussian_mechanism
from cedarjax.privacy.mechanism import gaussian_noise as gaussian_noise
from cedarjax.privacy.plan import AdaptiveNorm as AdaptiveNorm
from cedarjax.privacy.plan import PrivatePlan as PrivatePlan
from cedarjax.privacy.plan import epsilon_of as epsilon_of
from cedarjax.privacy.plan import overflow_probability as overflow_probability
from cedarjax.privacy.plan import poisson_plan as poisson_plan
from cedarjax.privacy.rows import Clipped as Clipped
from cedarjax.privacy.rows import clipped_sum as clipped_sum
from cedarjax.privacy.secure_aggregation import choose_graph as choose_graph
from cedarjax.privacy.secure_aggregation import group_wise as group_wise
from cedarjax.privacy.secure_aggregation import secure_integer_sum as secure_integer_sum
from cedarjax.privacy.secure_aggregation import secure_mean as secure_mean
from cedarjax.privacy.secure_aggregation import secure_sum as secure_sum

__all__ = [
    "Accountant",
    "AdaptiveNorm",
    "AdaptiveState",
    "ClipInfo",
    "Clipped",
    "ClippedInfo",
    "CorrelatedState",
    "EncryptedSumInfo",
    "MechanismInfo",
    "MechanismState",
    "PrivatePlan",
    "TurnState",
    "adaptive_clipping",
    "banded_toeplitz",
    "calibrate_noise",
    "choose_graph",
    "ckks_context",
    "clip_by_norm",
    "clip_upload",
    "clipped_sum",
    "correlated_gaussian_mechanism",
    "correlated_plan",
    "delta",
    "encrypted_weighted_sum",
    "epsilon",
    "epsilon_of",
    "gaussian_mechanism",
    "gaussian_noise",
    "group_wise",
    "in_turns",
    "local_epsilon",
    "local_gaussian",
    "local_laplace",
    "next_norm",
    "overflow_probability",
    "poisson_plan",
    "secure_integer_sum",
    "secure_mean",
    "secure_sum",
    "split_noise",
]
