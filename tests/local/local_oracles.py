"""A small federation of linear regressions, and rounds over it with partial participation, beside float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import cedarjax as cj
from cedarjax import testing
from cedarjax.core import batch_indices, shuffled_epochs

LENGTH = 6
COUNTS = (6, 4, 1, 5)
NUM_CLIENTS = len(COUNTS)
COHORTS = ((0, 2), (3, 1), (2, 0), (1, 3), (0, 3))
"""Two of four clients a round; each of them comes at least twice."""
PARTICIPATION = 2 / 4


def loss_fn(w, batch, key):
    return 0.5 * jnp.mean((batch["x"] @ w["w"] + w["b"] - batch["y"]) ** 2)


def gradient(w, x, y, rows):
    """Gradient of `loss_fn` at `w [4]`, whose last number is the bias."""
    design = np.column_stack([x[rows], np.ones(len(rows))])
    return design.T @ (design @ w - y[rows]) / len(rows)


@functools.cache
def federation():
    """Clients stacked, whose padding is NaN, and their rows in float64."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(NUM_CLIENTS, LENGTH, 3)), rng.normal(size=(NUM_CLIENTS, LENGTH))
    for i, count in enumerate(COUNTS):
        x[i, count:], y[i, count:] = np.nan, np.nan
    counts = jnp.asarray(COUNTS, jnp.int32)
    examples = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    return cj.ClientData(examples, counts, counts // 2), x, y


def start():
    w = np.random.default_rng(9).normal(size=4)
    return {"w": jnp.asarray(w[:3], jnp.float32), "b": jnp.float32(w[3])}, w


def flat(params):
    return np.concatenate([np.asarray(params["w"], np.float64), np.asarray(params["b"], np.float64)[None]])


def cohort_of(data, ids, states, weights=None):
    ids = jnp.asarray(ids, jnp.int32)
    weights = jnp.ones(len(ids)) if weights is None else jnp.asarray(weights, jnp.float32)
    return cj.Cohort(jax.tree.map(lambda x: x[ids], data), weights, ids, jax.tree.map(lambda x: x[ids], states))


def rounds(local, server_tx, *, weighted=False, map_fn=None):
    """Runs `COHORTS`; yields the round's index, its clients and their weights, what is shared, and all states."""
    data, _, _ = federation()
    params, _ = start()
    algorithm = cj.federated_round(local, server_tx, map_fn)
    step = jax.jit(algorithm.step)
    state = algorithm.init(params)
    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (NUM_CLIENTS, *jnp.shape(x))), algorithm.init_client(params))
    for r, ids in enumerate(COHORTS):
        weights = np.asarray([COUNTS[i] if weighted else 1 for i in ids], np.float64)
        cohort = cohort_of(data, ids, states, weights)
        state, new, info = step(state, cohort, round_key(r))
        index = jnp.asarray(ids, jnp.int32)
        states = jax.tree.map(lambda old, x, index=index: old.at[index].set(x), states, new)
        yield r, ids, weights, state.params, states, info


def round_key(r):
    return jax.random.fold_in(jax.random.key(3), r)


def client_key(r, client):
    """What `federated_round` gives a client."""
    return jax.random.fold_in(jax.random.split(round_key(r))[0], client)


def rows_of(key, count, batch_size, num_epochs, num_steps=None):
    """Rows of each step of `core.train_epochs`; the stream has an oracle of its own in the tests of core."""
    order_key = jax.random.split(key, 3)[0]
    stream = shuffled_epochs(order_key, jnp.int32(0), jnp.int32(count), length=LENGTH, num_epochs=num_epochs)
    steps = -(-count * num_epochs // batch_size) if num_steps is None else num_steps
    return [np.asarray(batch_indices(stream, jnp.int32(i), batch_size)) for i in range(steps)]


def half(data, key):
    """Stragglers: one client of the four manages no step at all."""
    return data.num_examples // 2


def two_quadratics(local_fn, server_tx, num_rounds=60):
    """Where rounds end for two clients `a_i (w - b_i)^2 / 2`, whose mean is smallest at 4 (`local_fn(loss_fn)`)."""

    def quadratic(w, batch, key):
        return 0.5 * jnp.mean(batch["a"] * (w - batch["b"]) ** 2)

    one = jnp.ones(2, jnp.int32)
    data = cj.ClientData({"a": jnp.array([[1.0], [4.0]]), "b": jnp.array([[0.0], [5.0]])}, one, one)
    local = local_fn(quadratic)
    algorithm = cj.federated_round(local, server_tx)
    state = algorithm.init(jnp.float32(0.0))
    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, *jnp.shape(x))), algorithm.init_client(jnp.float32(0.0)))

    def step(carry, key):
        state, states, _ = algorithm.step(carry[0], cohort_of(data, [0, 1], carry[1]), key)
        return (state, states), None

    keys = jax.random.split(jax.random.key(0), num_rounds)
    (state, states), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((state, states))
    return float(local.model(state.params, jax.tree.map(lambda x: x[0], states)))


def check_laws(local, **options):
    """All laws, on clients of unequal sizes; most of the time is XLA's, so it is told not to optimise."""
    data, _, _ = federation()
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        testing.check_local_update(local, start()[0], data, dtypes=(jnp.bfloat16, jnp.float64), **options)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
