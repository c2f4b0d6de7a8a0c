import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cedarjax as cj


def one_client(support, query, padding=2):
    """Support and query rows of a dict of float arrays, followed by padding of NaN."""
    rows = jax.tree.map(lambda s, q: np.concatenate([s, q, np.full((padding, *s.shape[1:]), np.nan)]), support, query)
    num_support = len(jax.tree.leaves(support)[0])
    num_examples = num_support + len(jax.tree.leaves(query)[0])
    dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    examples = jax.tree.map(lambda x: jnp.asarray(x, dtype), rows)
    return cj.ClientData(examples, jnp.int32(num_examples), jnp.int32(num_support))


def update(local, params, data, seed=0):
    upload, state, info = jax.jit(local.update)(params, (), data, jax.random.key(seed))
    assert state == () and upload.mask is None
    return upload.delta, info


CURVATURE = np.array([0.5, 1.0, 3.0])


def quadratic(w, batch, key):
    return 0.5 * jnp.mean(((w[None] - batch) ** 2) @ jnp.asarray(CURVATURE, w.dtype))


@pytest.mark.parametrize("num_steps", [1, 3, 10])
@pytest.mark.parametrize("first_order", [False, True])
def test_quadratics_in_closed_form(num_steps, first_order, x64):
    """`theta_m - s = (1 - a A)^m (theta - s)`, and the meta-gradient is `(1 - a A)^m A (theta_m - q)`."""
    rng, rate = np.random.default_rng(0), 0.2
    support, query, w = rng.normal(size=(4, 3)), rng.normal(size=(3, 3)), rng.normal(size=3)
    shrink = (1 - rate * CURVATURE) ** num_steps
    adapted = support.mean(0) + shrink * (w - support.mean(0))
    want = (1 if first_order else shrink) * CURVATURE * (adapted - query.mean(0))
    local = cj.meta.maml(quadratic, optax.sgd(rate), num_steps, first_order=first_order)
    delta, info = update(local, jnp.asarray(w), one_client(support, query))
    np.testing.assert_allclose(delta, want, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(info.loss, 0.5 * np.mean((adapted - query) ** 2 @ CURVATURE), rtol=1e-10)
    np.testing.assert_allclose(info.support_loss, 0.5 * np.mean((w - support) ** 2 @ CURVATURE), rtol=1e-10)


def logistic(w, batch, key):
    logits = batch["x"] @ w
    return jnp.mean(jnp.logaddexp(0.0, logits) - batch["y"] * logits)


def meta_objective(w, support, query, rate, num_steps):
    """The adapted loss in numpy, the inner gradient written by hand."""
    for _ in range(num_steps):
        x, y = support["x"], support["y"]
        w = w - rate * x.T @ (1 / (1 + np.exp(-x @ w)) - y) / len(y)
    logits = query["x"] @ w
    return np.mean(np.logaddexp(0, logits) - query["y"] * logits)


def classification(seed):
    rng = np.random.default_rng(seed)

    def draw(count):
        return {"x": rng.normal(size=(count, 4)), "y": (rng.random(count) < 0.5).astype(float)}

    return draw(5), draw(6), rng.normal(size=4)


@pytest.mark.parametrize("remat", [False, True])
def test_second_order_against_finite_differences(x64, remat):
    support, query, w = classification(1)
    rate, num_steps, step = 1.5, 4, 1e-6
    numeric = np.array(
        [
            meta_objective(w + step * e, support, query, rate, num_steps)
            - meta_objective(w - step * e, support, query, rate, num_steps)
            for e in np.eye(4)
        ]
    ) / (2 * step)
    local = cj.meta.maml(logistic, optax.sgd(rate), num_steps, remat=remat)
    delta, info = update(local, jnp.asarray(w), one_client(support, query))
    np.testing.assert_allclose(delta, numeric, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(info.loss, meta_objective(w, support, query, rate, num_steps), rtol=1e-12)
    first_order, _ = update(
        cj.meta.maml(logistic, optax.sgd(rate), num_steps, first_order=True), jnp.asarray(w), one_client(support, query)
    )
    assert np.abs(first_order - numeric).max() > 1e-3  # the two are apart, so the comparison above says something


@pytest.mark.standard_promotion
def test_second_order_through_adam_against_finite_differences(x64):
    support, query, w = classification(2)
    data = one_client(support, query)
    local = cj.meta.maml(logistic, optax.adam(0.1, eps_root=1e-8), 3)

    def objective(v):
        return float(update(local, jnp.asarray(v), data)[1].loss)

    numeric = np.array([(objective(w + 1e-5 * e) - objective(w - 1e-5 * e)) / 2e-5 for e in np.eye(4)])
    np.testing.assert_allclose(update(local, jnp.asarray(w), data)[0], numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "tx", [optax.sgd(0.5, momentum=0.9), optax.adamw(0.1, weight_decay=0.3)], ids=["momentum", "adamw"]
)
def test_first_order_is_the_gradient_at_the_adapted_parameters(tx):
    support, query, w = classification(3)
    adapted, state = jnp.asarray(w, jnp.float32), tx.init(jnp.asarray(w, jnp.float32))
    batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), support)
    for _ in range(3):
        step, state = tx.update(jax.grad(logistic)(adapted, batch, None), state, adapted)
        adapted = adapted + step
    x, y = query["x"], query["y"]
    want = x.T @ (1 / (1 + np.exp(-x @ np.asarray(adapted, np.float64))) - y) / len(y)
    delta, _ = update(
        cj.meta.maml(logistic, tx, 3, first_order=True), jnp.asarray(w, jnp.float32), one_client(support, query)
    )
    np.testing.assert_allclose(delta, want, rtol=1e-4, atol=1e-6)


def network(params, batch, key):
    h = batch["x"]
    for layer in params:
        h = jnp.tanh(h @ layer)
    return jnp.mean((h.sum(axis=1) - batch["y"]) ** 2)


def test_remat_changes_memory_and_nothing_else():
    rng = np.random.default_rng(0)

    def draw(count):
        return {"x": rng.normal(size=(count, 16)), "y": rng.normal(size=count)}

    data = one_client(draw(500), draw(20), padding=0)
    params = [jnp.asarray(0.3 * rng.normal(size=(16, 16)), jnp.float32) for _ in range(3)]
    args, memory, deltas = (params, (), data, jax.random.key(0)), {}, {}
    for remat in (False, True):
        compiled = jax.jit(cj.meta.maml(network, optax.sgd(0.1), 8, remat=remat).update).lower(*args).compile()
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
        deltas[remat] = compiled(*args)[0].delta
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), deltas[True], deltas[False])
    assert memory[True] < memory[False] / 3


@pytest.mark.standard_promotion
@pytest.mark.parametrize(("eps_root", "finite"), [(0.0, False), (1e-8, True)])
def test_adam_needs_eps_root_where_a_gradient_is_zero(eps_root, finite):
    """The trap: the slope of Adam's square root is infinite at 0, here for an input that is always 0."""
    support, query, w = classification(4)
    support["x"][:, 2] = 0
    delta, _ = update(
        cj.meta.maml(logistic, optax.adam(0.1, eps_root=eps_root), 2),
        jnp.asarray(w, jnp.float32),
        one_client(support, query),
    )
    assert bool(jnp.isfinite(delta).all()) == finite


def test_batches_of_everything_are_the_default():
    """With as many rows as there are, a batch is a permutation of the set and the loss the same mean."""
    support, query, w = classification(5)
    params, data = jnp.asarray(w, jnp.float32), one_client(support, query)
    whole, whole_info = update(cj.meta.maml(logistic, optax.sgd(1.0), 3), params, data)
    batched, info = update(cj.meta.maml(logistic, optax.sgd(1.0), 3, batch_size=5, query_batch_size=6), params, data)
    np.testing.assert_allclose(batched, whole, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(info[:2], whole_info[:2], rtol=1e-5)


def test_each_inner_step_takes_the_next_batch():
    """A rate of 1 on a quadratic lands on the batch itself: two steps of one row end on the second of the order."""
    rows = np.array([[1.0], [2.0], [4.0]])

    def mean(w, batch, key):
        return 0.5 * jnp.mean((w[None] - batch) ** 2)

    data = one_client(rows, np.array([[0.0]]))
    local = cj.meta.maml(mean, optax.sgd(1.0), 2, batch_size=1, first_order=True)
    seen = {float(update(local, jnp.zeros(1), data, seed)[0][0]) for seed in range(12)}
    assert seen == {1.0, 2.0, 4.0}


@pytest.mark.parametrize("batched", [False, True])
def test_a_client_without_support_or_query(batched):
    support, query, w = classification(6)
    sizes = {"batch_size": 3, "query_batch_size": 20} if batched else {}
    local = cj.meta.maml(logistic, optax.sgd(1.0), 2, **sizes)
    params, data = jnp.asarray(w, jnp.float32), one_client(support, query, padding=1)
    nothing, info = update(local, params, data._replace(num_support=data.num_examples))
    assert not nothing.any() and info.loss == 0
    none = {k: v[:0] for k, v in query.items()}
    nothing, _ = update(local, params, one_client(support, none, padding=0))
    assert not nothing.any()
    unadapted, info = update(local, params, data._replace(num_support=jnp.int32(0)))
    assert jnp.isfinite(unadapted).all() and info.support_loss == 0
    if not batched:
        x, y = (np.concatenate([support[k], query[k]]) for k in ("x", "y"))
        np.testing.assert_allclose(unadapted, x.T @ (1 / (1 + np.exp(-x @ w)) - y) / len(y), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("num_steps", "options", "name"),
    [(0, {}, "num_steps"), (1, {"batch_size": 0}, "batch_size"), (1, {"query_batch_size": 0}, "query_batch_size")],
)
def test_options_out_of_range(num_steps, options, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        cj.meta.maml(logistic, optax.sgd(0.1), num_steps, **options)
