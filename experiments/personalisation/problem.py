"""The federations of all seeds, with a part of every training client's rows held back for a test of its own."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cedarjax.core import FederatedDataset
from cedarjax.data import federated_dataset
from experiments.datasets import TRAIN, Federation
from experiments.setting import Preset, Setting, make_setting, stack_datasets

TEST_SHARE = 0.25
"""Share of a training client's rows that is held back."""


class Problem(NamedTuple):
    """What all algorithms are given; arrays have the seeds on axis 0."""

    setting: Setting
    """Model, loss, and the clients that train, validate and come new; training clients without their test rows."""
    own: FederatedDataset
    """The training clients: what they trained on is their support set, their test rows are the query set."""
    embed_fn: Callable[[Any, Any], jax.Array]
    """`(params, batch) -> [B, d]`, the activations before the head."""
    num_features: int
    """`d`."""
    common_classes: bool
    """Whether a class means the same to all clients."""
    cohort: int
    """Clients in a round."""
    rounds: int
    """Rounds of training."""
    batch_size: int
    """Examples per batch."""
    inner_rate: float
    """Rate of the inner steps of meta-gradients."""

    @property
    def participation(self) -> float:
        """Share of the training clients that take part in a round."""
        return self.cohort / self.setting.num_train

    def suits(self, needs_classes: bool) -> bool:
        """Whether an algorithm is defined for the data."""
        return not needs_classes or (self.setting.task == "classification" and self.common_classes)

    @property
    def local_steps(self) -> int:
        """Steps that a client of average size does in a round."""
        return max(1, math.ceil(self.setting.mean_examples / self.batch_size))


def hold_back(federation: Federation, seed: int) -> tuple[Federation, FederatedDataset]:
    """Takes rows of the training clients' query sets away for a test.

    Args:
      federation: all clients.
      seed: draws the rows.

    Returns:
      The federation without them, and the training clients with all other rows as their support set and the rows that
      were taken as their query set.
    """
    rng = np.random.default_rng([seed, 20])
    is_test = np.zeros(len(federation.y), bool)
    for client in federation.train_clients:
        start, end = federation.offsets[client : client + 2]
        query = np.arange(start + federation.num_support[client], end)
        count = min(len(query) - 1, max(1, round(TEST_SHARE * (end - start))))
        is_test[rng.choice(query, count, replace=False)] = True
    kept = federation._replace(
        x=federation.x[~is_test], y=federation.y[~is_test], client_id=federation.client_id[~is_test]
    )
    training = federation.role[federation.client_id] == TRAIN
    rows = np.flatnonzero(training)
    rows = rows[np.lexsort((is_test[rows], federation.client_id[rows]))]
    owner = federation.client_id[rows]
    counts = np.bincount(owner[~is_test[rows]], minlength=federation.num_clients)[federation.train_clients]
    own = federated_dataset({"x": federation.x[rows], "y": federation.y[rows]}, owner, num_support=counts)
    return kept, own


def make_problem(
    load_fn: Callable[[int], Federation], seeds: Sequence[int], preset: Preset, rounds: int | None = None
) -> Problem:
    """Loads the federation of every seed.

    Args:
      load_fn: `seed -> Federation`.
      seeds: the seeds.
      preset: hyper-parameters of the data set.
      rounds: overrides the preset's.

    Returns:
      The `Problem`.
    """
    federations = {seed: load_fn(seed) for seed in seeds}
    split = {seed: hold_back(federation, seed) for seed, federation in federations.items()}
    setting = make_setting(lambda seed: split[seed][0], seeds, preset.hidden, preset.model)
    one = jax.tree.map(lambda x: x[0], setting.params)
    example = setting.train.examples["x"][0, :1]

    def embed_fn(params: Any, batch: Any) -> jax.Array:
        return list(setting.model.features(params, batch["x"]).values())[-1]

    return Problem(
        setting=setting,
        own=stack_datasets([own for _, own in split.values()]),
        embed_fn=embed_fn,
        num_features=jax.eval_shape(embed_fn, one, {"x": example}).shape[1],
        common_classes=federations[seeds[0]].class_names is not None,
        cohort=max(1, round(preset.participation * setting.num_train)),
        rounds=preset.rounds if rounds is None else rounds,
        batch_size=preset.batch_size,
        inner_rate=preset.inner_rate,
    )


def largest_support(dataset: FederatedDataset) -> int:
    """The most support rows that a client has, over all seeds; static."""
    return int(jnp.max(dataset.num_support))


def repeated(tree: Any, times: int) -> Any:
    """A tree over seeds, repeated for every rate: rates outside, seeds inside."""
    return jax.tree.map(lambda x: jnp.concatenate([x] * times), tree)
