"""Public property checks: put a kernel of your own through the laws that every kernel here obeys."""

from cedarjax.testing.aggregators import AGGREGATOR_LAWS as AGGREGATOR_LAWS
from cedarjax.testing.aggregators import EQUIVARIANCES as EQUIVARIANCES
from cedarjax.testing.aggregators import AggregatorCase as AggregatorCase
from cedarjax.testing.aggregators import check_aggregator as check_aggregator
from cedarjax.testing.attacks import ATTACK_LAWS as ATTACK_LAWS
from cedarjax.testing.attacks import AttackCase as AttackCase
from cedarjax.testing.attacks import check_attack as check_attack
from cedarjax.testing.local_updates import LOCAL_UPDATE_LAWS as LOCAL_UPDATE_LAWS
from cedarjax.testing.local_updates import LocalUpdateCase as LocalUpdateCase
from cedarjax.testing.local_updates import check_local_update as check_local_update

__all__ = [
    "AGGREGATOR_LAWS",
    "ATTACK_LAWS",
    "AggregatorCase",
    "AttackCase",
    "EQUIVARIANCES",
    "LOCAL_UPDATE_LAWS",
    "LocalUpdateCase",
    "check_aggregator",
    "check_attack",
    "check_local_update",
]
