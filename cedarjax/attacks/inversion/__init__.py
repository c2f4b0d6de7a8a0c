"""Gradient inversion: what an upload gives away, measured by attacking it."""

from cedarjax.attacks.inversion.analytic import LinearInput as LinearInput
from cedarjax.attacks.inversion.analytic import linear_input as linear_input
from cedarjax.attacks.inversion.analytic import linear_inputs as linear_inputs
from cedarjax.attacks.inversion.distances import cosine_distance as cosine_distance
from cedarjax.attacks.inversion.distances import sign_distance as sign_distance
from cedarjax.attacks.inversion.distances import squared_distance as squared_distance
from cedarjax.attacks.inversion.distances import total_variation as total_variation
from cedarjax.attacks.inversion.dlg import dlg as dlg
from cedarjax.attacks.inversion.inverting_gradients import inverting_gradients as inverting_gradients
from cedarjax.attacks.inversion.inverting_gradients import signed_adam as signed_adam
from cedarjax.attacks.inversion.labels import LabelGuess as LabelGuess
from cedarjax.attacks.inversion.labels import label_counts as label_counts
from cedarjax.attacks.inversion.labels import label_of_gradient as label_of_gradient
from cedarjax.attacks.inversion.labels import labels_from_counts as labels_from_counts
from cedarjax.attacks.inversion.matching import DistanceFn as DistanceFn
from cedarjax.attacks.inversion.matching import MatchInfo as MatchInfo
from cedarjax.attacks.inversion.matching import match as match
from cedarjax.attacks.inversion.rows import Inversion as Inversion
from cedarjax.attacks.inversion.simulate import SimulateFn as SimulateFn
from cedarjax.attacks.inversion.simulate import gradient_of as gradient_of
from cedarjax.attacks.inversion.simulate import soft_cross_entropy as soft_cross_entropy
from cedarjax.attacks.inversion.simulate import update_of as update_of

__all__ = [
    "DistanceFn",
    "Inversion",
    "LabelGuess",
    "LinearInput",
    "MatchInfo",
    "SimulateFn",
    "cosine_distance",
    "dlg",
    "gradient_of",
    "inverting_gradients",
    "label_counts",
    "label_of_gradient",
    "labels_from_counts",
    "linear_input",
    "linear_inputs",
    "match",
    "sign_distance",
    "signed_adam",
    "soft_cross_entropy",
    "squared_distance",
    "total_variation",
    "update_of",
]
