"""Second-order MAML as learn2learn does it, in plain torch: differentiate through one step, client after client."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.peers import torch_models as models
from bench.peers.task import Program, Task

PACKAGES = ("torch",)


def build(task: Task) -> Program:
    def one(initial: list[Tensor], x: Tensor, y: Tensor) -> Sequence[Tensor]:
        params = [value.requires_grad_() for value in initial]
        support, query = zip(x, y, strict=True)
        grads = torch.autograd.grad(models.loss(task.model, params, *support), params, create_graph=True)
        adapted = [value - task.learning_rate * grad for value, grad in zip(params, grads, strict=True)]
        return torch.autograd.grad(models.loss(task.model, adapted, *query), params)

    return models.mean_over_clients(task, one)


def prepare(task: Task) -> Program:
    return models.with_threads(build, task)
