"""Second-order MAML with TorchOpt's differentiable optimiser, client after client."""

from collections.abc import Sequence

import torch
import torchopt
from torch import Tensor

from bench.peers import torch_models as models
from bench.peers.task import Program, Task

PACKAGES = ("torchopt", "torch")


def build(task: Task) -> Program:
    def one(initial: list[Tensor], x: Tensor, y: Tensor) -> Sequence[Tensor]:
        params = tuple(value.requires_grad_() for value in initial)
        optimizer = torchopt.FuncOptimizer(torchopt.sgd(lr=task.learning_rate))
        adapted = optimizer.step(models.loss(task.model, params, x[0], y[0]), params)
        return torch.autograd.grad(models.loss(task.model, adapted, x[1], y[1]), params)

    return models.mean_over_clients(task, one)


def prepare(task: Task) -> Program:
    return models.with_threads(build, task)
