"""ByzFL's aggregators on NumPy arrays or torch tensors, without the rest of its package."""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import numpy as np
import threadpoolctl
import torch

from bench.peers.task import Program, RuleTask
from bench.peers.threads import choose_threads

PACKAGES = ("byzfl", "numpy", "scipy", "torch")
CHANGES_INPUT = ("Clipping", "ARC")  # they write into the caller's array


def aggregators() -> ModuleType:
    """The module of that name; the package's own first file would import its training loops and torchvision."""
    if "byzfl" not in sys.modules:
        spec = importlib.util.find_spec("byzfl")
        assert spec is not None
        sys.modules["byzfl"] = importlib.util.module_from_spec(spec)
    return importlib.import_module("byzfl.aggregators")


def set_threads(count: int) -> None:
    torch.set_num_threads(count)
    threadpoolctl.threadpool_limits(count, user_api="blas")


def build(task: RuleTask) -> Program:
    rules = aggregators()
    original: Any = task.updates if task.library == "numpy" else torch.from_numpy(task.updates)
    changes = any(name in CHANGES_INPUT for name, _ in task.steps)
    given = [original]

    def refresh() -> None:
        if changes:
            given[0] = original.copy() if task.library == "numpy" else original.clone()

    def run() -> Any:
        result = given[0]
        for name, arguments in task.steps:  # made anew, since some remember their last result
            result = getattr(rules, name)(**arguments)(result)
        return result

    return Program(run, lambda result: {"update": np.asarray(result, np.float32)}, {}, refresh)


def prepare(task: RuleTask) -> Program:
    np.random.seed(0)
    torch.manual_seed(0)
    program = build(task)
    return program._replace(settings={"threads": str(choose_threads(program, set_threads))})
