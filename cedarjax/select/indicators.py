"""Indicators of what a client has to offer, and the probabilities that they make together.

`weighted(num_selected, softmax_indicator(label_entropy(counts), data_size(dataset)))` asks large clients with balanced
labels more often.

Reference: SLMFed (IEEE Internet of Things Journal, 2024), which draws and averages clients by the mean, over the
indicators, of a softmax of each indicator scaled to [0, 1]. Where all clients have the same value that scaling is
0 / 0; here such an indicator is uniform.
"""

import jax
import jax.numpy as jnp

from cedarjax.core.dataset import FederatedDataset
from cedarjax.core.dtypes import accumulator


def data_size(dataset: FederatedDataset) -> jax.Array:
    """Examples of each client.

    Args:
      dataset: the federation.

    Returns:
      `[N]` float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from cedarjax.data import federated_dataset
      >>> print(data_size(federated_dataset(jnp.zeros(3), client_id=[0, 1, 0])))
      [2. 1.]
    """
    return dataset.counts.astype(jnp.float32)


def label_counts(dataset: FederatedDataset, labels: jax.Array, *, num_classes: int) -> jax.Array:
    """Examples of each client in each class.

    Args:
      dataset: the federation.
      labels: `[n]` integers, a leaf of `dataset.examples`; those outside `[0, num_classes)` are not counted.
      num_classes: static number of classes, `K`.

    Returns:
      `[N, K]` int32.

    Raises:
      ValueError: if `num_classes` is not positive or there is not one label an example.
      TypeError: if the labels are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from cedarjax.data import federated_dataset
      >>> dataset = federated_dataset(jnp.array([0, 2, 2]), client_id=[0, 1, 1])
      >>> print(label_counts(dataset, dataset.examples, num_classes=3))
      [[1 0 0]
       [0 0 2]]
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}.")
    if jnp.shape(labels) != (dataset.num_examples,):
        raise ValueError(f"labels must have shape [n] = [{dataset.num_examples}], got {jnp.shape(labels)}.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}.")
    rows = jnp.arange(dataset.num_examples, dtype=dataset.offsets.dtype)
    owner = jnp.searchsorted(dataset.offsets, rows, side="right") - 1
    labels = labels.astype(jnp.int32)
    column = jnp.where(labels >= 0, labels, num_classes)  # a negative index would wrap around
    counts = jnp.zeros((dataset.num_clients, num_classes), jnp.int32)
    return counts.at[owner, column].add(1, mode="drop")


def label_entropy(counts: jax.Array) -> jax.Array:
    """Entropy of each client's labels, `-sum_k q_k log q_k` in nats.

    Args:
      counts: `[N, K]`, at least 0: examples, or any mass, of each class.

    Returns:
      `[N]` float32 or wider, between 0 (one class, or no examples) and `log K`.

    Raises:
      ValueError: if `counts` has not two axes.

    Example:
      >>> import jax.numpy as jnp
      >>> print(label_entropy(jnp.array([[5, 5], [10, 0]])))
      [0.6931472 0.       ]
    """
    if counts.ndim != 2:
        raise ValueError(f"counts must have shape [N, K], got {counts.shape}.")
    if not jnp.issubdtype(counts.dtype, jnp.floating):
        counts = counts.astype(jnp.float32)
    counts = counts.astype(accumulator(counts))
    total = counts.sum(axis=1, keepdims=True)
    q = counts / jnp.where(total > 0, total, 1)
    return jnp.where(q > 0, -q * jnp.log(jnp.where(q > 0, q, 1)), 0).sum(axis=1)


def softmax_indicator(*indicators: jax.Array) -> jax.Array:
    """`p_i = mean over indicators of softmax((x - min x) / (max x - min x))_i`.

    No client has more than `e` times the probability of another. A constant indicator is uniform.

    Args:
      *indicators: `[N]` finite numbers each.

    Returns:
      `[N]` float32 with sum 1: weights for `weighted`, or for averaging.

    Raises:
      ValueError: if there is none, or their shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(softmax_indicator(jnp.array([0.0, 7.0]), jnp.array([3.0, 3.0])))
      [0.3844707 0.6155293]
    """
    shapes = {jnp.shape(x) for x in indicators}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        found = ", ".join(map(str, sorted(shapes))) or "none"
        raise ValueError(f"indicators must be at least one array of the same shape [N], got {found}.")

    def one(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        above = x - x.min()
        span = above.max()
        return jax.nn.softmax(above / jnp.where(span > 0, span, 1))

    return jnp.stack([one(x) for x in indicators], axis=1).mean(axis=1)
