"""Cedar's layer importance: representational scores, upload masks, payload bytes."""

from cedarjax.layers.filter import FilterInfo as FilterInfo
from cedarjax.layers.filter import FilterState as FilterState
from cedarjax.layers.filter import budget_priority as budget_priority
from cedarjax.layers.filter import upload_filter as upload_filter
from cedarjax.layers.importance import cosine_change as cosine_change
from cedarjax.layers.importance import fisher as fisher
from cedarjax.layers.importance import taylor as taylor
from cedarjax.layers.importance import update_norm as update_norm
from cedarjax.layers.masks import least_changed as least_changed
from cedarjax.layers.masks import within_budget as within_budget
from cedarjax.layers.payload import payload_bytes as payload_bytes
from cedarjax.layers.rcs import rcs as rcs
from cedarjax.layers.rcs import relative_change as relative_change
from cedarjax.layers.rdv import rdv as rdv
from cedarjax.layers.rdv import stimulus_pairs as stimulus_pairs

__all__ = [
    "FilterInfo",
    "FilterState",
    "budget_priority",
    "cosine_change",
    "fisher",
    "least_changed",
    "payload_bytes",
    "rcs",
    "rdv",
    "relative_change",
    "stimulus_pairs",
    "taylor",
    "update_norm",
    "upload_filter",
    "within_budget",
]
