"""The rounds are the algorithms that they claim to be, step by step as peers are told, against formulas written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import federated, models
from bench.layouts import Layout, layouts

PARAMS = {"mlp": 101_770, "cnn": 20_490, "femnist": 1_663_370}


def network_outputs(name, params, x):
    """The model written out, by the names that peers know."""
    if name == "mlp":
        return jax.nn.relu(x @ params["w1"] + params["b1"][None]) @ params["w2"] + params["b2"][None]
    for kernel, bias in (("k1", "c1"), ("k2", "c2")):
        x = jax.lax.conv_general_dilated(x, params[kernel], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + params[bias][None, None, None])
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = x.reshape(len(x), -1)
    if name == "cnn":
        return x @ params["w"] + params["b"][None]
    return jax.nn.relu(x @ params["w1"] + params["b1"][None]) @ params["w2"] + params["b2"][None]


def network_loss(name, params, x, y):
    chosen = jax.nn.log_softmax(network_outputs(name, params, x))[jnp.arange(len(y)), y]
    return -chosen.mean()


def descend(name, params, x, y, lr):
    grads = jax.grad(lambda p: network_loss(name, p, x, y))(params)
    return jax.tree.map(lambda p, g: p - lr * g, params, grads)


class Task:
    """Stands in for `bench.peers.Task`."""

    def __init__(self, **fields):
        vars(self).update(fields)


@pytest.fixture
def task_of(monkeypatch):
    """`task_of(kind, name, num_clients)`, whether or not the peers are there."""
    import bench

    monkeypatch.setattr(bench, "peers", type("Peers", (), {"Task": Task}), raising=False)
    return federated.peer_task


def expected(kind, task):
    """The round of a task, one client after the other."""
    results = []
    for x, y in zip(task.x, task.y, strict=True):
        if kind == "fedavg":
            params = task.params
            for batch in zip(x, y, strict=True):
                params = descend(task.model, params, *batch, task.learning_rate)
            results.append(params)
        else:
            support, query = zip(x, y, strict=True)

            def adapted_loss(params, support=support, query=query):
                return network_loss(task.model, descend(task.model, params, *support, task.learning_rate), *query)

            results.append(jax.grad(adapted_loss)(task.params))
    return {name: np.mean([np.float64(result[name]) for result in results], axis=0) for name in task.params}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [("fedavg", "mlp"), ("fedavg", "cnn"), ("maml", "mlp"), ("maml", "cnn")])
def test_a_round_is_what_peers_are_told_to_do(task_of, kind, name):
    task = task_of(kind, name, 3)
    case = federated.one_case(kind, name, Layout(None), 3, jnp.float32)
    found = federated.answer(kind, name, 3, jax.jit(case.fun)(*case.args))
    wanted = expected(kind, task)
    start = task.params if kind == "fedavg" else {leaf: np.zeros_like(value) for leaf, value in task.params.items()}
    assert found.keys() == wanted.keys() == task.params.keys()
    for leaf in wanted:
        change = np.abs(wanted[leaf] - start[leaf]).max()
        assert change > 0
        np.testing.assert_allclose(found[leaf], wanted[leaf], rtol=0, atol=1e-4 * change)


def test_a_task_holds_every_example_once(task_of):
    case = federated.problem("mlp", 4, jnp.float32)
    examples = np.asarray(case.cohort.data.examples["x"])
    fedavg, maml = task_of("fedavg", "mlp", 4), task_of("maml", "mlp", 4)
    assert fedavg.x.shape == maml.x.shape == (4, 2, 10, 784)
    assert fedavg.y.shape == (4, 2, 10) and fedavg.y.dtype == np.int32 and fedavg.x.dtype == np.float32
    np.testing.assert_array_equal(maml.x.reshape(4, 20, 784), examples)  # support, then query
    rows = federated.batches_read(case)
    np.testing.assert_array_equal(np.sort(rows.reshape(4, 20)), np.broadcast_to(np.arange(20), (4, 20)))
    assert len({tuple(row) for row in rows.reshape(4, 20)}) == 4  # each client in an order of its own
    np.testing.assert_array_equal(fedavg.x[2, 1, 3], examples[2, rows[2, 1, 3]])


@pytest.mark.parametrize("name", PARAMS)
def test_models_have_the_size_and_the_names_that_they_claim(name):
    network = models.NETWORKS[name]
    params = jax.eval_shape(network.model.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == network.num_params == PARAMS[name]
    assert len(network.names) == len(jax.tree.leaves(params))


def test_the_small_models_match_what_they_cost():
    for name in ("tiny", "deep"):
        network = models.NETWORKS[name]
        params = jax.eval_shape(network.model.init, jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == network.num_params


def test_the_work_of_a_round():
    network = models.NETWORKS["mlp"]
    first, second = 2 * 784 * 128, 2 * 128 * 10
    work = federated.round_work("fedavg", network, 5, jnp.bfloat16)
    assert work.operations == 5 * 2 * 10 * (2 * first + 3 * second)
    assert work.bytes == 5 * 20 * (784 * 2 + 4) + 2 * 2 * 101_770


@pytest.mark.standard_promotion
def test_rounds_keep_the_dtype():
    for layout in (Layout(1), Layout(2, streamed=True)):
        case = federated.one_case("fedavg", "tiny", layout, 3, jnp.bfloat16)
        assert case.args[1].data.examples["x"].dtype == jnp.bfloat16 and case.units == 6
        state, _, _ = jax.eval_shape(case.fun, *case.args)
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}


def test_layouts_have_names():
    found = layouts(20, chunk_sizes=(1, 4, None), representations=("dense",))
    mesh = f"mesh of {len(jax.devices())}"
    names = [layout.name for layout in found]
    assert names[:5] == ["loop", "chunks of 4", "vmap", "streamed, loop", "streamed, chunks of 4"]
    assert names[5:] == [f"{mesh}, loop", f"{mesh}, vmap", f"{mesh}, streamed, loop"]  # 3 clients a device
    assert [layout.num_devices for layout in found] == [1] * 5 + [len(jax.devices())] * 3


def test_factors_are_for_clients_side_by_side():
    names = [layout.name for layout in layouts(20, chunk_sizes=(1, 10, "auto", None), representations=("auto",))]
    assert names[:4] == [
        "low rank, chunks of 10",
        "low rank, auto chunks",
        "streamed, low rank, chunks of 10",
        "streamed, low rank, auto chunks",
    ]


def test_a_streamed_round_on_a_mesh_is_the_round():
    results = []
    for layout in (Layout(1), layouts(9, chunk_sizes=(1,), representations=("dense",))[-1]):
        case = federated.one_case("fedavg", "tiny", layout, 9, jnp.float32)
        results.append(federated.answer("fedavg", "tiny", 9, jax.jit(case.fun)(*case.args)))
    assert layout.streamed and layout.mesh is not None
    for leaf, value in results[0].items():
        np.testing.assert_allclose(value, results[1][leaf], rtol=0, atol=1e-6)


def test_chunks_hold_no_more_than_all_clients():
    assert [layout.name for layout in layouts(3, chunk_sizes=(4,))][:2] == ["vmap", "streamed, chunks of 3"]
    assert [layout.name for layout in layouts(5, chunk_sizes=(4,))][:2] == ["chunks of 4", "streamed, chunks of 4"]


def test_forms_of_the_weights_are_layouts_of_their_own():
    names = [layout.name for layout in layouts(3, streamed=(False,), representations=("dense", "lowrank"))]
    assert names[:4] == ["loop", "auto chunks", "vmap", "low rank, auto chunks"]
