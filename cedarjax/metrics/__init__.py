"""Masked and mergeable metrics, their distribution over clients, and counted bytes."""

from cedarjax.metrics.classification import ClassificationScores as ClassificationScores
from cedarjax.metrics.classification import Confusion as Confusion
from cedarjax.metrics.classification import confusion as confusion
from cedarjax.metrics.communication import Communication as Communication
from cedarjax.metrics.communication import communication as communication
from cedarjax.metrics.per_client import Fairness as Fairness
from cedarjax.metrics.per_client import fairness as fairness
from cedarjax.metrics.regression import Moments as Moments
from cedarjax.metrics.regression import RegressionScores as RegressionScores
from cedarjax.metrics.regression import moments as moments

__all__ = (
    "ClassificationScores",
    "Communication",
    "Confusion",
    "Fairness",
    "Moments",
    "RegressionScores",
    "communication",
    "confusion",
    "fairness",
    "moments",
)
