"""Federations by name, from embedded, generated, public and one's own data."""

from experiments.datasets.digits import digits as digits
from experiments.datasets.federation import NEW as NEW
from experiments.datasets.federation import TRAIN as TRAIN
from experiments.datasets.federation import VALIDATION as VALIDATION
from experiments.datasets.federation import Federation as Federation
from experiments.datasets.federation import summary as summary
from experiments.datasets.federation import to_dataset as to_dataset
from experiments.datasets.images import mnist as mnist
from experiments.datasets.images import omniglot as omniglot
from experiments.datasets.own import load_npz as load_npz
from experiments.datasets.registry import EMBEDDED as EMBEDDED
from experiments.datasets.registry import LOADERS as LOADERS
from experiments.datasets.registry import load as load
from experiments.datasets.sensors import beijing_air as beijing_air
from experiments.datasets.sensors import wisdm as wisdm
from experiments.datasets.sources import DataError as DataError
from experiments.datasets.sources import DatasetNotFoundError as DatasetNotFoundError
from experiments.datasets.synthetic import synthetic_iot as synthetic_iot
from experiments.datasets.tables import table as table

__all__ = [
    "EMBEDDED",
    "LOADERS",
    "NEW",
    "TRAIN",
    "VALIDATION",
    "DataError",
    "DatasetNotFoundError",
    "Federation",
    "beijing_air",
    "digits",
    "load",
    "load_npz",
    "mnist",
    "omniglot",
    "summary",
    "synthetic_iot",
    "table",
    "to_dataset",
    "wisdm",
]
