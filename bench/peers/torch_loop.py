"""Federated averaging as one writes it by hand in torch: a loop over clients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.peers import torch_models as models
from bench.peers.task import Program, Task

PACKAGES = ("torch",)


def build(task: Task) -> Program:
    def one(initial: list[Tensor], x: Tensor, y: Tensor) -> Sequence[Tensor]:
        params = [value.clone().requires_grad_() for value in initial]
        for batch_x, batch_y in zip(x, y, strict=True):
            grads = torch.autograd.grad(models.loss(task.model, params, batch_x, batch_y), params)
            with torch.no_grad():
                torch._foreach_add_(params, grads, alpha=-task.learning_rate)
        with torch.no_grad():
            return torch._foreach_sub(params, initial)

    return models.mean_over_clients(task, one)


def prepare(task: Task) -> Program:
    return models.with_threads(build, task)
