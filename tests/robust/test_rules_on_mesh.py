"""Rules where the client axis lies on devices, and what they hold in memory: read from the compiled program."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cedarjax import robust

NUM_CLIENTS, SHAPES = 8, {"a": (31, 20), "b": (50,)}
SIZE = 31 * 20 + 50
OPERATION = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


@pytest.fixture(autouse=True)
def fast_compilation(request):
    """Most of the time here is XLA's; memory is that of what a user would run."""
    jax.config.update("jax_disable_most_optimizations", "copy" not in request.node.name)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def rolled_loops(monkeypatch):
    """One row a pass of the loops over rows: the same numbers, and a fraction of the program."""
    monkeypatch.setattr("cedarjax.robust.quantiles._UNROLLED", 1)


def make_updates(seed=0):
    """Row 2 is absent and holds NaN, row 5 one Inf, row 6 lies far out."""
    rng = np.random.default_rng(seed)
    updates = {k: (3 + rng.normal(size=(NUM_CLIENTS, *shape))).astype(np.float32) for k, shape in SHAPES.items()}
    for x in updates.values():
        x[2], x[6] = np.nan, 1e4 * x[6]
    updates["a"][5, 3, 3] = np.inf
    return updates


WEIGHTS = np.array([1, 2, 0, 1, 3, 1, 1, 1], np.float32)
SERVER = {k: np.linspace(0, 1, math.prod(s), dtype=np.float32).reshape(s) for k, s in SHAPES.items()}
RULES = {
    "krum": robust.krum(1),
    "trimmed_mean": robust.trimmed_mean(2),
    "median": robust.median(),
    "meamed": robust.meamed(1),
    "bulyan": robust.bulyan(0),
    "rlr": robust.rlr(2),
    "geometric_median": robust.geometric_median(num_iters=5),
    "cge": robust.cge(1),
    "centered_clipping": robust.centered_clipping(9.0),
    "centered_clipping_twice": robust.centered_clipping(9.0, 2),
    "fltrust": robust.fltrust(SERVER),
    "foolsgold": robust.foolsgold(),
    "nnm_krum": robust.nnm(2, robust.krum(1)),
    "nnm_trimmed_mean": robust.nnm(2, robust.trimmed_mean(2)),
    "bucketing_median": robust.bucketing(2, robust.median()),
    "arc_meamed": robust.arc(1, robust.meamed(1)),
}


def collectives(program):
    """Pairs of an operation and the number of elements that it returns."""
    for shapes, name in OPERATION.findall(program):
        yield name, sum(math.prod(map(int, filter(None, d.split(",")))) for d in re.findall(r"\w+\[([\d,]*)\]", shapes))


@pytest.mark.parametrize("name", RULES)
def test_the_same_on_a_mesh_and_no_device_gathers_all_updates(name, mesh):
    rule, updates, key = RULES[name], make_updates(), jax.random.key(0)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape[1:]), updates)

    def run(updates, weights, mesh=None):
        out, state = rule.update(updates, rule.init(params), params, weights=weights, key=key, mesh=mesh)
        return out, state.info

    want, told = jax.jit(run)(updates, WEIGHTS)
    placed = jax.device_put((updates, jnp.asarray(WEIGHTS)), NamedSharding(mesh, P(mesh.axis_names)))
    program = jax.jit(lambda u, w: run(u, w, mesh)).lower(*placed).compile()
    got, told_there = program(*placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), got, want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), told_there, told)
    for operation, size in collectives(program.as_text()):
        # Columns are exchanged for rows, C D / n numbers each way; a leaf is filled up to a multiple of the devices.
        share = NUM_CLIENTS * (SIZE + 2 * mesh.size) // mesh.size
        assert size <= share, (operation, size)
        assert operation != "all-gather" or size <= SIZE + 2 * mesh.size, (operation, size)


@pytest.mark.parametrize("name", ["krum", "median", "trimmed_mean", "nnm_trimmed_mean"])
def test_no_second_copy_of_the_updates(name):
    """Temporary memory at 50 clients is a fraction of theirs."""
    count, size = 50, 200_000
    rule = RULES[name]
    updates = {
        "a": jax.ShapeDtypeStruct((count, size // 2), jnp.float32),
        "b": jax.ShapeDtypeStruct((count, 5, size // 10), jnp.float32),
    }

    def run(updates, weights):
        out, state = rule.update(updates, rule.init(None), weights=weights)
        return out, state.info

    memory = jax.jit(run).lower(updates, jax.ShapeDtypeStruct((count,), jnp.float32)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.2 * 4 * count * size
