"""Plain numpy in float64: a small network with its gradient by hand, and a federation of ragged clients.

Every client's number of examples divides the batch size, so that each batch holds all its examples equally often: a
step is a step of gradient descent on the client's mean loss, whatever the order of the examples.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cedarjax as cj

COUNTS = (6, 3, 2, 6, 1)
BATCH = 6
COHORTS = ((0, 2, 3), (4, 1, 2), (2, 0, 4), (1, 3, 2))
"""Who takes part in each round: three of five clients, some again and again and some seldom."""
NUM_INPUTS, NUM_HIDDEN, NUM_CLASSES = 3, 4, 3


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"body": (NUM_INPUTS, NUM_HIDDEN), "norm": (NUM_HIDDEN,), "head": (NUM_HIDDEN,)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def make_clients(seed=1):
    """Examples of each client; `label` is there for prototypes only, and no client holds all classes."""
    rng = np.random.default_rng(seed)
    clients = []
    for i, n in enumerate(COUNTS):
        label = (i + np.arange(n) % 2) % NUM_CLASSES
        clients.append({"x": rng.normal(size=(n, NUM_INPUTS)), "y": rng.normal(size=n), "label": label})
    return clients


def embed_fn(params, batch):
    return jnp.tanh(batch["x"] @ params["body"])


def loss_fn(params, batch, key):
    output = (embed_fn(params, batch) * params["norm"][None]) @ params["head"]
    return 0.5 * jnp.mean((output - batch["y"]) ** 2)


def loss(params, client):
    output = (np.tanh(client["x"] @ params["body"]) * params["norm"]) @ params["head"]
    return 0.5 * np.mean((output - client["y"]) ** 2)


def gradient(params, client):
    """Of the mean loss, by hand."""
    hidden = np.tanh(client["x"] @ params["body"])
    error = ((hidden * params["norm"]) @ params["head"] - client["y"]) / len(client["y"])
    back = np.outer(error, params["head"] * params["norm"]) * (1 - hidden**2)
    at_hidden = hidden.T @ error
    return {"body": client["x"].T @ back, "norm": params["head"] * at_hidden, "head": params["norm"] * at_hidden}


def tree(fun, *trees):
    return {name: fun(*[t[name] for t in trees]) for name in trees[0]}


def num_steps(client, num_epochs):
    return -(-num_epochs * len(client["y"]) // BATCH)


def descend(params, client, rate, steps, *, names=("body", "norm", "head"), extra=None):
    """Gradient descent on the named leaves; `extra(params)` is added to the gradient."""
    for _ in range(steps):
        grads = gradient(params, client)
        if extra is not None:
            grads = tree(np.add, grads, extra(params))
        params = {k: p - rate * grads[k] if k in names else p for k, p in params.items()}
    return params


def average(trees, weights):
    return tree(lambda *x: sum(w * v for w, v in zip(weights, x, strict=True)) / sum(weights), *trees)


def federate(work, shared, states, *, server_rate=1.0, uniform=False, cohorts=COHORTS):
    """Rounds of `work(shared, state, client) -> (shared_after, state)`; leaves the states of absent clients alone."""
    states, clients = list(states), make_clients()
    for cohort in cohorts:
        after, weights = [], []
        for i in cohort:
            mine, states[i] = work(shared, states[i], clients[i])
            after.append(mine)
            weights.append(1 if uniform else COUNTS[i])
        mean = average(after, weights)
        shared = tree(lambda s, m: s + server_rate * (m - s), shared, mean)
    return shared, states


def make_dataset():
    clients = make_clients()
    owner = np.repeat(np.arange(len(COUNTS)), COUNTS)
    examples = {name: np.concatenate([c[name] for c in clients]) for name in clients[0]}
    return cj.data.federated_dataset(jax.tree.map(jnp.asarray, examples), owner)


def as_arrays(params):
    return jax.tree.map(jnp.asarray, params)


def run(local, params, *, server_rate=1.0, server_rule=None, weighting="examples", cohorts=COHORTS, dataset=None):
    """The same rounds by the package: the server's state, the stacked client states, and the infos."""
    dataset = make_dataset() if dataset is None else dataset
    rule = cj.robust.mean() if server_rule is None else server_rule
    algorithm = cj.federated_round(local, optax.chain(rule, optax.sgd(server_rate)))
    start = cj.init_run(algorithm, dataset, as_arrays(params))
    server, states, infos = start.server, start.clients, []
    step = jax.jit(algorithm.step)
    for number, cohort in enumerate(cohorts):
        ids = jnp.asarray(cohort, jnp.int32)
        taken = cj.core.take_clients(dataset, ids, weighting=weighting)
        taken = taken._replace(state=jax.tree.map(lambda s, ids=ids: s[ids], states))
        server, new, info = step(server, taken, jax.random.key(number))
        states = jax.tree.map(lambda s, n, ids=ids: s.at[ids].set(n), states, new)
        infos.append(info.local)
    return server.params, states, infos


def state_of(states, i):
    return jax.tree.map(lambda s: s[i], states)


def assert_close(got, want, rtol=1e-10, atol=1e-12):
    """Of dicts; a leaf that is `None` in `got` must be absent from `want`."""
    assert {name for name, leaf in got.items() if leaf is not None} == set(want)
    for name, leaf in want.items():
        np.testing.assert_allclose(got[name], leaf, rtol=rtol, atol=atol, err_msg=name)
