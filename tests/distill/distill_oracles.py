"""Plain numpy in float64: linear classifiers with gradients by hand, sample by sample, and ragged clients.

Only the order in which a client visits its samples is taken from the library.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cedarjax as cj
from cedarjax import distill

COUNTS = (5, 3, 1, 6)
NUM_INPUTS, NUM_CLASSES, NUM_RELATED = 3, 3, 4
BATCH, EPOCHS = 4, 2
RATE, MOMENTUM, DECAY = 0.3, 0.9, 0.05
ALPHA, TAU = 1.5, 2.0
OFFSETS = np.concatenate([[0], np.cumsum(COUNTS)])


def make_data(seed=0):
    rng = np.random.default_rng(seed)
    total = sum(COUNTS)
    return {"x": rng.normal(size=(total, NUM_INPUTS)), "y": rng.integers(0, NUM_CLASSES, total)}


def make_dataset(data=None):
    data = make_data() if data is None else data
    return distill.with_index(cj.data.federated_dataset(data, np.repeat(np.arange(len(COUNTS)), COUNTS)))


def make_params(seed, width=NUM_INPUTS):
    return np.random.default_rng(100 + seed).normal(size=(width, NUM_CLASSES))


def make_tx():
    return optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, momentum=MOMENTUM))


def make_group():
    return distill.Group(lambda params, x, key: x @ params, make_tx())


def cohort_of(dataset, states, ids, **options):
    """Rows of some clients; `states` are those of all clients, stacked."""
    cohort = cj.core.take_clients(dataset, jnp.asarray(ids), **options)
    return cohort._replace(state=jax.tree.map(lambda s: s[jnp.asarray(ids)], states))


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def kl(p, q):
    return float((p * (np.log(p) - np.log(q))).sum())


def brute_force(embeddings, labels, num_related, client_id=None):
    """Sorted by similarity and then by index, one sample at a time."""
    with np.errstate(invalid="ignore"):
        norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
        unit = np.where(norms > 0, embeddings / np.where(norms > 0, norms, 1), 0.0)
    finite = np.isfinite(embeddings).all(axis=1)
    unit[~finite] = 0
    index = np.zeros((len(labels), num_related), int)
    mask = np.zeros((len(labels), num_related), bool)
    for i in range(len(labels)):
        others = np.flatnonzero((labels == labels[i]) & finite)
        others = others[others != i]
        if client_id is not None:
            others = others[client_id[others] != client_id[i]]
        if not finite[i]:
            others = others[:0]
        ranked = others[np.argsort(-(unit[others] @ unit[i]), kind="stable")][:num_related]
        index[i, : len(ranked)] = ranked
        mask[i, : len(ranked)] = True
    return index, mask


def batches(key, count, length, *, batch=BATCH, epochs=EPOCHS):
    """The rows of each step of a training with that key, the last ones short."""
    order_key = jax.random.split(key, 3)[0]
    stream = cj.core.shuffled_epochs(order_key, jnp.int32(0), jnp.int32(count), length=length, num_epochs=epochs)
    order = np.asarray(stream.orders)[:, :count].reshape(-1)
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def visits(key, client):
    """The rows of each step of a client in a round with that key."""
    return batches(jax.random.fold_in(key, client), COUNTS[client], max(COUNTS))


def teacher_of(i, logits, written, index, mask):
    """Mean over the related samples that have been written, or None."""
    related = [j for j, there in zip(index[i], mask[i], strict=True) if there and written[j]]
    return np.mean([logits[j] for j in related], axis=0) if related else None


class Client:
    """A linear classifier with momentum and weight decay."""

    def __init__(self, params):
        self.params, self.trace = params.copy(), np.zeros_like(params)

    def step(self, x, y, teachers, *, alpha=ALPHA, tau=TAU):
        """One step; returns the loss before it and the logits that it was taken from."""
        logits = x @ self.params
        grads, loss = np.zeros_like(self.params), 0.0
        targets = y if np.ndim(y) == 2 else np.eye(NUM_CLASSES)[y]
        for xi, target, z, teacher in zip(x, targets, logits, teachers, strict=True):
            back = softmax(z) - target
            loss -= target @ np.log(softmax(z))
            if teacher is not None:
                back = back + alpha * tau * (softmax(z / tau) - softmax(teacher / tau))
                loss += alpha * tau**2 * kl(softmax(teacher / tau), softmax(z / tau))
            grads += np.outer(xi, back) / len(x)
        self.trace = grads + DECAY * self.params + MOMENTUM * self.trace
        self.params = self.params - RATE * self.trace
        return loss / len(x), logits


def fedcache_rounds(keys, cohorts, relations, *, order, alpha=ALPHA, tau=TAU):
    """Models, the cache, and per round and client the loss and the samples with a teacher."""
    data, (index, mask) = make_data(), relations
    clients = [Client(make_params(i)) for i in range(len(COUNTS))]
    logits, written = np.zeros((sum(COUNTS), NUM_CLASSES)), np.zeros(sum(COUNTS), bool)
    told = []
    for key, cohort in zip(keys, cohorts, strict=True):
        seen = logits.copy(), written.copy()
        for client in cohort:
            losses, taught = [], 0
            for rows in visits(key, client):
                at = OFFSETS[client] + rows
                known = (logits, written) if order == "sequential" else seen
                teachers = [teacher_of(i, *known, index, mask) for i in at]
                loss, z = clients[client].step(data["x"][at], data["y"][at], teachers, alpha=alpha, tau=tau)
                losses.append(loss)
                taught += sum(t is not None for t in teachers)
                for i, zi in zip(at, z, strict=True):
                    logits[i], written[i] = zi, True
            told.append((np.mean(losses), taught))
    return clients, logits, written, told
