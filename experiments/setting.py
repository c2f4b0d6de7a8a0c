"""One setting: the federations of all seeds, the model, and the hyper-parameters that were chosen for a data set."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cedarjax import nn
from cedarjax.core import FederatedDataset, LossFn
from experiments.datasets import NEW, TRAIN, VALIDATION, Federation, to_dataset

ModelName = Literal["mlp", "cnn1d", "cnn"]


class Preset(NamedTuple):
    """Defaults of one data set, chosen on its validation clients by `python -m experiments.cedar --tune`."""

    rounds: int
    """Rounds of training."""
    participation: float
    """Share of the training clients that take part in a round."""
    learning_rate: Mapping[str, float]
    """Learning rate by algorithm: of the client's Adam, or of the server's Adam for the MAMLs."""
    inner_rate: float = 0.2
    """Rate of the MAMLs' inner SGD steps."""
    batch_size: int = 10
    """Examples per batch."""
    epochs: int = 1
    """Passes over a client's data in a round."""
    meta_batch: int | None = None
    """Query examples in the MAMLs' outer loss; None: all of a client's."""
    hidden: tuple[int, ...] = (64, 64, 64)
    """Widths of the MLP's blocks, where the model is an MLP."""
    model: ModelName | None = None
    """Kind of model; None: what fits the shape of the inputs."""


_RATES = {"cedar": 3e-3, "fedavg": 3e-3, "fedprox": 3e-3, "reptile": 3e-3, "maml": 3e-3, "fomaml": 3e-3}
DEFAULT = Preset(rounds=100, participation=0.5, learning_rate=_RATES)
PRESETS: dict[str, Preset] = {
    "digits": Preset(rounds=200, participation=0.5, learning_rate=_RATES),
    "wisdm": Preset(rounds=100, participation=0.5, learning_rate=_RATES, inner_rate=0.1, meta_batch=32),
    "redwine": Preset(rounds=100, participation=1.0, learning_rate=_RATES, inner_rate=0.05),
}


class Setting(NamedTuple):
    """Everything that the variants of a comparison share; arrays have the seeds on axis 0."""

    task: str
    """`"classification"` or `"regression"`."""
    model: nn.Model
    """The model as pure functions."""
    loss_fn: LossFn
    """The model's loss."""
    train: FederatedDataset
    """Clients that train, `[seeds, ...]`."""
    validation: FederatedDataset
    """Clients on which rates are chosen, `[seeds, ...]`."""
    new: FederatedDataset
    """Held-out clients on which results are reported, `[seeds, ...]`."""
    stimuli: jax.Array
    """`[seeds, S, ...]`, the server's unlabelled inputs."""
    params: Any
    """Initial parameters, `[seeds, ...]`."""
    keys: jax.Array
    """`[seeds]` keys of the runs."""
    num_outputs: int
    """Classes, or 1."""
    mean_examples: float
    """Examples of a training client, on average."""

    @property
    def num_seeds(self) -> int:
        """Seeds, the leading axis of every array."""
        return self.keys.shape[0]

    @property
    def num_train(self) -> int:
        """Training clients `N`."""
        return self.train.offsets.shape[1] - 1


def fitting(shape: Sequence[int]) -> ModelName:
    """What fits the shape of one input: an MLP for vectors, a 1-D CNN for windows, a 2-D CNN for images."""
    if len(shape) == 2:
        return "cnn1d"
    return "cnn" if len(shape) == 3 and shape[0] >= 16 else "mlp"


def make_model(federation: Federation, hidden: Sequence[int], name: ModelName | None = None) -> nn.Model:
    """The model of a federation.

    Args:
      federation: the data.
      hidden: widths of the MLP's blocks.
      name: kind of model, by default what fits.

    Returns:
      The model; its judged layers are its blocks, all but the head.

    Raises:
      ValueError: for a convolution over inputs of another rank.
    """
    shape, outputs = federation.x.shape[1:], federation.num_outputs
    match name or fitting(shape):
        case "mlp":
            return nn.functional(lambda rngs: nn.MLP(int(np.prod(shape)), tuple(hidden), outputs, rngs=rngs))
        case "cnn1d" if len(shape) == 2:
            return nn.functional(lambda rngs: nn.CNN1D(shape[-1], outputs, rngs=rngs))
        case "cnn" if len(shape) == 3:
            return nn.functional(lambda rngs: nn.CNN(shape[-1], (16, 32), outputs, rngs=rngs))
        case other:
            raise ValueError(f"model must be 'mlp' or fit inputs of shape {tuple(shape)}, got {other!r}.")


def stack_datasets(datasets: Sequence[FederatedDataset]) -> FederatedDataset:
    """Puts federations with equally many clients on a leading axis.

    Unequal totals of examples are filled up with rows that nobody owns.

    Args:
      datasets: one federation per seed.

    Returns:
      A `FederatedDataset` with leaves `[seeds, ...]`.
    """
    rows = max(d.num_examples for d in datasets)
    padded = [
        dataclasses.replace(
            d,
            examples=jax.tree.map(lambda x: jnp.pad(x, [(0, rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1)), d.examples),
            max_examples=max(d.max_examples for d in datasets),
        )
        for d in datasets
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *padded)


def make_setting(
    load_fn: Callable[[int], Federation], seeds: Sequence[int], hidden: Sequence[int], model: ModelName | None = None
) -> Setting:
    """Loads the federation of every seed and draws the initial parameters.

    Args:
      load_fn: `seed -> Federation`; a seed draws the roles of the clients as well as everything else.
      seeds: the seeds.
      hidden: widths of the MLP's blocks.
      model: kind of model, by default what fits.

    Returns:
      The `Setting`.
    """
    federations = [load_fn(seed) for seed in seeds]
    made = make_model(federations[0], hidden, model)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    init_keys, run_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    regression = federations[0].task == "regression"
    return Setting(
        task=federations[0].task,
        model=made,
        loss_fn=(nn.squared_error if regression else nn.cross_entropy)(made.apply),
        train=stack_datasets([to_dataset(f, TRAIN) for f in federations]),
        validation=stack_datasets([to_dataset(f, VALIDATION) for f in federations]),
        new=stack_datasets([to_dataset(f, NEW) for f in federations]),
        stimuli=jnp.stack([jnp.asarray(f.stimuli) for f in federations]),
        params=jax.tree.map(lambda *leaves: jnp.stack(leaves), *[made.init(k) for k in init_keys]),
        keys=run_keys,
        num_outputs=federations[0].num_outputs,
        mean_examples=float(
            np.mean([np.sum(f.role[f.client_id] == TRAIN) / np.sum(f.role == TRAIN) for f in federations])
        ),
    )
