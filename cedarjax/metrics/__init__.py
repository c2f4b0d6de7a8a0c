"""Masked and mergeable metrics, their distribution over clients, counted bytes, and how alike images are."""

from cedarjax.metrics.classification import ClassificationScores as ClassificationScores
from cedarjax.metrics.classification import Confusion as Confusion
from cedarjax.metrics.classification import confusion as confusion
from cedarjax.metrics.communication import Communication as Communication
from cedarjax.metrics.communication import communication as communication
from cedarjax.metrics.per_client import Fairness as Fairness
from cedarjax.metrics.per_client import fairness as fairness
from cedarjax.metrics.reconstruction import Reconstruction as Reconstruction
from cedarjax.metrics.reconstruction import label_accuracy as label_accuracy
from cedarjax.metrics.reconstruction import match_rows as match_rows
from cedarjax.metrics.reconstruction import psnr as psnr
from cedarjax.metrics.reconstruction import reconstruction as reconstruction
from cedarjax.metrics.reconstruction import ssim as ssim
from cedarjax.metrics.regression import Moments as Moments
from cedarjax.metrics.regression import RegressionScores as RegressionScores
from cedarjax.metrics.regression import moments as moments

__all__ = (
    "ClassificationScores",
    "Communication",
    "Confusion",
    "Fairness",
    "Moments",
    "Reconstruction",
    "RegressionScores",
    "communication",
    "confusion",
    "fairness",
    "label_accuracy",
    "match_rows",
    "moments",
    "psnr",
    "reconstruction",
    "ssim",
)
