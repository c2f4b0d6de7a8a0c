"""Federated averaging with pfl-research: its torch model, its simulated backend, users of equal weight."""

import functools

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.common_types import Population
from pfl.context import CentralContext
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.peers import torch_models as models
from bench.peers.task import Program, Task

PACKAGES = ("pfl", "torch")


class Classifier(nn.Module):
    """The module with the two methods that pfl asks for."""

    def __init__(self, layers: nn.Sequential):
        super().__init__()
        self.layers = layers

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.layers(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, float]:
        return {}


def build(task: Task) -> Program:
    classifier = Classifier(models.module(task))
    model = PyTorchModel(classifier, torch.optim.SGD, torch.optim.SGD(classifier.parameters(), lr=1.0))
    initial = model.get_parameters()
    x, y = models.examples(task)
    users = [
        PyTorchTensorDataset((user_x.flatten(0, 1), user_y.flatten())) for user_x, user_y in zip(x, y, strict=True)
    ]
    data = FederatedDataset(users.__getitem__, MinimizeReuseUserSampler(range(len(users))))
    backend = SimulatedBackend(data, data, postprocessors=[WeightByUser()])
    algorithm = FederatedAveraging()
    context = CentralContext(
        current_central_iteration=1,
        do_evaluation=False,
        cohort_size=len(users),
        population=Population.TRAIN,
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=2, evaluation_frequency=2, train_cohort_size=len(users), val_cohort_size=0
        ),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=task.learning_rate, local_batch_size=x.shape[2]
        ),
        seed=0,
    )

    def run() -> list[Tensor]:
        model.set_parameters(initial)
        statistics, metrics = backend.gather_results(model, algorithm, central_context=context)
        algorithm.process_aggregated_statistics(context, metrics, model, statistics)
        return list(classifier.parameters())

    return Program(run, functools.partial(models.arrays, task), {})


def prepare(task: Task) -> Program:
    np.random.seed(0)  # pfl draws a seed a user from it
    return models.with_threads(build, task)
