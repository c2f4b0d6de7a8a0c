"""Relations out of candidates that an index of nearest neighbours on the host has found.

Libraries of approximate search (hnswlib, faiss) give for each sample a list of neighbours, whatever their labels, the
sample itself often among them. Here those of the same label are ranked exactly.
"""

import jax
import jax.numpy as jnp

from cedarjax.distill.blocks import in_blocks
from cedarjax.distill.relations import Relations, check_samples, unit_rows


def relations_from_candidates(
    embeddings: jax.Array,
    labels: jax.Array,
    candidates: jax.Array,
    num_related: int,
    *,
    block_size: int = 1024,
    client_id: jax.Array | None = None,
) -> Relations:
    """The nearest of each sample's candidates, by the rules of `build_relations`.

    With all samples as candidates it is `build_relations`. Search each class on its own where the library can:
    otherwise ask for about `R` times the number of classes.

    Args:
      embeddings: `[M, d]` floats.
      labels: `[M]` integers.
      candidates: `[M, Q]` integers, sample indices in any order, repeated ones and the sample itself allowed; an index
        outside `[0, M)` stands for none.
      num_related: `R`, at least 1.
      block_size: samples whose candidates are gathered at once, `block_size * Q * d` numbers.
      client_id: as in `build_relations`.

    Returns:
      `Relations`, `[M, R]`.

    Raises:
      ValueError: if a shape does not fit or a count is not positive.
      TypeError: if the embeddings are not floats, or labels, candidates or ids not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> embeddings = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
      >>> candidates = jnp.array([[0, 2], [-1, 2], [1, 2]])
      >>> relations = relations_from_candidates(embeddings, jnp.zeros(3, jnp.int32), candidates, 2)
      >>> relations.index[:, 0].tolist(), relations.mask.sum(axis=1).tolist()
      ([2, 2, 1], [1, 1, 1])
    """
    embeddings, labels, candidates = jnp.asarray(embeddings), jnp.asarray(labels), jnp.asarray(candidates)
    client_id = None if client_id is None else jnp.asarray(client_id)
    check_samples(embeddings, labels, num_related, client_id, block_size)
    count = embeddings.shape[0]
    if candidates.ndim != 2 or candidates.shape[0] != count or candidates.shape[1] < 1:
        raise ValueError(f"candidates must be [M, Q] with M = {count} and Q >= 1, got the shape {candidates.shape}.")
    if not jnp.issubdtype(candidates.dtype, jnp.integer):
        raise TypeError(f"candidates must be integers, got {candidates.dtype}.")
    unit, finite = unit_rows(embeddings)

    def of_rows(part: tuple[jax.Array, jax.Array]) -> Relations:
        mine, theirs = part
        theirs = jnp.sort(theirs, axis=1)
        repeated = jnp.pad(theirs[:, 1:] == theirs[:, :-1], ((0, 0), (1, 0)))
        allowed = (theirs >= 0) & (theirs < count) & ~repeated & (theirs != mine[:, None])
        theirs = jnp.where(allowed, theirs, 0)
        allowed = allowed & finite[mine][:, None] & finite[theirs] & (labels[mine][:, None] == labels[theirs])
        if client_id is not None:
            allowed = allowed & (client_id[mine][:, None] != client_id[theirs])
        found = jnp.einsum("bd,bqd->bq", unit[mine], unit[theirs], precision=jax.lax.Precision.HIGHEST)
        found = jnp.where(allowed, jnp.where(found == 0, jnp.zeros_like(found), found), -jnp.inf)
        missing = max(num_related - found.shape[1], 0)
        found, at = jax.lax.top_k(jnp.pad(found, ((0, 0), (0, missing)), constant_values=-jnp.inf), num_related)
        mask = found > -jnp.inf
        index = jnp.take_along_axis(jnp.pad(theirs, ((0, 0), (0, missing))), at, axis=1)
        return Relations(jnp.where(mask, index, 0).astype(jnp.int32), mask)

    samples = jnp.arange(count, dtype=jnp.int32)
    return in_blocks(of_rows, (samples, candidates.astype(jnp.int32)), block_size)
