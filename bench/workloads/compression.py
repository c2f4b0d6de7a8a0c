"""FedAvg on the MLP 784-128-10 with compressed uploads, and without.

The round of `mlp`, as it is and with each compressor on the path, with a memory of what was lost and without. Nothing
is packed, as in any simulation: the server reads the numbers that would arrive, and the bits are counted. The client
states of error feedback, as large as the model, are read and written in every round.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import cedarjax as cj
from bench import floor
from bench.federated import local_update, problem, round_work
from bench.layouts import Layout
from bench.measure import Case, Workload
from bench.models import NETWORKS
from cedarjax import compress

NAME = "mlp"
PLAIN = "plain"
MOST_VMAPPED = 100  # updates and errors of more clients at once need gigabytes
COMPRESSORS: dict[str, Callable[[], compress.Compressor]] = {
    "uniform, 8 bits": lambda: compress.uniform_quantize(8),
    "uniform, 4 bits": lambda: compress.uniform_quantize(4),
    "uniform, 4 bits, chunks of 1024": lambda: compress.uniform_quantize(4, chunk_size=1024),
    "qsgd, 7 levels": lambda: compress.qsgd(7),
    "terngrad": lambda: compress.terngrad(),
    "sign": lambda: compress.sign(),
    "top 1 %": lambda: compress.top_k(0.01),
    "sampled top 1 %": lambda: compress.sampled_top_k(0.01),
    "top 10 %": lambda: compress.top_k(0.1),
    "sampled top 10 %": lambda: compress.sampled_top_k(0.1),
}
REMEMBERED = ("sign", "uniform, 4 bits", "top 1 %", "sampled top 1 %")


def _wrapped(wrap: Callable[..., cj.LocalUpdate], name: str) -> Callable[[cj.LocalUpdate], cj.LocalUpdate]:
    return lambda local: wrap(local, COMPRESSORS[name]())


PARTS: dict[str, Callable[[cj.LocalUpdate], cj.LocalUpdate]] = {
    PLAIN: lambda local: local,
    **{name: _wrapped(compress.with_compression, name) for name in COMPRESSORS},
    **{f"{name}, error feedback": _wrapped(compress.with_error_feedback, name) for name in REMEMBERED},
}


def layouts(num_clients: int) -> list[Layout]:
    """Collected and streamed, on one device."""
    found = [Layout(1), Layout(10), Layout(1, streamed=True), Layout(10, streamed=True)]
    return [*found, Layout(None)] if num_clients <= MOST_VMAPPED else found


def work(part: str, num_clients: int, dtype: Any) -> floor.Work:
    """That of the plain round; and errors are read and written."""
    plain = round_work("fedavg", NETWORKS[NAME], num_clients, dtype)
    if not part.endswith("error feedback"):
        return plain
    return plain._replace(bytes=plain.bytes + 2 * num_clients * NETWORKS[NAME].num_params * 4)


@functools.lru_cache(maxsize=8)  # the same arrays for all programs: errors of a thousand clients are 400 MB
def zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Errors of clients that never took part."""
    return jnp.zeros(shape, dtype)


def one_case(part: str, layout: Layout, num_clients: int, dtype: Any) -> Case:
    """One round."""
    case = problem(NAME, num_clients, dtype)
    local = PARTS[part](local_update("fedavg", NETWORKS[NAME]))
    algorithm = layout.mean_round(local)
    blank = jax.eval_shape(local.init, case.params)
    state = jax.tree.map(lambda x: zeros((num_clients, *x.shape), x.dtype), blank)
    cohort = case.cohort._replace(state=state)
    args = (algorithm.init(case.params), cohort, case.key)
    return Case(layout.name, part, algorithm.step, args, num_clients, work(part, num_clients, dtype))


def cases(num_clients: int, dtype: Any) -> list[Case]:
    """Everything, layout by layout."""
    return [one_case(part, layout, num_clients, dtype) for layout in layouts(num_clients) for part in PARTS]


WORKLOAD = Workload(
    title="compression: FedAvg on the MLP 784-128-10 (101,770 parameters), 2 steps of 10 examples a client",
    unit="client",
    num_clients=(100, 1000),
    layouts=cases,
    baseline=PLAIN,
)
