"""What every loader returns, and the few host-side operations that loaders share."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cedarjax.data import FederatedDataset, federated_dataset

TRAIN, VALIDATION, NEW = 0, 1, 2
ROLES = ("train", "validation", "new")
CLIP = 10.0


class Federation(NamedTuple):
    """The examples of all clients, on the host.

    Rows are sorted by client, `client_id` counts from 0 without gaps, and the rows of one client are its support set
    followed by its query set, which is the order that `cedarjax.core.ClientData` asks for.
    """

    name: str
    """Name of the data set."""
    task: str
    """`"classification"` or `"regression"`."""
    x: np.ndarray
    """`[n, ...]` float32."""
    y: np.ndarray
    """`[n]`: int32 classes from 0, or float32 targets standardised by the training clients."""
    client_id: np.ndarray
    """`[n]` int32, non-decreasing."""
    num_support: np.ndarray
    """`[N]` int32: how many of a client's rows, from its first, are its support set; at least 1, less than all."""
    role: np.ndarray
    """`[N]` int8: 0 for training clients, 1 for validation clients, 2 for new clients, which are held out."""
    num_outputs: int
    """Classes, or 1 for regression."""
    class_names: tuple[str, ...] | None
    """Names of the classes; None for regression, and where a class means something else to every client."""
    stimuli: np.ndarray
    """`[S, ...]` float32, the server's unlabelled inputs; never rows of a new client."""
    client_names: tuple[str, ...] | None = None
    """`[N]` names of the clients in the source: wearers, stations, ..."""
    target_mean: float = 0.0
    """`y * target_std + target_mean` is the target in its own unit (regression)."""
    target_std: float = 1.0
    """See `target_mean`."""
    notes: tuple[str, ...] = ()
    """What a reader of results must know: what was dropped, drawn, or is odd in the source."""

    @property
    def num_clients(self) -> int:
        """All clients, whatever their role."""
        return len(self.role)

    @property
    def offsets(self) -> np.ndarray:
        """`[N + 1]`: the rows of client `i` are `offsets[i]` to `offsets[i + 1]`."""
        return np.concatenate([[0], np.cumsum(np.bincount(self.client_id, minlength=self.num_clients))])

    @property
    def train_clients(self) -> np.ndarray:
        """Ids of the clients that train."""
        return np.flatnonzero(self.role == TRAIN)

    @property
    def validation_clients(self) -> np.ndarray:
        """Ids of the clients on which hyper-parameters are chosen; they never train."""
        return np.flatnonzero(self.role == VALIDATION)

    @property
    def new_clients(self) -> np.ndarray:
        """Ids of the held-out clients on which results are reported."""
        return np.flatnonzero(self.role == NEW)

    @property
    def held_out(self) -> np.ndarray:
        """`[N]` bool, true for new clients."""
        return self.role == NEW

    @property
    def is_support(self) -> np.ndarray:
        """`[n]` bool, true for the rows of support sets."""
        rank = np.arange(len(self.y)) - self.offsets[:-1][self.client_id]
        return rank < self.num_support[self.client_id]


class ClientRows(NamedTuple):
    """Which rows of a source belong to one client."""

    support: np.ndarray
    """Row numbers of the support set."""
    query: np.ndarray
    """Row numbers of the query set."""


def assemble(
    name: str,
    *,
    task: str,
    x: np.ndarray,
    y: np.ndarray,
    clients: Sequence[ClientRows],
    role: np.ndarray,
    num_outputs: int,
    stimuli: np.ndarray,
    **rest: Any,
) -> Federation:
    """Lays the rows of the clients out as a `Federation` and checks it.

    Args:
      name: name of the data set.
      task: `"classification"` or `"regression"`.
      x: `[m, ...]` inputs of the source.
      y: `[m]` labels or targets of the source.
      clients: rows of each client; a row may be given to several clients.
      role: `[N]` of `TRAIN`, `VALIDATION`, `NEW`.
      num_outputs: classes, or 1.
      stimuli: `[S, ...]`.
      **rest: the other fields of `Federation`.

    Raises:
      ValueError: when a client lacks a support or a query row, or a role has no client.
    """
    for client, rows in enumerate(clients):
        if len(rows.support) == 0 or len(rows.query) == 0:
            counts = f"{len(rows.support)} and {len(rows.query)}"
            raise ValueError(f"{name}: client {client} must have at least 1 support and 1 query row, got {counts}.")
    role = np.asarray(role, np.int8)
    for code, role_name in enumerate(ROLES):
        if not np.any(role == code):
            raise ValueError(f"{name}: there must be at least 1 {role_name} client, got 0 of {len(role)}.")
    order = np.concatenate([np.concatenate([rows.support, rows.query]) for rows in clients])
    sizes = [len(rows.support) + len(rows.query) for rows in clients]
    return Federation(
        name=name,
        task=task,
        x=np.ascontiguousarray(x[order], np.float32),
        y=y[order].astype(np.int32 if task == "classification" else np.float32),
        client_id=np.repeat(np.arange(len(clients), dtype=np.int32), sizes),
        num_support=np.array([len(rows.support) for rows in clients], np.int32),
        role=role,
        num_outputs=num_outputs,
        stimuli=np.ascontiguousarray(stimuli, np.float32),
        class_names=rest.pop("class_names", None),
        **rest,
    )


def from_tasks(
    name: str,
    tasks: Mapping[int, FederatedDataset],
    *,
    num_outputs: int,
    stimuli: np.ndarray,
    notes: tuple[str, ...],
) -> Federation:
    """Joins the classification tasks of each role, as `cedarjax.data.class_tasks` builds them."""
    counts = np.concatenate([np.asarray(part.counts) for part in tasks.values()])
    return Federation(
        name=name,
        task="classification",
        x=np.concatenate([np.asarray(part.examples["x"], np.float32) for part in tasks.values()]),
        y=np.concatenate([np.asarray(part.examples["y"], np.int32) for part in tasks.values()]),
        client_id=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        num_support=np.concatenate([np.asarray(part.num_support, np.int32) for part in tasks.values()]),
        role=np.repeat(np.array(list(tasks), np.int8), [part.num_clients for part in tasks.values()]),
        num_outputs=num_outputs,
        class_names=None,
        stimuli=np.ascontiguousarray(stimuli, np.float32),
        notes=notes,
    )


def to_dataset(federation: Federation, role: int) -> FederatedDataset:
    """The clients of one role (`TRAIN`, `VALIDATION` or `NEW`) as a federation on the device.

    Args:
      federation: `N` clients.
      role: which of them.

    Returns:
      Examples `{"x": [n, ...], "y": [n]}`; client `k` is the `k`-th client of that role.
    """
    rows = federation.role[federation.client_id] == role
    examples = {"x": federation.x[rows], "y": federation.y[rows]}
    return federated_dataset(
        examples, federation.client_id[rows], num_support=federation.num_support[federation.role == role]
    )


def draw_roles(rng: np.random.Generator, num_train: int, num_validation: int, num_new: int) -> np.ndarray:
    """`[N]` int8 roles of clients in random order, with exactly these counts."""
    return rng.permutation(np.repeat(np.array([TRAIN, VALIDATION, NEW], np.int8), [num_train, num_validation, num_new]))


def draw_validation(rng: np.random.Generator, is_new: np.ndarray, num_validation: int) -> np.ndarray:
    """`[N]` int8 roles where the new clients are known and validation clients are drawn from the others."""
    role = np.where(is_new, NEW, TRAIN).astype(np.int8)
    role[rng.choice(np.flatnonzero(~is_new), num_validation, replace=False)] = VALIDATION
    return role


def shuffled_halves(rng: np.random.Generator, rows: np.ndarray) -> ClientRows:
    """Splits a client's rows at random into two halves; of an odd number, the query set takes one more."""
    rows = rng.permutation(rows)
    return ClientRows(rows[: len(rows) // 2], rows[len(rows) // 2 :])


def first_per_class(rows: np.ndarray, labels: np.ndarray, num_shots: int) -> ClientRows:
    """Support = the first `num_shots` rows of each class in the order given; query = the rest.

    Args:
      rows: `[m]` row numbers of one client, in time.
      labels: `[m]` their classes.
      num_shots: support rows per class; a class with no more than that gives all but one.
    """
    is_support = np.zeros(len(rows), bool)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        is_support[places[: min(num_shots, len(places) - 1)]] = True
    return ClientRows(rows[is_support], rows[~is_support])


def standardiser(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature (the last axis) over all rows given; 1 where a feature is constant.

    Example:
      >>> mean, std = standardiser(np.array([[0.0, 3.0], [2.0, 3.0]]))
      >>> mean.tolist(), std.tolist()
      ([1.0, 3.0], [1.0, 1.0])
    """
    flat = x.reshape(-1, x.shape[-1]).astype(np.float64)
    mean, std = flat.mean(axis=0), flat.std(axis=0)
    return mean, np.where(std > 1e-6 * np.maximum(np.abs(mean), 1.0), std, 1.0)


def standardise(x: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Brings each feature to mean 0 and deviation 1 of the rows `seen`, and cuts it off at `CLIP` deviations."""
    mean, std = standardiser(x[seen])
    return np.clip((x - mean) / std, -CLIP, CLIP)


def subsample(rng: np.random.Generator, rows: np.ndarray, max_rows: int | None) -> np.ndarray:
    """At most `max_rows` of the rows, drawn at random, in their old order."""
    if max_rows is None or len(rows) <= max_rows:
        return rows
    return np.sort(rng.choice(rows, max_rows, replace=False))


def summary(federation: Federation) -> dict[str, Any]:
    """What a report says of a federation: counts by role, shapes, and the notes."""
    sizes = np.diff(federation.offsets)
    clients = {role: int(np.sum(federation.role == code)) for code, role in enumerate(ROLES)}
    return {
        "name": federation.name,
        "task": federation.task,
        "clients": clients,
        "examples": {role: int(sizes[federation.role == code].sum()) for code, role in enumerate(ROLES)},
        "examples per client": [int(sizes.min()), int(np.median(sizes)), int(sizes.max())],
        "support of a new client": [
            int(np.min(federation.num_support[federation.held_out])),
            int(np.max(federation.num_support[federation.held_out])),
        ],
        "input shape": list(federation.x.shape[1:]),
        "outputs": federation.num_outputs,
        "stimuli": len(federation.stimuli),
        "notes": list(federation.notes),
    }
