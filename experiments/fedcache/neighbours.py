"""Related samples by a graph of near neighbours on the host, where there are too many for all pairs.

Reference: Malkov and Yashunin, `Efficient and robust approximate nearest neighbor search using Hierarchical Navigable
Small World graphs <https://arxiv.org/abs/1603.09320>`_ (2018), through the optional package hnswlib.
"""

import jax.numpy as jnp
import numpy as np

from cedarjax import distill


def hnsw_relations(
    embeddings: np.ndarray, labels: np.ndarray, num_related: int, *, seed: int = 0, breadth: int = 100
) -> distill.Relations:
    """As `distill.build_relations`, from the candidates that one graph a class finds; the rest is exact.

    Args:
      embeddings: `[M, d]` floats.
      labels: `[M]` integers.
      num_related: `R`.
      seed: of the graphs, which are built in one thread so that they are the same each time.
      breadth: candidates that are looked at (hnswlib's `ef`); more of them, more are found.

    Returns:
      `Relations`, of which `distill.recall` tells how good they are.

    Raises:
      ValueError: if hnswlib is not installed.
    """
    try:
        import hnswlib
    except ImportError as error:
        raise ValueError("index must be 'exact' without hnswlib: pip install 'cedarjax[ann]'.") from error
    candidates = np.full((len(labels), num_related + 1), -1, np.int32)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        graph = hnswlib.Index(space="cosine", dim=embeddings.shape[1])
        graph.init_index(
            max_elements=len(rows), ef_construction=max(2 * breadth, num_related + 1), M=16, random_seed=seed
        )
        graph.add_items(embeddings[rows], np.arange(len(rows)), num_threads=1)
        graph.set_ef(max(breadth, num_related + 1))
        count = min(num_related + 1, len(rows))
        found, _ = graph.knn_query(embeddings[rows], k=count, num_threads=1)
        candidates[rows, :count] = rows[found.astype(np.int64)]
    return distill.relations_from_candidates(
        jnp.asarray(embeddings), jnp.asarray(labels), jnp.asarray(candidates), num_related
    )
