"""Client selection: who takes part in a round."""

from cedarjax.select.availability import AvailableState as AvailableState
from cedarjax.select.availability import available as available
from cedarjax.select.bernoulli import BernoulliState as BernoulliState
from cedarjax.select.bernoulli import bernoulli as bernoulli
from cedarjax.select.bernoulli import bernoulli_size as bernoulli_size
from cedarjax.select.heard import TellFn as TellFn
from cedarjax.select.heard import hear as hear
from cedarjax.select.heard import local_loss as local_loss
from cedarjax.select.heard import unheard as unheard
from cedarjax.select.importance import ImportanceState as ImportanceState
from cedarjax.select.importance import importance as importance
from cedarjax.select.importance import importance_probabilities as importance_probabilities
from cedarjax.select.importance import merged_draws as merged_draws
from cedarjax.select.indicators import data_size as data_size
from cedarjax.select.indicators import label_counts as label_counts
from cedarjax.select.indicators import label_entropy as label_entropy
from cedarjax.select.indicators import softmax_indicator as softmax_indicator
from cedarjax.select.places import fill_places as fill_places
from cedarjax.select.places import highest as highest
from cedarjax.select.power_of_choice import PowerOfChoiceState as PowerOfChoiceState
from cedarjax.select.power_of_choice import power_of_choice as power_of_choice
from cedarjax.select.ranked import ranked as ranked
from cedarjax.select.uniform import uniform as uniform
from cedarjax.select.weighted import gumbel_scores as gumbel_scores
from cedarjax.select.weighted import open_uniform as open_uniform
from cedarjax.select.weighted import weighted as weighted

__all__ = [
    "AvailableState",
    "BernoulliState",
    "ImportanceState",
    "PowerOfChoiceState",
    "TellFn",
    "available",
    "bernoulli",
    "bernoulli_size",
    "data_size",
    "fill_places",
    "gumbel_scores",
    "hear",
    "highest",
    "importance",
    "importance_probabilities",
    "label_counts",
    "label_entropy",
    "local_loss",
    "merged_draws",
    "open_uniform",
    "power_of_choice",
    "ranked",
    "softmax_indicator",
    "unheard",
    "uniform",
    "weighted",
]
