"""What all servers are given: clients, how long each takes, and the rows on which their model is tested."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import cedarjax as cj
from cedarjax.core import DurationFn, FederatedDataset, Params
from experiments.datasets import Federation
from experiments.evaluation import share_right
from experiments.setting import Setting, make_setting


class Fleet(NamedTuple):
    """One seed."""

    params: Any
    """Initial parameters."""
    train: FederatedDataset
    """The clients."""
    test: FederatedDataset
    """Clients that never train, whose rows together are the test."""
    mean_seconds: jax.Array
    """`[N]`, how long each client takes for a job on average."""
    key: jax.Array
    """Of the run."""


class Problem(NamedTuple):
    """What all servers are given."""

    setting: Setting
    """Model, loss and clients of all seeds."""
    fleets: Fleet
    """Leaves `[seeds, ...]`."""
    spread: float
    """Standard deviation of the logarithm of one client's seconds from job to job."""
    num_active: int
    """Clients that work at the same time."""
    num_parts: int
    """Times at which the model is tested."""
    jobs_a_part: int
    """Jobs between two tests; as many for every server."""
    batch_size: int
    """Examples per batch."""
    rate: float
    """Of the clients' SGD."""

    @property
    def local(self) -> cj.LocalUpdate:
        """A client's work, the same for every server."""
        return cj.local.sgd(self.setting.loss_fn, optax.sgd(self.rate), batch_size=self.batch_size)

    def durations(self, fleet: Fleet) -> DurationFn:
        """How long a client takes."""
        return cj.core.lognormal_durations(fleet.mean_seconds, self.spread)

    def accuracy(self, fleet: Fleet, params: Params) -> jax.Array:
        """Share of the test rows that a model names right."""
        return share_right(self.setting.model, params, fleet.test)


def make_problem(
    load_fn: Callable[[int], Federation],
    num_seeds: int,
    hidden: tuple[int, ...],
    *,
    heterogeneity: float,
    **rest: Any,
) -> Problem:
    """Loads the clients of every seed and draws how fast they are.

    Args:
      load_fn: `seed -> Federation`, of classification with classes that all clients share.
      num_seeds: seeds.
      hidden: widths of the MLP's blocks, where the model is an MLP.
      heterogeneity: standard deviation of the logarithm of the clients' mean seconds, whose median is 1.
      **rest: the other fields of `Problem`.

    Raises:
      ValueError: if the data are of another kind.
    """
    first = load_fn(0)
    if first.task != "classification" or first.class_names is None:
        raise ValueError(f"dataset must have classes that all clients share, got {first.name}.")
    setting = make_setting(load_fn, range(num_seeds), hidden)
    keys = jax.vmap(jax.random.split, out_axes=1)(setting.keys)
    speed = jax.vmap(lambda key: jax.random.normal(key, (setting.num_train,)))(keys[0])
    fleets = Fleet(setting.params, setting.train, setting.new, jnp.exp(heterogeneity * speed), keys[1])
    return Problem(setting, fleets, **rest)
