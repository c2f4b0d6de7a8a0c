"""The models in torch: as a function of a list of tensors and as a module, and the way there and back."""

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from bench.peers.task import Program, Task
from bench.peers.threads import choose_threads

NAMES = {
    "mlp": ("w1", "b1", "w2", "b2"),
    "cnn": ("k1", "c1", "k2", "c2", "w", "b"),
    "femnist": ("k1", "c1", "k2", "c2", "w1", "b1", "w2", "b2"),
}
AFTER_FLATTEN = {"mlp": None, "cnn": "w", "femnist": "w1"}
SIDE = 7  # of the pictures when they are flattened
NUM_TRIAL_CLIENTS = 10


def parameters(task: Task) -> list[Tensor]:
    """The initial parameters, in the order of `NAMES` and of `module(task).parameters()`, laid out for torch."""
    return [_to_torch(task.params[name], name == AFTER_FLATTEN[task.model]) for name in NAMES[task.model]]


def arrays(task: Task, tensors: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """The inverse of `parameters`, for tensors of these shapes."""
    return {
        name: _to_numpy(tensor, task.params[name].shape, name == AFTER_FLATTEN[task.model])
        for name, tensor in zip(NAMES[task.model], tensors, strict=True)
    }


def examples(task: Task) -> tuple[Tensor, Tensor]:
    """`x`, `[C, T, B, 784]` or `[C, T, B, 1, 28, 28]`, and `y`, int64 as torch's losses want it."""
    x = torch.from_numpy(task.x)
    return (x if task.model == "mlp" else x.movedim(-1, -3).contiguous()), torch.from_numpy(task.y).long()


def loss(model: str, tensors: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of one batch."""
    rest = list(tensors)
    if model != "mlp":
        k1, c1, k2, c2, *rest = rest
        x = F.max_pool2d(F.relu(F.conv2d(x, k1, c1, padding="same")), 2)
        x = F.max_pool2d(F.relu(F.conv2d(x, k2, c2, padding="same")), 2).flatten(1)
    for weight, bias in zip(rest[:-2:2], rest[1:-2:2], strict=True):
        x = F.relu(F.linear(x, weight, bias))
    return F.cross_entropy(F.linear(x, rest[-2], rest[-1]), y)


def module(task: Task) -> nn.Sequential:
    """The same model as a module that holds the initial parameters and returns logits."""
    shapes = [task.params[name].shape for name in NAMES[task.model]]
    kernels = [shape for shape in shapes if len(shape) == 4]
    weights = [shape for shape in shapes if len(shape) == 2]
    layers: list[nn.Module] = []
    for side, _, num_in, num_out in kernels:
        layers += [nn.Conv2d(num_in, num_out, side, padding="same"), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten()] if kernels else []
    for num_in, num_out in weights:
        layers += [nn.Linear(num_in, num_out), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), parameters(task), strict=True):
            parameter.copy_(value)
    return model


def with_threads(build: Callable[[Task], Program], task: Task) -> Program:
    """Takes one thread or all cores, whichever does a small part of the task faster.

    Args:
      build: makes a task ready.
      task: the whole of it.

    Returns:
      The task made ready, under the chosen number of threads.
    """
    threads = choose_threads(build(task.first(NUM_TRIAL_CLIENTS)), torch.set_num_threads)
    program = build(task)
    return program._replace(settings={"threads": str(threads), **program.settings})


def mean_over_clients(task: Task, one: Callable[[list[Tensor], Tensor, Tensor], Sequence[Tensor]]) -> Program:
    """A loop over clients.

    Args:
      task: what to do.
      one: of initial parameters and a client's `[T, B, ...]` examples and labels; returns what is averaged: its
        update, or its gradient.

    Returns:
      The task made ready.
    """
    initial = parameters(task)
    x, y = examples(task)

    def run() -> list[Tensor]:
        total = [torch.zeros_like(value) for value in initial]
        for client_x, client_y in zip(x, y, strict=True):
            torch._foreach_add_(total, list(one(initial, client_x, client_y)))
        return mean(task, initial, total)

    return Program(run, functools.partial(arrays, task), {})


def mean(task: Task, initial: Sequence[Tensor], total: list[Tensor]) -> list[Tensor]:
    """The result from the sum of the clients' updates or gradients.

    Parameters themselves would lose the digits of small updates in a long sum.
    """
    torch._foreach_div_(total, float(task.num_clients))
    if task.kind == "fedavg":
        torch._foreach_add_(total, list(initial))
    return total


def chunks(task: Task, size: int) -> Iterator[slice]:
    """Slices of at most `size` clients."""
    return (slice(start, start + size) for start in range(0, task.num_clients, size))


def _to_torch(array: np.ndarray, after_flatten: bool) -> Tensor:
    if after_flatten:
        array = array.reshape(SIDE, SIDE, -1, array.shape[1]).transpose(3, 2, 0, 1).reshape(array.shape[1], -1)
    elif array.ndim > 1:
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return torch.from_numpy(array.copy())


def _to_numpy(tensor: Tensor, shape: tuple[int, ...], after_flatten: bool) -> np.ndarray:
    array: np.ndarray = tensor.detach().numpy()
    if after_flatten:
        array = array.reshape(shape[1], -1, SIDE, SIDE).transpose(2, 3, 1, 0).reshape(shape)
    elif array.ndim > 1:
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return np.ascontiguousarray(array)
