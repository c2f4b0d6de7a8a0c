"""The rules of this family in plain numpy, float64, on logistic regression, whose derivatives are written by hand."""

import jax
import jax.numpy as jnp
import numpy as np

import cedarjax as cj


def loss_fn(w, batch, key):
    logits = batch["x"] @ w
    return jnp.mean(jnp.logaddexp(jnp.zeros_like(logits), logits) - batch["y"] * logits)


def probabilities(w, rows):
    return 1 / (1 + np.exp(-rows["x"] @ w))


def loss(w, rows):
    logits = rows["x"] @ w
    return np.mean(np.logaddexp(0, logits) - rows["y"] * logits)


def grad(w, rows):
    return rows["x"].T @ (probabilities(w, rows) - rows["y"]) / len(rows["y"])


def hessian(w, rows):
    p = probabilities(w, rows)
    return (rows["x"].T * (p * (1 - p))) @ rows["x"] / len(rows["y"])


def maml(w, support, query, *, rates, num_steps, adapted=True, first_order=False):
    """Meta-gradients in the start and in the rates, by the chain rule step by step.

    `rates` and `adapted` (which coordinates are stepped) are numbers or vectors.
    """
    rates = np.broadcast_to(rates * np.asarray(adapted, float), w.shape)
    path = [w]
    for _ in range(num_steps):
        path.append(path[-1] - rates * grad(path[-1], support))
    bar, rates_bar = grad(path[-1], query), np.zeros_like(w)
    for v in reversed(path[:-1]):
        rates_bar = rates_bar - bar * grad(v, support)
        if not first_order:
            bar = bar - hessian(v, support) @ (rates * bar)
    return bar, rates_bar * np.asarray(adapted, float)


def imaml(w, support, query, *, lam):
    """The inner problem solved by Newton's method, the linear system by elimination."""
    v = w
    for _ in range(50):
        v = v - np.linalg.solve(hessian(v, support) + lam * np.eye(len(w)), grad(v, support) + lam * (v - w))
    return np.linalg.solve(np.eye(len(w)) + hessian(v, support) / lam, grad(v, query))


def per_fedavg(w, batches, *, alpha, beta, mode, delta):
    """`batches`: three sets of rows for each step."""
    for first, second, third in batches:
        d = grad(w - alpha * grad(w, first), second)
        if mode == "exact":
            d = d - alpha * hessian(w, third) @ d
        elif mode == "hf":
            d = d - alpha * (grad(w + delta * d, third) - grad(w - delta * d, third)) / (2 * delta)
        w = w - beta * d
    return w


NUM_FEATURES = 4


def rows(rng, count):
    return {"x": rng.normal(size=(count, NUM_FEATURES)), "y": (rng.random(count) < 0.5).astype(float)}


def client(support, query, padding=2):
    """Support and query rows, followed by padding of NaN."""
    joined = {k: np.concatenate([s, query[k], np.full((padding, *s.shape[1:]), np.nan)]) for k, s in support.items()}
    num_support = len(support["y"])
    dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    examples = jax.tree.map(lambda x: jnp.asarray(x, dtype), joined)
    return cj.ClientData(examples, jnp.int32(num_support + len(query["y"])), jnp.int32(num_support))


def problem(seed, num_support=5, num_query=6):
    """Support rows, query rows and parameters."""
    rng = np.random.default_rng(seed)
    return rows(rng, num_support), rows(rng, num_query), rng.normal(size=NUM_FEATURES)


def update(local, shared, data, seed=0):
    """Delta and info of a client without state."""
    upload, state, info = jax.jit(local.update)(shared, (), data, jax.random.key(seed))
    assert state == () and upload.mask is None
    return upload.delta, info


def slopes(fun, w, step=1e-5):
    """Central differences of a function of a vector."""
    return np.array([fun(w + step * e) - fun(w - step * e) for e in np.eye(len(w))]) / (2 * step)
