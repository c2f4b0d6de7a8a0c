"""Second-order MAML with learn2learn: clone the wrapped module, adapt the clone, backpropagate to the original."""

import functools

import learn2learn
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.peers import torch_models as models
from bench.peers.task import Program, Task

PACKAGES = ("learn2learn", "torch")


def build(task: Task) -> Program:
    maml = learn2learn.algorithms.MAML(models.module(task), lr=task.learning_rate, first_order=False)
    x, y = models.examples(task)

    def run() -> list[Tensor]:
        maml.zero_grad()
        for (support_x, query_x), (support_y, query_y) in zip(x, y, strict=True):
            learner = maml.clone()
            learner.adapt(cross_entropy(learner(support_x), support_y))
            cross_entropy(learner(query_x), query_y).backward()
        total = [parameter.grad for parameter in maml.parameters()]
        torch._foreach_div_(total, float(task.num_clients))
        return total

    return Program(run, functools.partial(models.arrays, task), {})


def prepare(task: Task) -> Program:
    return models.with_threads(build, task)
