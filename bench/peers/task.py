"""What a peer is asked to do, and how it travels to the peer's process: NumPy and the standard library alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Task(NamedTuple):
    """One federated computation as plain NumPy arrays.

    `mlp` is relu(x w1 + b1) w2 + b2. `cnn` is twice convolution (SAME, stride 1) + bias, relu, 2x2 max pooling, then
    flattened in NHWC order and dense. `femnist` is the same with a relu between two dense layers. The loss is the mean
    softmax cross-entropy of the batch.
    """

    kind: str
    """`"fedavg"`: the mean over clients of the parameters after T plain SGD steps; `"maml"`: the mean over clients of
    the exact gradient of `loss(params - learning_rate * grad loss(params; support); query)`."""
    model: str
    """`"mlp"`, `"cnn"` or `"femnist"`."""
    params: dict[str, np.ndarray]
    """mlp: w1, b1, w2, b2; cnn: k1, c1, k2, c2, w, b; femnist: k1, c1, k2, c2, w1, b1, w2, b2. Dense `[in, out]`,
    kernels HWIO."""
    x: np.ndarray
    """`[C, T, B, 784]` or `[C, T, B, 28, 28, 1]` float32, the batches in the order of a client's steps; for maml T is
    2, support and query."""
    y: np.ndarray
    """`[C, T, B]` int32."""
    learning_rate: float
    """Of the SGD steps; for maml of the inner step."""

    @property
    def num_clients(self) -> int:
        """C."""
        return self.x.shape[0]

    def first(self, num_clients: int) -> "Task":
        """The same task for the first few clients."""
        return self._replace(x=self.x[:num_clients], y=self.y[:num_clients])


class Program(NamedTuple):
    """A task made ready by a peer."""

    run: Callable[[], Any]
    """Does the whole task and returns when the result is there."""
    to_numpy: Callable[[Any], dict[str, np.ndarray]]
    """Turns what `run` returned into arrays with the names, shapes and layout of `Task.params`."""
    settings: dict[str, str]
    """What the peer chose for itself, for example the number of threads."""


def save(task: Task, folder: Path) -> None:
    """Writes `task.json` and `task.npz`."""
    scalars = {"kind": task.kind, "model": task.model, "learning_rate": task.learning_rate}
    (folder / "task.json").write_text(json.dumps(scalars), encoding="utf-8")
    save_arrays(folder / "task.npz", {"x": task.x, "y": task.y, **{f"params/{k}": v for k, v in task.params.items()}})


def load(folder: Path) -> Task:
    """Reads what `save` wrote."""
    scalars = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    arrays = load_arrays(folder / "task.npz")
    x, y = arrays.pop("x"), arrays.pop("y")
    return Task(params={name.removeprefix("params/"): value for name, value in arrays.items()}, x=x, y=y, **scalars)


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes named arrays, uncompressed; names may be any strings that are no file's path."""
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads named arrays."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
