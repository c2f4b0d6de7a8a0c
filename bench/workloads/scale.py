"""More and more clients in chunks of one size: the memory beside data and results is to stay what it is."""

import functools

from bench.federated import workload
from bench.layouts import layouts

WORKLOAD = workload(
    "fedavg",
    "tiny",
    num_clients=(1_000, 10_000, 100_000),
    layouts=functools.partial(layouts, chunk_sizes=(100,), streamed=(True,)),
    has_peers=False,
)
