"""Simulated attacks: on the updates (they keep the client axis) and on the data."""

from cedarjax.attacks.gaussian import gaussian as gaussian
from cedarjax.attacks.label_flip import flip_cohort as flip_cohort
from cedarjax.attacks.label_flip import label_flip as label_flip
from cedarjax.attacks.sign_flip import sign_flip as sign_flip

__all__ = [
    "flip_cohort",
    "gaussian",
    "label_flip",
    "sign_flip",
]
