"""Federated averaging with FedJAX: a haiku model, its training loop under the jit backend, its mean of trees.

The last release of FedJAX calls `jax.tree_map`, which JAX has dropped since, so it gets that back. The alternative was
measured: under JAX 0.4.30 the dense model takes a sixth less time, but convolutions take half as long again or more.
"""

from typing import Any

import fedjax
import haiku as hk
import jax
import numpy as np
from fedjax.algorithms.fed_avg import create_train_for_each_client

from bench.peers.task import Program, Task

setattr(jax, "tree_map", jax.tree.map)  # noqa: B010

PACKAGES = ("fedjax", "dm-haiku", "jax", "jaxlib")

PLACES = {
    "mlp": {"w1": "linear/w", "b1": "linear/b", "w2": "linear_1/w", "b2": "linear_1/b"},
    "cnn": {
        **{"k1": "conv2_d/w", "c1": "conv2_d/b", "k2": "conv2_d_1/w", "c2": "conv2_d_1/b"},
        **{"w": "linear/w", "b": "linear/b"},
    },
    "femnist": {
        **{"k1": "conv2_d/w", "c1": "conv2_d/b", "k2": "conv2_d_1/w", "c2": "conv2_d_1/b"},
        **{"w1": "linear/w", "b1": "linear/b", "w2": "linear_1/w", "b2": "linear_1/b"},
    },
}


def network(task: Task) -> Any:
    """The model in haiku."""
    shapes = [value.shape for value in task.params.values()]

    def forward(batch: dict[str, jax.Array]) -> jax.Array:
        x = batch["x"]
        kernels = [shape for shape in shapes if len(shape) == 4]
        for side, _, _, num_out in kernels:
            x = jax.nn.relu(hk.Conv2D(num_out, side)(x))
            x = hk.max_pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        *hidden, (_, num_classes) = [shape for shape in shapes if len(shape) == 2]
        x = hk.Flatten()(x)
        for _, num_out in hidden:
            x = jax.nn.relu(hk.Linear(num_out)(x))
        return hk.Linear(num_classes)(x)

    return fedjax.create_model_from_haiku(
        hk.transform(forward),
        sample_batch={"x": task.x[0, 0], "y": task.y[0, 0]},
        train_loss=lambda batch, logits: fedjax.metrics.unreduced_cross_entropy_loss(batch["y"], logits),
    )


def prepare(task: Task) -> Program:
    fedjax.set_for_each_client_backend("jit")
    train = create_train_for_each_client(
        fedjax.model_grad(network(task)), fedjax.optimizers.sgd(learning_rate=task.learning_rate)
    )
    params: dict[str, dict[str, jax.Array]] = {}
    for name, place in PLACES[task.model].items():
        layer, leaf = place.split("/")
        params.setdefault(layer, {})[leaf] = jax.device_put(task.params[name])
    keys = list(jax.random.split(jax.random.PRNGKey(0), task.num_clients))
    batches = [
        [{"x": x, "y": y} for x, y in zip(client_x, client_y, strict=True)]
        for client_x, client_y in zip(task.x, task.y, strict=True)
    ]
    clients = list(zip(range(task.num_clients), batches, keys, strict=True))

    def run() -> Any:
        mean = fedjax.tree_util.tree_mean((update, 1.0) for _, update in train(params, clients))
        return jax.block_until_ready(jax.tree.map(lambda old, update: old - update, params, mean))

    def to_numpy(result: Any) -> dict[str, np.ndarray]:
        places = {name: place.split("/") for name, place in PLACES[task.model].items()}
        return {name: np.asarray(result[layer][leaf]) for name, (layer, leaf) in places.items()}

    return Program(run, to_numpy, {})
