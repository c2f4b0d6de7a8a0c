"""FedProto: clients keep their models and exchange one mean embedding a class.

Reference: Tan, Long, Liu, Zhou, Lu, Jiang, Zhang, `FedProto: Federated Prototype Learning across Heterogeneous Clients
<https://arxiv.org/abs/2105.00243>`_, 2022. The server's formula is read as the mean over all examples of a class; as
printed it divides by the number of clients once more, which would shrink the prototypes. The published code weighs
clients equally, and compares single embeddings with prototypes in place of the batch's means.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cedarjax.core import (
    ClientData,
    Epochs,
    LocalInfo,
    LocalUpdate,
    LossFn,
    NumStepsFn,
    Params,
    PyTree,
    Upload,
    accumulator,
    check_positive,
    take_rows,
    train_epochs,
)

EmbedFn = Callable[[Params, PyTree], jax.Array]
LabelsFn = Callable[[PyTree], jax.Array]


class Prototype(NamedTuple):
    """What the server knows of one class; a leaf of its own for each, so that a client can leave it out."""

    mean: jax.Array
    """`[d]`, mean embedding of its examples."""
    known: jax.Array
    """Scalar, above 0 once a client has uploaded the class."""


class FedProtoState(NamedTuple):
    """What a client keeps."""

    personal: Params
    """Its own model."""


def class_sums(
    embeddings: jax.Array, labels: jax.Array, num_classes: int, valid: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sum of the embeddings of each class, and how many there are.

    Args:
      embeddings: `[B, d]`.
      labels: `[B]` integers; one outside `[0, K)` counts for no class.
      num_classes: `K`.
      valid: `[B]` bool, the rows that count; the others may hold anything. Default: all.

    Returns:
      `[K, d]` and `[K]`, of at least float32.

    Example:
      >>> class_sums(jnp.array([[1.0], [2.0], [4.0]]), jnp.array([0, 1, 1]), 3)[1].tolist()
      [1.0, 2.0, 0.0]
    """
    dtype = accumulator(embeddings)
    member = labels[None, :].astype(jnp.int32) == jnp.arange(num_classes, dtype=jnp.int32)[:, None]
    if valid is not None:
        member = member & valid[None, :]
        embeddings = jnp.where(valid[:, None], embeddings, jnp.zeros_like(embeddings))
    member = member.astype(dtype)
    sums = jnp.matmul(member, embeddings.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    return sums, member.sum(axis=1)


def nearest_prototype(embeddings: jax.Array, prototypes: tuple[Prototype, ...]) -> jax.Array:
    """The class of the nearest prototype that the server knows, which is how the paper classifies.

    Args:
      embeddings: `[B, d]`.
      prototypes: what the server broadcasts, one a class.

    Returns:
      `[B]` int32 classes; 0 if the server knows none.

    Example:
      >>> zero, two = Prototype(jnp.zeros(1), jnp.ones(())), Prototype(jnp.full(1, 2.0), jnp.ones(()))
      >>> nearest_prototype(jnp.array([[0.9], [1.1]]), (zero, two)).tolist()
      [0, 1]
    """
    means, known = _stacked(prototypes)
    gaps = embeddings.astype(means.dtype)[:, None, :] - means[None]
    return jnp.where(known[None], jnp.square(gaps).sum(axis=2), jnp.inf).argmin(axis=1).astype(jnp.int32)


def _stacked(prototypes: tuple[Prototype, ...]) -> tuple[jax.Array, jax.Array]:
    """`[K, d]` means, 0 where they are not known, and `[K]` bool, whether they are."""
    means, known = (jnp.stack(leaves) for leaves in zip(*prototypes, strict=True))
    known = known > 0
    return jnp.where(known[:, None], means, jnp.zeros_like(means)), known


def fedproto(
    loss_fn: LossFn,
    embed_fn: EmbedFn,
    tx: optax.GradientTransformation,
    lam: float | jax.Array = 1.0,
    *,
    num_classes: int,
    num_features: int,
    batch_size: int,
    num_epochs: int = 1,
    labels_fn: LabelsFn = lambda batch: batch["y"],
    num_steps_fn: NumStepsFn | None = None,
) -> LocalUpdate:
    """Clients train models of their own whose embeddings of a class are to agree.

    Each step is on `loss(batch) + lam sum_j ||C_j - Cbar_j||^2`, over the classes `j` that the batch holds and the
    server knows, with `C_j` the mean embedding of class `j` in the batch and `Cbar_j` the server's. After training the
    client uploads the mean embedding of each of its classes over all its examples, and nothing else: of each class that
    it holds, `d` numbers and one for the weight.

    A class counts for the share of the client's weight that its examples make up (`Upload.mask` holds `n_ij / n_i`). So
    with weights `n_i`, the default of `run_rounds`, and `optax.chain(robust.mean(), optax.sgd(1.0))`, the server's
    prototype is the mean over all examples of the class that the round's clients hold, and that of a class that nobody
    holds stays what it was.

    Models are the client's alone: only the embeddings need to agree in width, so that groups of clients with different
    models can each run their own `fedproto` on the same prototypes.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      embed_fn: `(params, batch) -> [B, d]`, each row from the same row of the batch alone.
      tx: optax optimiser; runs from `tx.init` in every round.
      lam: strength of the agreement, at least 0; a traced scalar is allowed.
      num_classes: `K`.
      num_features: `d`.
      batch_size: examples per batch.
      num_epochs: passes over the client's examples.
      labels_fn: `batch -> [B]` integers in `[0, K)`.
      num_steps_fn: as in `core.Epochs`.

    Returns:
      A `LocalUpdate` over `ClientData` that shares a tuple of `K` `Prototype`s, with a `FedProtoState` and a
      `LocalInfo`, whose loss is with the prototypes' term. Its `model` is the client's own, which begins as the initial
      parameters.

    Raises:
      ValueError: if `lam` is negative or a count is not positive (here), or if `embed_fn` or `labels_fn` returns
        another shape (when `update` is traced).

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> loss_fn = lambda w, batch, key: 0.0 * w
      >>> embed_fn = lambda w, batch: w * batch["x"]
      >>> local = fedproto(loss_fn, embed_fn, optax.sgd(0.1), num_classes=2, num_features=1, batch_size=2)
      >>> examples = {"x": jnp.array([[2.0], [4.0]]), "y": jnp.array([1, 1])}
      >>> data = cj.ClientData(examples, num_examples=jnp.int32(2), num_support=jnp.int32(0))
      >>> params = jnp.float32(1.0)
      >>> upload, state, _ = local.update(local.share(params), local.init(params), data, jax.random.key(0))
      >>> print(upload.delta[1].mean, [mask.mean.item() for mask in upload.mask])
      [-3.] [0.0, 1.0]
    """
    if isinstance(lam, int | float) and lam < 0:
        raise ValueError(f"lam must be at least 0, got {lam}.")
    check_positive(num_classes=num_classes, num_features=num_features)
    epochs = Epochs(batch_size, num_epochs, num_steps_fn).checked()

    def sums_of(params: Params, batch: PyTree, valid: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """`class_sums` of a batch, over the rows that are valid."""
        embeddings, labels = embed_fn(params, batch), labels_fn(batch)
        rows = jax.tree.leaves(batch)[0].shape[0]
        if embeddings.shape != (rows, num_features):
            raise ValueError(
                f"embed_fn must return [B, num_features] = {(rows, num_features)}, got the shape {embeddings.shape}."
            )
        if labels.shape != (rows,):
            raise ValueError(f"labels_fn must return [B] = {(rows,)}, got the shape {labels.shape}.")
        return class_sums(embeddings, labels, num_classes, valid)

    def prototypes_of(params: Params, data: ClientData) -> tuple[jax.Array, jax.Array]:
        """Mean embedding of each class over the client's examples, `[K, d]`, and their counts `[K]`."""
        length = jax.tree.leaves(data.examples)[0].shape[0]

        def add(totals: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            rows = start + jnp.arange(batch_size, dtype=jnp.int32)
            valid = rows < data.num_examples
            batch = take_rows(data.examples, jnp.where(valid, rows, 0))
            return jax.tree.map(jnp.add, totals, sums_of(params, batch, valid)), None

        one = jax.eval_shape(lambda: sums_of(params, take_rows(data.examples, jnp.zeros(batch_size, jnp.int32))))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)
        (sums, counts), _ = jax.lax.scan(add, zeros, jnp.arange(0, length, batch_size, dtype=jnp.int32))
        return sums / jnp.maximum(counts, 1)[:, None], counts

    def share(params: Params) -> tuple[Prototype, ...]:
        dtype = accumulator(*jax.tree.leaves(params))
        return tuple(Prototype(jnp.zeros(num_features, dtype), jnp.zeros((), dtype)) for _ in range(num_classes))

    def update(
        shared: tuple[Prototype, ...], state: FedProtoState, data: ClientData, key: jax.Array
    ) -> tuple[Upload, FedProtoState, LocalInfo]:
        targets, known = _stacked(shared)

        def regularised(params: Params, batch: PyTree, key: jax.Array) -> jax.Array:
            loss = loss_fn(params, batch, key)
            sums, counts = sums_of(params, batch)
            gaps = sums / jnp.maximum(counts, 1)[:, None] - targets.astype(sums.dtype)
            used = known & (counts > 0)
            distance = jnp.square(jnp.where(used[:, None], gaps, jnp.zeros_like(gaps))).sum()
            return loss + (jnp.asarray(lam, distance.dtype) * distance).astype(loss.dtype)

        params, info = train_epochs(regularised, tx, state.personal, data, key, epochs)
        means, counts = prototypes_of(params, data)
        shares = counts / jnp.maximum(data.num_examples, 1).astype(counts.dtype)

        def delta(old: Prototype, mean: jax.Array, count: jax.Array) -> Prototype:
            held = count > 0
            moved = jnp.where(held, old.mean - mean.astype(old.mean.dtype), jnp.zeros_like(old.mean))
            return Prototype(moved, jnp.where(held, old.known - 1, jnp.zeros_like(old.known)))

        deltas = tuple(delta(old, means[j], counts[j]) for j, old in enumerate(shared))
        mask = tuple(Prototype(*[shares[j].astype(jnp.float32)] * 2) for j in range(num_classes))
        return Upload(deltas, mask), FedProtoState(params), info

    return LocalUpdate(FedProtoState, update, share, lambda shared, state: state.personal)
