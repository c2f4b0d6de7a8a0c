"""DrJAX: broadcast, map over clients, reduce, under one jit."""

import drjax
import jax
import numpy as np

from bench.peers.task import Program, Task

PACKAGES = ("drjax", "jax", "jaxlib")

Params = dict[str, jax.Array]


def loss(model: str, params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross-entropy of one batch."""
    if model != "mlp":
        x = pool(jax.nn.relu(convolve(x, params["k1"]) + params["c1"]))
        x = pool(jax.nn.relu(convolve(x, params["k2"]) + params["c2"]))
        x = x.reshape(x.shape[0], -1)
    if model == "cnn":
        logits = x @ params["w"] + params["b"]
    else:
        logits = jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
    return -jax.numpy.mean(jax.numpy.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1))


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def pool(x: jax.Array) -> jax.Array:
    return jax.lax.reduce_window(x, -jax.numpy.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def prepare(task: Task) -> Program:
    def step(params: Params, x: jax.Array, y: jax.Array) -> Params:
        grads = jax.grad(loss, argnums=1)(task.model, params, x, y)
        return jax.tree.map(lambda value, grad: value - task.learning_rate * grad, params, grads)

    def fedavg(start: Params, x: jax.Array, y: jax.Array) -> Params:
        params, _ = jax.lax.scan(lambda params, batch: (step(params, *batch), None), start, (x, y))
        return jax.tree.map(jax.numpy.subtract, params, start)

    def adapted_loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        return loss(task.model, step(params, x[0], y[0]), x[1], y[1])

    one = fedavg if task.kind == "fedavg" else jax.grad(adapted_loss)

    @jax.jit
    @drjax.program(clients=task.num_clients)
    def round_of(params: Params, x: jax.Array, y: jax.Array) -> Params:
        mean = drjax.reduce_mean(drjax.map_fn(one, (drjax.broadcast(params), x, y)))
        return jax.tree.map(jax.numpy.add, params, mean) if task.kind == "fedavg" else mean

    arguments = jax.device_put((task.params, task.x, task.y))
    return Program(
        run=lambda: jax.block_until_ready(round_of(*arguments)),
        to_numpy=lambda params: {name: np.asarray(value) for name, value in params.items()},
        settings={},
    )
