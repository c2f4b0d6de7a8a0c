"""Rounds of every kernel against plain numpy: other clients in each round, weighted by their examples."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj
from tests.meta import meta_oracles as oracle

COHORTS = [[0, 1, 2], [3, 1, 4], [4, 0, 3]]
SIZES = [(3, 5), (5, 3), (2, 6), (4, 4), (1, 7)]
"""Support and query rows of five clients; eight together, so that a batch of eight is all of them."""
SERVER_RATE, RATE, LAM = 0.7, 0.8, 0.5
HEAD = np.array([False, False, True, True])


def whole(params):
    return jnp.concatenate([params["body"], params["head"]])


def of_parts(params, batch, key):
    return oracle.loss_fn(whole(params), batch, key)


def maml(shared, support, query, **options):
    return oracle.maml(shared, support, query, rates=RATE, num_steps=3, **options)[0]


def meta_sgd(shared, support, query):
    w, rates = np.split(shared, 2)
    return np.concatenate(oracle.maml(w, support, query, rates=rates, num_steps=2))


def per_fedavg(mode):
    def delta(shared, support, query):
        everything = {k: np.concatenate([support[k], query[k]]) for k in support}
        options = {"alpha": RATE, "beta": 0.5, "mode": mode, "delta": 0.1}
        return shared - oracle.per_fedavg(shared, [[everything] * 3] * 2, **options)

    return delta


def per_fedavg_local(mode):
    options = {"num_steps": 2, "batch_size": 8, "mode": mode, "delta": 0.1}
    return lambda: cj.meta.per_fedavg(oracle.loss_fn, RATE, optax.sgd(0.5), **options)


KERNELS = {
    "maml": (lambda: cj.meta.maml(oracle.loss_fn, optax.sgd(RATE), 3), maml),
    "maml_mixed": (lambda: cj.meta.maml(oracle.loss_fn, optax.sgd(RATE), 3, mode="mixed"), maml),
    "fomaml": (
        lambda: cj.meta.maml(oracle.loss_fn, optax.sgd(RATE), 3, first_order=True),
        lambda *args: maml(*args, first_order=True),
    ),
    "anil": (lambda: cj.meta.anil(of_parts, optax.sgd(RATE), 3), lambda *args: maml(*args, adapted=HEAD)),
    "meta_sgd": (lambda: cj.meta.meta_sgd(oracle.loss_fn, 2, RATE), meta_sgd),
    "imaml": (
        lambda: cj.meta.imaml(oracle.loss_fn, optax.sgd(0.7), 80, LAM),
        lambda *args: oracle.imaml(*args, lam=LAM),
    ),
    **{f"per_fedavg_{mode}": (per_fedavg_local(mode), per_fedavg(mode)) for mode in ("exact", "fo", "hf")},
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_rounds_with_partial_participation(kernel, x64):
    make, want_delta = KERNELS[kernel]
    rng = np.random.default_rng(0)
    parts = [(oracle.rows(rng, s), oracle.rows(rng, q)) for s, q in SIZES]
    w = rng.normal(size=oracle.NUM_FEATURES)
    params = {"body": jnp.asarray(w[:2]), "head": jnp.asarray(w[2:])} if kernel == "anil" else jnp.asarray(w)
    data = jax.tree.map(lambda *x: jnp.stack(x), *[oracle.client(s, q) for s, q in parts])
    # Unequal weights, though all have as many examples.
    weights = np.array([8.0, 4.0, 2.0, 6.0, 1.0])

    algorithm = cj.federated_round(make(), optax.chain(cj.robust.mean(), optax.sgd(SERVER_RATE)))
    step, state = jax.jit(algorithm.step), algorithm.init(params)
    want = np.concatenate([w, np.full(w.shape, RATE)]) if kernel == "meta_sgd" else w
    for number, present in enumerate(COHORTS):
        cohort = cj.Cohort(
            cj.core.take_rows(data, jnp.array(present)),
            jnp.asarray(weights[present], jnp.float32),
            jnp.asarray(present, jnp.int32),
        )
        state, _, _ = step(state, cohort, jax.random.key(number))
        deltas = np.stack([want_delta(want, *parts[c]) for c in present])
        want = want - SERVER_RATE * weights[present] @ deltas / weights[present].sum()
        got = np.concatenate(jax.tree.leaves(state.params))
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10, err_msg=f"round {number}")
