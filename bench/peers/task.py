"""What a peer is asked to do, and how it travels to the peer's process: NumPy and the standard library alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

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

    def pack(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What is JSON, and what is arrays."""
        scalars = {"kind": self.kind, "model": self.model, "learning_rate": self.learning_rate}
        return scalars, {"x": self.x, "y": self.y, **{f"params/{name}": leaf for name, leaf in self.params.items()}}

    @classmethod
    def unpack(cls, scalars: dict[str, Any], arrays: dict[str, np.ndarray]) -> "Task":
        """The inverse of `pack`."""
        params = {name.removeprefix("params/"): leaf for name, leaf in arrays.items() if name.startswith("params/")}
        return cls(params=params, x=arrays["x"], y=arrays["y"], **scalars)


class RuleTask(NamedTuple):
    """One aggregation rule on the clients' updates; the result is `{"update": [D]}`."""

    steps: tuple[tuple[str, dict[str, float]], ...]
    """The rule, or what comes before it and then the rule: names and arguments as the peer knows them."""
    library: str
    """Whose arrays the peer is to take, `"numpy"` or `"torch"`, if it has a choice."""
    updates: np.ndarray
    """`[C, D]` float32."""

    @property
    def kind(self) -> str:
        """As in `Task`."""
        return "rule"

    @property
    def model(self) -> str:
        """As in `Task`: there are no models here, only a matrix."""
        return "matrix"

    def pack(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What is JSON, and what is arrays."""
        return {"steps": self.steps, "library": self.library}, {"updates": self.updates}

    @classmethod
    def unpack(cls, scalars: dict[str, Any], arrays: dict[str, np.ndarray]) -> "RuleTask":
        """The inverse of `pack`."""
        return cls(tuple((name, arguments) for name, arguments in scalars["steps"]), scalars["library"], **arrays)


AnyTask: TypeAlias = Task | RuleTask
_TYPES: dict[str, type[Task] | type[RuleTask]] = {"Task": Task, "RuleTask": RuleTask}


class Program(NamedTuple):
    """A task made ready by a peer."""

    run: Callable[[], Any]
    """Does the whole task and returns when the result is there."""
    to_numpy: Callable[[Any], dict[str, np.ndarray]]
    """Turns what `run` returned into arrays with the names, shapes and layout of `Task.params`, or those that
    `RuleTask` asks for."""
    settings: dict[str, str]
    """What the peer chose for itself, for example the number of threads."""
    refresh: Callable[[], None] = lambda: None
    """Called before each `run`, off the clock, for peers that change what they are given."""


def save(task: AnyTask, folder: Path) -> None:
    """Writes `task.json` and `task.npz`."""
    scalars, arrays = task.pack()
    (folder / "task.json").write_text(json.dumps({"type": type(task).__name__, **scalars}), encoding="utf-8")
    save_arrays(folder / "task.npz", arrays)


def load(folder: Path) -> AnyTask:
    """Reads what `save` wrote."""
    scalars = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    return _TYPES[scalars.pop("type")].unpack(scalars, load_arrays(folder / "task.npz"))


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes named arrays, uncompressed; names may be any strings that are no file's path."""
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads named arrays."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
