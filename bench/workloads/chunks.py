"""How many clients to map at once: FedAvg on small and large models in more chunk sizes, and what `"auto"` takes."""

from collections.abc import Sequence
from typing import Any

import cedarjax as cj
from bench.federated import one_case
from bench.layouts import layouts
from bench.measure import Case, Workload
from bench.models import NETWORKS

MODELS = ("tiny", "small", "medium", "mlp", "cnn")
CHUNK_SIZES: tuple[cj.core.ChunkSize, ...] = (1, 2, 4, 10, 32, None, "auto")


def cases(num_clients: int, dtype: Any) -> Sequence[Case]:
    """Every model in every layout; the model is the part."""
    chosen = layouts(num_clients, chunk_sizes=CHUNK_SIZES, streamed=(False,), representations=("dense",))
    return [
        one_case("fedavg", name, layout, num_clients, dtype)._replace(part=NETWORKS[name].title)
        for name in MODELS
        for layout in chosen
    ]


WORKLOAD = Workload(
    title="FedAvg, 2 steps a client, batches of 10, collected: models by chunk size",
    unit="client-step",
    num_clients=(100,),
    layouts=cases,
)
