"""Relations of the knowledge cache: for every sample the nearest samples of its own label, over all clients.

Reference: Wu, Sun, Wang, Liu, Xu, Wang, Jiang, Gao, Lu, `FedCache: A Knowledge Cache-driven Federated Learning
Architecture for Personalized Edge Intelligence <https://arxiv.org/abs/2308.07816>`_, 2024. The published code drops the
first hit of the search in place of the sample itself, which keeps the sample and drops a duplicate where the two tie;
here a sample is excluded by its index. It raises where a class has too few samples; here a mask says how many there
are.

Samples are sorted by label, so that blocks of rows meet the columns of their own classes only: the work is the sum of
the squares of the class sizes, and the memory that of the embeddings and one block.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core import accumulator, check_positive

TopFn = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


class Relations(NamedTuple):
    """Which samples are related to which."""

    index: jax.Array  # type: ignore[assignment]  # a tuple has a method of that name
    """`[M, R]` int32 sample indices, the nearest first; 0 where `mask` is False."""
    mask: jax.Array
    """`[M, R]` bool; False where the class has no further sample."""


def unit_rows(embeddings: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows scaled to length 1, safe from overflow and underflow of the squares.

    Args:
      embeddings: `[M, d]`.

    Returns:
      `[M, d]` float32 or wider, zeros for a row of zeros and for one that is not finite; and `[M]` bool, whether the
      row is finite.

    Example:
      >>> import jax.numpy as jnp
      >>> rows, finite = unit_rows(jnp.array([[3e30, 4e30], [0.0, 0.0], [jnp.inf, 1.0]]))
      >>> print(rows.round(3).tolist(), finite.tolist())
      [[0.6000000238418579, 0.800000011920929], [0.0, 0.0], [0.0, 0.0]] [True, True, False]
    """
    finite = jnp.isfinite(embeddings).all(axis=1)
    rows = jnp.where(finite[:, None], embeddings, jnp.zeros_like(embeddings)).astype(accumulator(embeddings))
    largest = jnp.abs(rows).max(axis=1, keepdims=True)
    rows = rows / jnp.where(largest > 0, largest, jnp.ones_like(largest))
    length = jnp.sqrt(jnp.square(rows).sum(axis=1, keepdims=True))
    return rows / jnp.where(length > 0, length, jnp.ones_like(length)), finite


def build_relations(
    embeddings: jax.Array,
    labels: jax.Array,
    num_related: int,
    *,
    block_size: int = 1024,
    client_id: jax.Array | None = None,
) -> Relations:
    """The `R` nearest samples of the same label by cosine similarity, exactly.

    Equal similarities are ranked by index, the lower first. A row of zeros has no direction: its similarity to every
    sample is 0. A row with a value that is not finite is related to nobody, and nobody to it.

    Args:
      embeddings: `[M, d]` floats, of all clients, in the order of the global sample index.
      labels: `[M]` integers; may be traced.
      num_related: `R`, at least 1.
      block_size: samples that are compared with each other at once; the larger, the more memory (the square of it) and
        the better the use of an accelerator. It changes results by rounding only.
      client_id: `[M]` integers. If given, samples of one client are not related to each other, so that knowledge comes
        from other clients alone. Default: over all clients, the sample's own included, as in the paper.

    Returns:
      `Relations`, `[M, R]`. A sample is never related to itself, but may be to its duplicates.

    Raises:
      ValueError: if a shape does not fit or a count is not positive.
      TypeError: if the embeddings are not floats, or labels or ids not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> embeddings = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.1]])
      >>> relations = build_relations(embeddings, jnp.array([7, 7, 7, 5]), 2)
      >>> relations.index.tolist(), relations.mask[3].tolist()
      ([[2, 1], [2, 0], [0, 1], [0, 0]], [False, False])
    """
    return _search(embeddings, labels, num_related, client_id, block_size, None)


def approximate_relations(
    embeddings: jax.Array,
    labels: jax.Array,
    num_related: int,
    *,
    recall_target: float = 0.95,
    block_size: int = 1024,
    client_id: jax.Array | None = None,
) -> Relations:
    """As `build_relations`, with `jax.lax.approx_max_k` in each block.

    For classes of more than about a million samples, where comparing all pairs takes long. What a block finds is merged
    exactly, so the expected recall of a block is that of the whole. Only TPUs have an approximate algorithm; elsewhere
    JAX sorts, the result is exact and nothing is gained. Relations that an index on the host has found come in by
    `relations_from_candidates`.

    Args:
      embeddings: as in `build_relations`.
      labels: as in `build_relations`.
      num_related: as in `build_relations`.
      recall_target: expected share of the nearest that are found, above 0 and at most 1; measure it with `recall`.
      block_size: as in `build_relations`.
      client_id: as in `build_relations`.

    Returns:
      `Relations`, `[M, R]`.

    Raises:
      ValueError: as `build_relations`, and if `recall_target` is out of range.
      TypeError: as `build_relations`.

    Example:
      >>> import jax.numpy as jnp
      >>> embeddings, labels = jnp.eye(4) + 0.1, jnp.array([0, 1, 0, 1])
      >>> approximate_relations(embeddings, labels, 1).index.tolist()
      [[2], [3], [0], [1]]
    """
    if not 0 < recall_target <= 1:
        raise ValueError(f"recall_target must satisfy 0 < recall_target <= 1, got {recall_target}.")

    def top_fn(similarities: jax.Array) -> tuple[jax.Array, jax.Array]:
        count = min(num_related, similarities.shape[1])
        return jax.lax.approx_max_k(similarities, count, recall_target=recall_target)

    return _search(embeddings, labels, num_related, client_id, block_size, top_fn)


def recall(exact: Relations, approximate: Relations) -> jax.Array:
    """Share of the exact relations that the approximate ones hold, at whatever rank.

    Args:
      exact: `[M, R]`.
      approximate: `[M, R']`.

    Returns:
      Scalar float32; 1 where there is nothing to be found.

    Raises:
      ValueError: if they are of different samples.

    Example:
      >>> import jax.numpy as jnp
      >>> exact = Relations(jnp.array([[1, 2]]), jnp.array([[True, True]]))
      >>> print(recall(exact, Relations(jnp.array([[2, 0]]), jnp.array([[True, False]]))))
      0.5
    """
    if exact.index.shape[0] != approximate.index.shape[0]:
        raise ValueError(
            f"approximate must have M = {exact.index.shape[0]} rows like exact, got {approximate.index.shape[0]}."
        )
    equal = exact.index[:, :, None] == approximate.index[:, None, :]
    found = (equal & approximate.mask[:, None, :]).any(axis=2) & exact.mask
    # Means of rows first: float32 counts exactly only up to 2^24.
    per_row = exact.mask.sum(axis=1).astype(jnp.float32).mean()
    return jnp.where(per_row > 0, found.sum(axis=1).astype(jnp.float32).mean() / jnp.maximum(per_row, 1e-30), 1.0)


def check_samples(
    embeddings: jax.Array, labels: jax.Array, num_related: int, client_id: jax.Array | None, block_size: int
) -> None:
    """Raises unless the parts of a search fit together.

    Args:
      embeddings: as in `build_relations`.
      labels: as in `build_relations`.
      num_related: as in `build_relations`.
      client_id: as in `build_relations`.
      block_size: as in `build_relations`.

    Raises:
      ValueError: if a shape does not fit or a count is not positive.
      TypeError: if the embeddings are not floats, or labels or ids not integers.
    """
    check_positive(num_related=num_related, block_size=block_size)
    if jnp.ndim(embeddings) != 2 or 0 in jnp.shape(embeddings):
        raise ValueError(f"embeddings must be [M, d] with M and d at least 1, got the shape {jnp.shape(embeddings)}.")
    if not jnp.issubdtype(embeddings.dtype, jnp.floating):
        raise TypeError(f"embeddings must be floats, got {embeddings.dtype}.")
    for name, values in (("labels", labels), ("client_id", client_id)):
        if values is None:
            continue
        if jnp.shape(values) != embeddings.shape[:1]:
            raise ValueError(
                f"{name} must be [M] with M = {embeddings.shape[0]}, the rows of embeddings, got the shape "
                f"{jnp.shape(values)}."
            )
        if not jnp.issubdtype(values.dtype, jnp.integer):
            raise TypeError(f"{name} must be integers, got {values.dtype}.")


def _search(
    embeddings: jax.Array,
    labels: jax.Array,
    num_related: int,
    client_id: jax.Array | None,
    block_size: int,
    top_fn: TopFn | None,
) -> Relations:
    """`build_relations`, with `top_fn` to thin out the similarities of a block before they are merged."""
    embeddings, labels = jnp.asarray(embeddings), jnp.asarray(labels)
    client_id = None if client_id is None else jnp.asarray(client_id)
    check_samples(embeddings, labels, num_related, client_id, block_size)
    count = embeddings.shape[0]
    size = min(block_size, count)
    num_blocks = -(-count // size)

    unit, finite = unit_rows(embeddings)
    order = jnp.argsort(labels, stable=True).astype(jnp.int32)  # within a label by index, which is how ties are ranked
    ranked_labels = labels[order]
    rows = jnp.pad(order, (0, num_blocks * size - count))
    usable = finite[rows] & (jnp.arange(num_blocks * size, dtype=jnp.int32) < count)
    owner = jnp.zeros_like(rows) if client_id is None else client_id[rows]
    samples = (unit[rows], labels[rows], rows, usable, owner)

    def block(number: jax.Array) -> tuple[jax.Array, ...]:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, number * size, size), samples)

    def of_rows(number: jax.Array) -> tuple[jax.Array, jax.Array]:
        my_unit, my_label, mine, my_use, my_owner = block(number)

        def merge(other: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            unit, label, theirs, use, owner = block(other)
            found = jnp.matmul(my_unit, unit.T, precision=jax.lax.Precision.HIGHEST)
            allowed = (my_label[:, None] == label[None]) & (mine[:, None] != theirs[None])
            allowed = allowed & my_use[:, None] & use[None]
            if client_id is not None:
                allowed = allowed & (my_owner[:, None] != owner[None])
            # A zero has two signs, which a sort tells apart.
            found = jnp.where(allowed, jnp.where(found == 0, jnp.zeros_like(found), found), -jnp.inf)
            index = jnp.broadcast_to(theirs[None], found.shape)
            if top_fn is not None:
                found, at = top_fn(found)
                index = jnp.take_along_axis(index, at, axis=1)
            # What was found before has lower indices and stands first: top_k keeps the first of equals.
            found = jnp.concatenate([best[0], found], axis=1)
            index = jnp.concatenate([best[1], index], axis=1)
            found, at = jax.lax.top_k(found, num_related)
            return found, jnp.take_along_axis(index, at, axis=1)

        start = number * size
        last = jnp.minimum(start + size, count) - 1
        first_column = jnp.searchsorted(ranked_labels, ranked_labels[start], side="left").astype(jnp.int32)
        end_column = jnp.searchsorted(ranked_labels, ranked_labels[last], side="right").astype(jnp.int32)
        nothing = jnp.full((size, num_related), -jnp.inf, unit.dtype), jnp.zeros((size, num_related), jnp.int32)
        found, index = jax.lax.fori_loop(first_column // size, (end_column + size - 1) // size, merge, nothing)
        mask = found > -jnp.inf
        return jnp.where(mask, index, 0), mask

    index, mask = jax.lax.map(of_rows, jnp.arange(num_blocks, dtype=jnp.int32))
    back = jnp.zeros(count, jnp.int32).at[order].set(jnp.arange(count, dtype=jnp.int32))
    return Relations(*(x.reshape(num_blocks * size, num_related)[back] for x in (index, mask)))
