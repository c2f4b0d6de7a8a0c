"""Sums of which nobody sees the summands: pairwise masks, dropout recovery, rules above groups (a simulation)."""

from cedarjax.privacy.secure_aggregation.aggregator import SecureInfo as SecureInfo
from cedarjax.privacy.secure_aggregation.aggregator import SecureState as SecureState
from cedarjax.privacy.secure_aggregation.aggregator import secure_mean as secure_mean
from cedarjax.privacy.secure_aggregation.aggregator import secure_sum as secure_sum
from cedarjax.privacy.secure_aggregation.fixed_point import decode as decode
from cedarjax.privacy.secure_aggregation.fixed_point import encode as encode
from cedarjax.privacy.secure_aggregation.fixed_point import error_bound as error_bound
from cedarjax.privacy.secure_aggregation.graph import GraphSize as GraphSize
from cedarjax.privacy.secure_aggregation.graph import Ring as Ring
from cedarjax.privacy.secure_aggregation.graph import choose_graph as choose_graph
from cedarjax.privacy.secure_aggregation.groups import GroupInfo as GroupInfo
from cedarjax.privacy.secure_aggregation.groups import GroupState as GroupState
from cedarjax.privacy.secure_aggregation.groups import group_wise as group_wise
from cedarjax.privacy.secure_aggregation.groups import random_groups as random_groups
from cedarjax.privacy.secure_aggregation.protocol import Recovery as Recovery
from cedarjax.privacy.secure_aggregation.protocol import Setup as Setup
from cedarjax.privacy.secure_aggregation.protocol import mask_uploads as mask_uploads
from cedarjax.privacy.secure_aggregation.protocol import recover as recover
from cedarjax.privacy.secure_aggregation.protocol import setup_round as setup_round
from cedarjax.privacy.secure_aggregation.protocol import unmask as unmask
from cedarjax.privacy.secure_aggregation.shamir import reconstruct_secret as reconstruct_secret
from cedarjax.privacy.secure_aggregation.shamir import split_secret as split_secret
from cedarjax.privacy.secure_aggregation.sums import secure_integer_sum as secure_integer_sum

__all__ = [
    "GraphSize",
    "GroupInfo",
    "GroupState",
    "Recovery",
    "Ring",
    "SecureInfo",
    "SecureState",
    "Setup",
    "choose_graph",
    "decode",
    "encode",
    "error_bound",
    "group_wise",
    "mask_uploads",
    "random_groups",
    "reconstruct_secret",
    "recover",
    "secure_integer_sum",
    "secure_mean",
    "secure_sum",
    "setup_round",
    "split_secret",
    "unmask",
]
