"""Client weights as the shared matrix and a few factors, exact."""

from cedarjax.core.lowrank.node import LowRank as LowRank
from cedarjax.core.lowrank.node import dense as dense
from cedarjax.core.lowrank.node import is_low_rank as is_low_rank
from cedarjax.core.lowrank.node import keep as keep
from cedarjax.core.lowrank.represent import Representation as Representation
from cedarjax.core.lowrank.represent import nonlinear_part as nonlinear_part
from cedarjax.core.lowrank.represent import pays as pays
from cedarjax.core.lowrank.represent import represented as represented

__all__ = [
    "LowRank",
    "Representation",
    "dense",
    "is_low_rank",
    "keep",
    "nonlinear_part",
    "pays",
    "represented",
]
