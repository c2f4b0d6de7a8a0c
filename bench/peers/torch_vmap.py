"""torch.func: one client as a function, `vmap` over chunks of clients, with SGD steps or MAML's gradient inside."""

import functools

import torch
from torch import Tensor
from torch.func import grad, vmap

from bench.peers import torch_models as models
from bench.peers.task import Program, Task

PACKAGES = ("torch",)
CHUNK = 100


def build(task: Task) -> Program:
    initial = tuple(models.parameters(task))
    x, y = models.examples(task)

    def step(params: tuple[Tensor, ...], batch_x: Tensor, batch_y: Tensor) -> tuple[Tensor, ...]:
        grads = grad(functools.partial(models.loss, task.model))(params, batch_x, batch_y)
        return tuple(value - task.learning_rate * slope for value, slope in zip(params, grads, strict=True))

    def fedavg(start: tuple[Tensor, ...], x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        params = start
        for batch_x, batch_y in zip(x, y, strict=True):
            params = step(params, batch_x, batch_y)
        return tuple(after - before for after, before in zip(params, start, strict=True))

    def adapted_loss(params: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
        return models.loss(task.model, step(params, x[0], y[0]), x[1], y[1])

    clients = vmap(fedavg if task.kind == "fedavg" else grad(adapted_loss), in_dims=(None, 0, 0))

    def run() -> list[Tensor]:
        total = [torch.zeros_like(value) for value in initial]
        for chunk in models.chunks(task, CHUNK):
            torch._foreach_add_(total, [value.sum(0) for value in clients(initial, x[chunk], y[chunk])])
        return models.mean(task, initial, total)

    return Program(run, functools.partial(models.arrays, task), {"chunk": str(CHUNK)})


def prepare(task: Task) -> Program:
    return models.with_threads(build, task)
