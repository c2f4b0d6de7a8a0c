"""What is told of a function's memory, against sums by hand and against what XLA says of the compiled program."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import cedarjax as cj
from cedarjax import nn
from cedarjax.core import memory_estimate

SIDE = 100
MATRIX = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32)
SIZE = 4 * SIDE * SIDE
NUM_CLIENTS = 48
TOLERANCE = 0.2 if jax.__version_info__ >= (0, 10) else 0.3  # the model follows the newer compiler


def zeros(*shape):
    return jnp.zeros(shape, jnp.float32)


def compiled_bytes(fun, *args):
    told = jax.jit(fun).lower(*args).compile().memory_analysis()
    return told.argument_size_in_bytes + told.output_size_in_bytes + told.temp_size_in_bytes - told.alias_size_in_bytes


def temporaries(fun, *args):
    return memory_estimate(fun, *args).temporaries


def test_arguments_and_results_are_counted_one_by_one():
    tree = {"a": jax.ShapeDtypeStruct((3, 5), jnp.float32), "b": jax.ShapeDtypeStruct((7,), jnp.bfloat16)}
    told = memory_estimate(lambda x, i: (x["a"] + 1, x["b"], i), tree, jax.ShapeDtypeStruct((), jnp.int8))
    assert told.arguments == told.results == 4 * 15 + 2 * 7 + 1
    assert told.total == told.arguments + told.results + told.temporaries
    assert told.temporaries == 0


def test_arguments_that_are_not_read_are_not_counted():
    told = memory_estimate(lambda x, y: (x + 1, (y @ y).shape[0]), MATRIX, MATRIX)
    assert told.arguments == SIZE
    assert told.temporaries == 0


def test_arrays_numbers_and_jitted_functions_are_taken():
    array = zeros(SIDE, SIDE)
    expected = memory_estimate(lambda x: x @ x * 2, MATRIX)
    assert memory_estimate(jax.jit(lambda x: x @ x * 2), array) == expected
    assert memory_estimate(lambda x, y: x * y, 2.0, 3.0).arguments == 2 * jnp.result_type(2.0).itemsize


def test_keys_are_counted_by_their_data():
    assert (
        memory_estimate(lambda key: key, jax.random.key(0)).arguments == jax.random.key_data(jax.random.key(0)).nbytes
    )


ON_ONE_MATRIX = {
    "a chain of elementwise operations is computed in the result": (lambda x: jnp.tanh(x * 2 + 1) - x, 0),
    "a product is written to the result": (lambda x: x @ x, 0),
    "between two products lies a matrix": (lambda x: (x @ x) @ x, 1),
    "in a chain of products two are held, one of them the result": (lambda x: ((x @ x) @ x) @ x, 1),
    "what comes after a product is written over it": (lambda x: jnp.exp(x @ x) @ x, 1),
    "a product that is read again is held": (lambda x: (lambda y: (y @ x) * y)(x @ x), 1),
    "a reshape of what is stored is free": (lambda x: (x @ x).reshape(-1)[::SIDE], 1),
    "a transpose beside a product is free": (lambda x: (x @ x).T @ x.T, 1),
    "the same on both sides of a choice is no choice": (lambda x: jnp.where(x[0, 0] > 0, x, x), 0),
    "a broadcast that a product reads is stored": (lambda x: jnp.broadcast_to(x[0], x.shape) @ x, 1),
    "a sum is not as large as what it sums": (lambda x: x.sum(axis=0), 0),
    "what two sums read is stored": (lambda x: (lambda y: (y.sum(0), y.sum(1)))(x * 2), 1),
    "a cost is paid once": (lambda x: (lambda y: (y[:-1] * 2, y[1:] * 3))(jnp.exp(x)), 1),
    "pieces of a row are stored before they are joined": (lambda x: jnp.concatenate([x * 2, x * 3], axis=1), 2),
    "a scan holds its carry": (lambda x: jax.lax.scan(lambda c, _: (c * 2, None), x, None, length=3)[0].sum(), 1),
    "a turn holds what it computes": (lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=3)[0], 1),
    "a stack is held whole": (lambda x: jax.lax.scan(lambda c, _: (c @ x, c), x, None, length=3)[1].sum(), 5),
    "a stack is written in the result": (lambda x: jax.lax.scan(lambda c, _: (c @ x, c), x, None, length=3)[1], 2),
    "a scan of one turn is no loop": (lambda x: jax.lax.scan(lambda c, _: (c * 2, c), x, None, length=1)[0], 0),
    "a row is changed in place": (
        lambda x: jax.lax.fori_loop(0, 3, lambda i, c: jax.lax.dynamic_update_index_in_dim(c, c[0] * 2, i, 0), x), 0
    ),
    "an old carry that others read is copied": (
        lambda x: jax.lax.fori_loop(0, 3, lambda i, c: (c[0] * 2, c[0] @ x), (x, x))[1].sum(), 3
    ),
    "a conditional holds its larger branch": (
        lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: (y @ y) @ y, lambda y: y + 1, x), 1
    ),
    "recomputation is followed": (jax.grad(lambda x: jax.checkpoint(lambda y: jnp.sin(y @ x))(x).sum()), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_ONE_MATRIX)
def test_matrices_held_at_the_worst_moment(name):
    fun, count = ON_ONE_MATRIX[name]
    assert temporaries(fun, MATRIX) == pytest.approx(count * SIZE, abs=5 * 4 * SIDE)  # and a few rows


@pytest.mark.parametrize("name", ON_ONE_MATRIX)
def test_xla_agrees_on_one_matrix(name):
    fun, _ = ON_ONE_MATRIX[name]
    assert memory_estimate(fun, MATRIX).total == pytest.approx(compiled_bytes(fun, MATRIX), abs=SIZE // 4)


class ConvNet(nnx.Module):
    """Two convolutions, each with pooling, and one linear map."""

    def __init__(self, rngs):
        make = functools.partial(nnx.Conv, kernel_size=(3, 3), conv_general_dilated=nn.conv_general_dilated, rngs=rngs)
        self.conv1, self.conv2 = make(1, 8), make(8, 16)
        self.dense = nnx.Linear(4 * 4 * 16, 10, rngs=rngs)

    def __call__(self, x):
        for conv in (self.conv1, self.conv2):
            x = nn.max_pool(nnx.relu(conv(x)), (2, 2))
        return self.dense(x.reshape(x.shape[0], -1))


MODELS = {
    "mlp": (lambda rngs: nn.MLP(SIDE, (64,), 10, rngs=rngs), (SIDE,)),
    "cnn": (ConvNet, (16, 16, 1)),
}
LOCAL = {
    "sgd": lambda loss_fn: cj.local.sgd(loss_fn, optax.sgd(0.05), batch_size=10),
    "adam": lambda loss_fn: cj.local.sgd(loss_fn, optax.adam(1e-3), batch_size=10),
    "maml": lambda loss_fn: cj.meta.maml(loss_fn, optax.sgd(0.05), 1, batch_size=10, query_batch_size=10),
    "lowrank": lambda loss_fn: cj.local.sgd(loss_fn, optax.sgd(0.05), batch_size=10, representation="lowrank"),
}
SERVER = optax.chain(cj.robust.mean(), optax.sgd(1.0))
LAYOUTS = {
    "vmap": lambda local: cj.federated_round(local, SERVER),
    "chunks": lambda local: cj.federated_round(local, SERVER, cj.cohort_map(12)),
    "loop": lambda local: cj.federated_round(local, SERVER, cj.cohort_map(1)),
    "streamed chunks": lambda local: cj.streamed_round(local, optax.sgd(1.0), chunk_size=12),
    "streamed loop": lambda local: cj.streamed_round(local, optax.sgd(1.0)),
}


def round_of(model, kind, layout, mesh=None):
    """A round, and the shapes of its arguments."""
    make, input_shape = MODELS[model]
    network = nn.functional(make)
    local = LOCAL[kind](nn.cross_entropy(network.apply))
    algorithm = LAYOUTS[layout](local) if mesh is None else cj.federated_round(local, SERVER, cj.cohort_map(mesh=mesh))

    def make_args():
        rows = (NUM_CLIENTS, 20)
        examples = {"x": zeros(*rows, *input_shape), "y": jnp.zeros(rows, jnp.int32)}
        count = jnp.full(NUM_CLIENTS, 20, jnp.int32)
        data = cj.ClientData(examples, count, count // 2)
        cohort = cj.Cohort(data, jnp.ones(NUM_CLIENTS, jnp.float32), jnp.arange(NUM_CLIENTS, dtype=jnp.int32))
        return algorithm.init(network.init(jax.random.key(0))), cohort, jax.random.key(0)

    return algorithm.step, jax.eval_shape(make_args)


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    ("model", "kind", "layout"),
    [
        ("mlp", "sgd", "vmap"),
        ("mlp", "sgd", "chunks"),
        ("mlp", "sgd", "streamed loop"),
        ("mlp", "adam", "vmap"),
        ("mlp", "adam", "streamed loop"),
        ("mlp", "maml", "streamed chunks"),
        ("mlp", "lowrank", "vmap"),
        ("cnn", "sgd", "vmap"),
        ("cnn", "adam", "streamed chunks"),
        ("cnn", "maml", "chunks"),
    ],
)
def test_rounds_take_what_xla_says_they_take(model, kind, layout):
    step, args = round_of(model, kind, layout)
    told = memory_estimate(step, *args)
    assert told.total == pytest.approx(compiled_bytes(step, *args), rel=TOLERANCE)


def test_on_a_mesh_sizes_are_those_of_one_device(mesh):
    step, args = round_of("mlp", "sgd", "vmap", mesh)
    state, cohort, key = args
    placed = (on_mesh(mesh, P(), state), on_mesh(mesh, P("clients"), cohort), on_mesh(mesh, P(), key))
    told = memory_estimate(step, *placed)
    assert told.total == pytest.approx(compiled_bytes(step, *placed), rel=TOLERANCE)


def on_mesh(mesh, spec, tree):
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def test_a_vmapped_client_is_told_apart_from_its_round():
    network = nn.functional(MODELS["mlp"][0])
    local = LOCAL["sgd"](nn.cross_entropy(network.apply))
    _, (state, cohort, _) = round_of("mlp", "sgd", "vmap")
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), NUM_CLIENTS))
    told = memory_estimate(jax.vmap(local.update, (None, 0, 0, 0)), state.params, (), cohort.data, keys)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert told.results == NUM_CLIENTS * (4 * num_params + 4 + 4)  # updates, losses and numbers of steps


def test_sizes_that_no_machine_has_are_told():
    clients = 10**9
    weights = jax.ShapeDtypeStruct((clients, SIDE, SIDE), jnp.float32)
    told = memory_estimate(lambda w: jnp.einsum("cij,cjk->cik", w, w), weights)
    assert told == (clients * SIZE, clients * SIZE, 0)


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"fun must be callable, got 3\."):
        memory_estimate(3, MATRIX)


@pytest.mark.parametrize(
    ("arg", "where"),
    [("adam", r"'adam'\."), ({"x": MATRIX, "name": "mlp"}, r"'mlp' at 'name'\."), ([MATRIX, object], "at '1'")],
)
def test_arguments_that_are_no_arrays_are_named(arg, where):
    with pytest.raises(TypeError, match=rf"args\[1\] must hold arrays or jax.ShapeDtypeStruct, got .*{where}"):
        memory_estimate(lambda x, y: x, MATRIX, arg)
