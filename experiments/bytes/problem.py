"""What all compressors are given: clients, a model, and the rows on which it is tested."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import cedarjax as cj
from experiments.datasets import Federation
from experiments.setting import ModelName, Setting, make_setting


class Problem(NamedTuple):
    """What all contenders are given."""

    setting: Setting
    """Model, loss and clients of all seeds."""
    stimuli: jax.Array
    """`[S, ...]`, the inputs on which Cedar's filter compares representations."""
    cohort: int
    """Clients in a round."""
    rounds: int
    """Rounds of training."""
    points: int
    """Times at which the model is tested."""
    batch_size: int
    """Examples per batch."""

    def local(self, rate: jax.Array | float) -> cj.LocalUpdate:
        """A client's work, the same for every contender: one epoch of SGD."""
        return cj.local.sgd(self.setting.loss_fn, optax.sgd(rate), batch_size=self.batch_size)

    @property
    def params(self) -> Any:
        """Shapes of the model's parameters."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.setting.params)

    @property
    def full_bytes(self) -> int:
        """An upload with nothing left out."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.params))


def make_problem(
    load_fn: Callable[[int], Federation],
    num_seeds: int,
    hidden: tuple[int, ...],
    model: ModelName | None,
    *,
    participation: float,
    **rest: Any,
) -> Problem:
    """Loads the clients of every seed.

    Args:
      load_fn: `seed -> Federation`, of classification with classes that all clients share.
      num_seeds: seeds.
      hidden: widths of the MLP's blocks, where the model is an MLP.
      model: kind of model; None: what fits the inputs.
      participation: share of the training clients in a round.
      **rest: the other fields of `Problem`.

    Raises:
      ValueError: if the data are of another kind.
    """
    first = load_fn(0)
    if first.task != "classification" or first.class_names is None:
        raise ValueError(f"dataset must have classes that all clients share, got {first.name}.")
    setting = make_setting(load_fn, range(num_seeds), hidden, model)
    cohort = max(1, round(participation * setting.num_train))
    return Problem(setting, setting.stimuli[0], cohort, **rest)
