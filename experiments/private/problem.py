"""The federations: many small tasks of the embedded digits, or a data set as it is, with as few clients as it has."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

from cedarjax.data import class_tasks, split_pools
from experiments import datasets
from experiments.datasets import NEW, TRAIN, VALIDATION, Federation
from experiments.datasets.federation import from_tasks
from experiments.setting import Setting, make_setting

POOLS = (0.6, 0.15, 0.25)
HELD_OUT = {VALIDATION: 20, NEW: 60}
NUM_WAYS, NUM_SHOTS = 5, 1
TRAIN_SHOTS, NUM_QUERY = 5, 5


class Preset(NamedTuple):
    """Defaults of one data set."""

    rounds: int
    """Rounds of training."""
    participation: float
    """Chance of each training client to take part in a round."""
    hidden: tuple[int, ...]
    """Widths of the MLP's blocks: noise grows with the square root of the number of parameters."""
    rate: float
    """Rate of the clients' SGD, chosen without noise on the validation clients; the same for all algorithms."""
    batch_size: int = 10
    """Examples per batch."""


PRESETS = {
    "digits": Preset(rounds=80, participation=0.1, hidden=(32, 32), rate=1.0),
    "wisdm": Preset(rounds=60, participation=0.5, hidden=(16, 16), rate=0.1),
}


def many_tasks(num_clients: int, seed: int) -> Federation:
    """Tasks of the digits, each with labels in a private order.

    Args:
      num_clients: clients that train.
      seed: draws pools, tasks and images.

    Returns:
      A `Federation`. What one client adds to it is its task; an image may belong to several clients.
    """
    data, labels = load_digits(return_X_y=True)
    x, rng = (data / 16).astype(np.float32), np.random.default_rng(seed)
    pools = dict(zip((TRAIN, VALIDATION, NEW), split_pools(labels, POOLS, seed=rng), strict=True))
    tasks = {
        role: class_tasks(
            x,
            labels,
            num_clients=count,
            num_classes=NUM_WAYS,
            num_support=TRAIN_SHOTS if role == TRAIN else NUM_SHOTS,
            num_query=NUM_QUERY,
            pool=pools[role],
            seed=rng,
        )
        for role, count in {TRAIN: num_clients, **HELD_OUT}.items()
    }
    return from_tasks(
        "digits",
        tasks,
        num_outputs=NUM_WAYS,
        stimuli=x[rng.choice(pools[VALIDATION], 20, replace=False)],
        notes=(
            f"{num_clients} training clients, each with {NUM_WAYS} of the 10 digits in a private order. An image may "
            "belong to several clients: what is protected is a client with all its rows and its order, not an image.",
            f"New clients adapt on {NUM_SHOTS} labelled image per class, from images that nobody trained on.",
        ),
    )


def load(name: str, num_clients: int, seed: int, data_dir: object = None) -> Federation:
    """The federation of a seed.

    Args:
      name: `"digits"` for many tasks, or another set of `experiments.datasets`, whose clients are as many as they are.
      num_clients: training clients of the digits.
      seed: of every draw.
      data_dir: folder of the sets that are not embedded.
    """
    if name == "digits":
        return many_tasks(num_clients, seed)
    return datasets.load(name, seed=seed, data_dir=data_dir)  # type: ignore[arg-type]


def make_problem(name: str, num_clients: int, seeds: Sequence[int], preset: Preset, data_dir: object = None) -> Setting:
    """The setting of all seeds; every model is an MLP.

    Args:
      name: as in `load`.
      num_clients: as in `load`.
      seeds: the seeds.
      preset: hyper-parameters.
      data_dir: as in `load`.
    """
    return make_setting(lambda seed: load(name, num_clients, seed, data_dir), seeds, preset.hidden, "mlp")
