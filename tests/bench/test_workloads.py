"""Every workload is a list of programs that trace, at the sizes that it names."""

import importlib
from typing import get_args

import jax
import jax.numpy as jnp
import pytest

from bench import __main__ as program
from bench.workloads import scale

LARGE = ("cedar", "femnist", "maml_cnn")
NAMES = [
    pytest.param(name, marks=pytest.mark.slow if name in LARGE else ())
    for name in get_args(program.Name)
    if name != "robust"  # has its own file
]


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", NAMES)
def test_a_workload_is_made_of_programs(name):
    workload = importlib.import_module(f"bench.workloads.{name}").WORKLOAD
    assert workload.title and workload.unit and min(workload.num_clients) >= 1
    cases = workload.layouts(2, jnp.dtype(jnp.float32))
    assert len({(case.part, case.layout) for case in cases}) == len(cases)
    for case in (cases[0], cases[-1]):
        jax.eval_shape(case.fun, *case.args)
    for case in cases:
        assert case.work.operations > 0 and case.work.bytes > 0 and (case.units in (2, 4) or workload.unit == "event")


def test_peers_know_what_they_are_asked_for():
    asked = {
        name: importlib.import_module(f"bench.workloads.{name}").WORKLOAD.peers is not None
        for name in get_args(program.Name)
    }
    assert {name for name, has_peers in asked.items() if has_peers} == {"mlp", "cnn", "femnist", "maml_mlp", "maml_cnn"}


def test_growing_cohorts_need_no_more_memory_beside_data_and_results():
    temporaries = []
    for count in (1_000, 2_000):
        case = scale.WORKLOAD.layouts(count, jnp.float32)[0]
        assert case.layout == "streamed, chunks of 100"
        temporaries.append(jax.jit(case.fun).lower(*case.args).compile().memory_analysis().temp_size_in_bytes)
    assert temporaries[1] - temporaries[0] <= 1_000 * 16  # the clients' keys
