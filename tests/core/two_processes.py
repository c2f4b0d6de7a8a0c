"""One process of several that run the same rounds together; what `test_distributed` starts.

Every process holds some of the devices and some of the clients. Run as `two_processes.py ADDRESS PROCESS COUNT FILE`.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cedarjax as cj

NUM_CLIENTS, ROUNDS = 8, 2


def loss_fn(params, batch, key):
    scale = 1 + 0.1 * jax.random.uniform(key)
    return jnp.mean((scale * jnp.tanh(batch["x"] @ params["w"]) - batch["y"]) ** 2)


def make_cohort() -> cj.Cohort:
    """Plain numpy, the same in every process; one client is absent and holds NaN."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(NUM_CLIENTS, 5, 3)).astype(np.float32), rng.normal(size=(NUM_CLIENTS, 5)).astype(np.float32)
    x[2] = np.nan
    counts = np.array([5, 3, 4, 1, 2, 5, 4, 3], np.int32)
    weights = np.where(np.arange(NUM_CLIENTS) == 2, 0, counts).astype(np.float32)
    data = cj.ClientData({"x": x, "y": y}, counts, counts // 2)
    return cj.Cohort(data, weights, np.arange(NUM_CLIENTS, dtype=np.int32))


def algorithms(mesh: jax.sharding.Mesh | None) -> dict[str, cj.FederatedAlgorithm]:
    local = cj.local.sgd(loss_fn, optax.sgd(0.3), batch_size=2)
    server = optax.sgd(1.0, momentum=0.9)
    return {
        "collected": cj.federated_round(local, optax.chain(cj.robust.mean(), server), cj.cohort_map(mesh=mesh)),
        "streamed": cj.streamed_round(local, server, mesh=mesh),
    }


def run(algorithm: cj.FederatedAlgorithm, cohort: cj.Cohort, **jit_options: object) -> jax.Array:
    """Parameters after the rounds."""

    def rounds(cohort: cj.Cohort) -> jax.Array:
        state = algorithm.init({"w": jnp.array([0.5, -1.0, 0.2])})
        for r in range(ROUNDS):
            state, _, _ = algorithm.step(state, cohort, jax.random.key(r))
        return state.params["w"]

    return jax.jit(rounds, **jit_options)(cohort)


def main(address: str, process: str, count: str, file: str) -> None:
    """Joins the others, runs the rounds over the devices of all, and writes the parameters."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(count), int(process), initialization_timeout=60)
    assert len(jax.devices()) == 2 * int(count) and len(jax.local_devices()) == 2
    mesh = jax.make_mesh((len(jax.devices()),), ("clients",), axis_types=(AxisType.Auto,))
    clients, everywhere = NamedSharding(mesh, P("clients")), NamedSharding(mesh, P())
    cohort = jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, clients, lambda i: x[i]), make_cohort())
    results = {}
    for name, algorithm in algorithms(mesh).items():
        results[name] = np.asarray(run(algorithm, cohort, out_shardings=everywhere))
    np.savez(file, **results)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
