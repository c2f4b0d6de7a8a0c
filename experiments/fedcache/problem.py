"""The fleet: clients with rows of their own, a part of which is held back to test the model of each."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cedarjax import distill, nn
from cedarjax.core import ClientData, FederatedDataset, take_clients
from cedarjax.data import federated_dataset
from cedarjax.distill.encoders import Encoder
from experiments.datasets import Federation
from experiments.fedcache.encoders import load_encoder
from experiments.fedcache.neighbours import hnsw_relations
from experiments.setting import stack_datasets

TEST_SHARE = 0.25
"""Share of a client's rows that is held back."""
FLEETS = {"homogeneous": ("medium",), "heterogeneous": ("small", "medium", "large")}
"""Architectures of a fleet; client `i` has the `i`-th one, and round again."""


class Problem(NamedTuple):
    """What all algorithms are given; arrays have the seeds on axis 0."""

    models: dict[str, nn.Model]
    """Architecture by name: those of the fleet, and the one for all of algorithms that exchange parameters."""
    params: dict[str, Any]
    """`[seeds, N, ...]` initial parameters of every client in each architecture, different from client to client."""
    fleet: tuple[str, ...]
    """Architectures in use; client `i` has `fleet[i % len(fleet)]`."""
    train: FederatedDataset
    """`[seeds, ...]`; examples are `{"x", "y", "index"}`."""
    test: FederatedDataset
    """`[seeds, ...]`, the rows held back."""
    relations: distill.Relations
    """`[seeds, n, R]` of the training rows; rows that fill up a seed have none."""
    num_classes: int
    """`K`."""
    embedding_dim: int
    """`d`, numbers in what a client uploads of each sample before the first round."""
    mean_rows: float
    """Training rows of a client, on average."""
    keys: jax.Array
    """`[seeds]` keys of the runs."""

    @property
    def num_clients(self) -> int:
        """Clients `N`."""
        return self.train.offsets.shape[1] - 1

    def members(self, architecture: str) -> np.ndarray:
        """Ids of the clients of an architecture."""
        return np.arange(self.fleet.index(architecture), self.num_clients, len(self.fleet))

    def num_bytes(self, architecture: str) -> int:
        """Bytes of the parameters of one model."""
        return sum(x[0, 0].nbytes for x in jax.tree.leaves(self.params[architecture]))


def architectures(shape: Sequence[int], num_classes: int) -> dict[str, nn.Model]:
    """Three architectures for inputs of a shape: two MLPs, and a convolution where the inputs are more than a vector.

    Args:
      shape: of one input.
      num_classes: `K`.
    """

    def mlp(*hidden: int) -> nn.Model:
        return nn.functional(lambda rngs: nn.MLP(math.prod(shape), hidden, num_classes, rngs=rngs))

    if len(shape) == 3:
        small = nn.functional(lambda rngs: nn.CNN(shape[-1], (8, 16), num_classes, rngs=rngs))
    elif len(shape) == 2:
        small = nn.functional(lambda rngs: nn.CNN1D(shape[-1], num_classes, rngs=rngs))
    else:
        small = mlp(64)
    return {"small": small, "medium": mlp(256, 128), "large": mlp(512, 256)}


def split_rows(federation: Federation, seed: int) -> tuple[FederatedDataset, FederatedDataset]:
    """Rows of every client, whatever its role, to train on and to test on.

    Args:
      federation: all clients.
      seed: draws the rows.
    """
    rng = np.random.default_rng([seed, 30])
    is_test = np.zeros(len(federation.y), bool)
    for start, stop in zip(federation.offsets[:-1], federation.offsets[1:], strict=True):
        count = max(1, round(TEST_SHARE * (stop - start)))
        is_test[rng.choice(np.arange(start, stop), count, replace=False)] = True

    def part(rows: np.ndarray) -> FederatedDataset:
        return federated_dataset({"x": federation.x[rows], "y": federation.y[rows]}, federation.client_id[rows])

    return distill.with_index(part(~is_test)), part(is_test)


def relate(
    dataset: FederatedDataset, encoder: Encoder, num_related: int, num_rows: int, index: str = "exact"
) -> distill.Relations:
    """Relations of the rows of one seed, filled up to `num_rows` with rows that are related to nothing.

    Args:
      dataset: the rows.
      encoder: relates them.
      num_related: `R`.
      num_rows: rows wanted.
      index: `"exact"` or `"hnsw"`.
    """
    embeddings, y = distill.embed(encoder, dataset.examples["x"]), dataset.examples["y"]
    if index == "exact":
        relations = distill.build_relations(embeddings, y, num_related)
    else:
        relations = hnsw_relations(np.asarray(embeddings), np.asarray(y), num_related)
    return jax.tree.map(lambda a: jnp.pad(a, [(0, num_rows - a.shape[0]), (0, 0)]), relations)


def random_encoder(dataset: FederatedDataset, embedding_dim: int) -> Encoder:
    """A random layer on centred inputs."""
    x = dataset.examples["x"]
    encoder, centre = distill.random_features(jax.random.key(0), x.shape[1:], embedding_dim), x.mean(0, keepdims=True)
    return lambda x: encoder(x - centre)


def make_problem(
    load_fn: Callable[[int], Federation],
    num_seeds: int,
    fleet: str,
    *,
    num_related: int,
    embedding_dim: int,
    encoder_file: Path | None = None,
    index: str = "exact",
) -> Problem:
    """Loads the clients of every seed, draws a model for each, and relates their samples.

    Args:
      load_fn: `seed -> Federation`, of classification.
      num_seeds: seeds.
      fleet: key of `FLEETS`.
      num_related: `R`.
      embedding_dim: `d`, features of a random layer that all clients share.
      encoder_file: parameters of a network to embed with in place of it, see `load_encoder`.
      index: how related samples are found, `"exact"` or `"hnsw"`.

    Returns:
      The `Problem`.

    Raises:
      ValueError: if the data are not of classification.
    """
    federations = [load_fn(seed) for seed in range(num_seeds)]
    if federations[0].task != "classification":
        raise ValueError(f"dataset must be one of classification, got {federations[0].name}.")
    if federations[0].class_names is None:
        raise ValueError(f"dataset must have classes that all clients share, got {federations[0].name}.")
    shape, num_classes = federations[0].x.shape[1:], federations[0].num_outputs
    split = [split_rows(federation, seed) for seed, federation in enumerate(federations)]
    train = stack_datasets([kept for kept, _ in split])
    num_rows = train.examples["y"].shape[1]
    trained = None if encoder_file is None else load_encoder(encoder_file, shape)
    relations = [
        relate(kept, trained[0] if trained else random_encoder(kept, embedding_dim), num_related, num_rows, index)
        for kept, _ in split
    ]
    keys = jnp.stack([jax.random.key(seed) for seed in range(num_seeds)])
    init_keys, run_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    num_clients = train.offsets.shape[1] - 1
    models = {
        name: model for name, model in architectures(shape, num_classes).items() if name in ("medium", *FLEETS[fleet])
    }
    params = {
        name: jax.vmap(jax.vmap(model.init))(jax.vmap(lambda key: jax.random.split(key, num_clients))(init_keys))
        for name, model in models.items()
    }
    return Problem(
        models=models,
        params=params,
        fleet=FLEETS[fleet],
        train=train,
        test=stack_datasets([kept for _, kept in split]),
        relations=jax.tree.map(lambda *a: jnp.stack(a), *relations),
        num_classes=num_classes,
        embedding_dim=trained[1] if trained else embedding_dim,
        mean_rows=float(train.offsets[:, -1].mean()) / num_clients,
        keys=run_keys,
    )


def accuracy(logits_fn: Callable[[Any, jax.Array], jax.Array], params: Any, data: ClientData) -> jax.Array:
    """Share of a client's rows that its model names right.

    Args:
      logits_fn: `(params, x) -> [M, K]`.
      params: of one client.
      data: one client's rows.
    """
    x, y = data.examples["x"], data.examples["y"]
    counted = jnp.arange(y.shape[0]) < data.num_examples
    right = (logits_fn(params, x).argmax(axis=1) == y) & counted
    return right.sum() / data.num_examples


def clients_of(dataset: FederatedDataset, ids: np.ndarray) -> Any:
    """The cohort of some clients, all present with equal weight."""
    return take_clients(dataset, jnp.asarray(ids, jnp.int32), weighting="uniform")
