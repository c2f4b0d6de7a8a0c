"""Learning an initialisation that adapts in a few steps, and adapting it."""

from cedarjax.meta.adapt import adapt as adapt
from cedarjax.meta.cedar import CedarLocalInfo as CedarLocalInfo
from cedarjax.meta.cedar import cedar as cedar
from cedarjax.meta.maml import MamlInfo as MamlInfo
from cedarjax.meta.maml import maml as maml
from cedarjax.meta.reptile import ReptileInfo as ReptileInfo
from cedarjax.meta.reptile import reptile as reptile

__all__ = ["CedarLocalInfo", "MamlInfo", "ReptileInfo", "adapt", "cedar", "maml", "reptile"]
