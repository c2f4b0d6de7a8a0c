"""The algorithms. Per-FedAvg leaves second derivatives out: with few rows they are noise before any is added."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from cedarjax import layers, local, meta
from cedarjax.core import LocalUpdate
from experiments.private.problem import Preset
from experiments.setting import Setting

INNER_RATE = 0.1


class Contender(NamedTuple):
    """One algorithm."""

    label: str
    """Name in tables and figures."""
    make: Callable[[Setting, Preset, jax.Array], LocalUpdate]
    """`make(setting, preset, stimuli)`, the stimuli of one seed."""


def _fedavg(s: Setting, p: Preset, stimuli: jax.Array) -> LocalUpdate:
    return local.sgd(s.loss_fn, optax.sgd(p.rate), batch_size=p.batch_size)


def _per_fedavg(s: Setting, p: Preset, stimuli: jax.Array) -> LocalUpdate:
    steps = max(1, math.ceil(s.mean_examples / p.batch_size))
    return meta.per_fedavg(
        s.loss_fn, INNER_RATE, optax.sgd(p.rate), num_steps=steps, batch_size=p.batch_size, mode="fo"
    )


def _cedar(s: Setting, p: Preset, stimuli: jax.Array) -> LocalUpdate:
    return meta.cedar(s.loss_fn, optax.sgd(p.rate), optax.sgd(p.rate), batch_size=p.batch_size)


def _filtered(s: Setting, p: Preset, stimuli: jax.Array) -> LocalUpdate:
    features: Any = functools.partial(_features, s)
    return layers.upload_filter(_cedar(s, p, stimuli), features, stimuli, num_skipped=1)


def _features(s: Setting, params: Any, stimuli: jax.Array) -> dict[str, jax.Array]:
    return {name: x.reshape(x.shape[0], -1) for name, x in s.model.features(params, stimuli).items()}


CONTENDERS: dict[str, Contender] = {
    "fedavg": Contender("FedAvg", _fedavg),
    "per_fedavg": Contender("Per-FedAvg (FO)", _per_fedavg),
    "cedar": Contender("Cedar, full upload", _cedar),
    "cedar_filtered": Contender("Cedar", _filtered),
}
