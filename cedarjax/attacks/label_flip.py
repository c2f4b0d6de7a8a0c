"""Label flip: attackers train honestly on wrong labels.

Reference: Tolpegin et al., `Data Poisoning Attacks Against Federated Learning Systems
<https://arxiv.org/abs/2007.08432>`_, 2020; the mapping of every class `y` to `K - 1 - y` follows Fang et al., `Local
Model Poisoning Attacks to Byzantine-Robust Federated Learning <https://arxiv.org/abs/1911.11815>`_, 2020.
"""

import jax

from cedarjax.attacks.labels import check_labels, example_of, replace_examples
from cedarjax.attacks.rows import overwrite_rows
from cedarjax.core.types import Cohort


def label_flip(labels: jax.Array, byzantine: jax.Array | None, num_classes: int) -> jax.Array:
    """Maps the labels `y` of flagged clients to `num_classes - 1 - y`.

    Args:
      labels: `[C, ...]` integers in `[0, num_classes)`; `[C, M]` for a cohort, or `[n]` for a flat data set with one
        flag a row.
      byzantine: `[C]` bool.
      num_classes: `K`, at least 2. With an odd `K` the middle class stays.

    Returns:
      Labels of the same shape and dtype.

    Raises:
      ValueError: if `num_classes` is out of range, `labels` is a scalar or `byzantine` is missing or not `[C]`.
      TypeError: if `labels` are not integers or `byzantine` is not bool.

    Example:
      >>> import jax.numpy as jnp
      >>> label_flip(jnp.array([[0, 1, 2], [0, 1, 2]]), jnp.array([False, True]), num_classes=3).tolist()
      [[0, 1, 2], [2, 1, 0]]
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
    labels, flags = check_labels(labels, byzantine)
    return overwrite_rows(flags, labels, num_classes - 1 - labels)


def flip_cohort(cohort: Cohort, num_classes: int, *, label_key: str = "y") -> Cohort:
    """The cohort with the labels of its byzantine clients flipped, support and query alike.

    Args:
      cohort: its `data.examples` is a dict that holds the labels, `[C, M]`; its `byzantine` flags the attackers.
      num_classes: `K`, at least 2.
      label_key: key of the labels.

    Returns:
      A `Cohort` that differs in these labels only.

    Raises:
      ValueError: if `cohort.byzantine` is missing or the examples hold no `label_key`; see also `label_flip`.

    Example:
      >>> import jax.numpy as jnp
      >>> from cedarjax.core import ClientData, Cohort
      >>> two = jnp.full(2, 2, jnp.int32)
      >>> data = ClientData({"y": jnp.array([[0, 1], [0, 1]])}, num_examples=two, num_support=two)
      >>> cohort = Cohort(data, jnp.ones(2), jnp.arange(2), byzantine=jnp.array([True, False]))
      >>> flip_cohort(cohort, num_classes=5).data.examples["y"].tolist()
      [[4, 3], [0, 1]]
    """
    labels = label_flip(example_of(cohort, label_key, "label_key"), cohort.byzantine, num_classes)
    return replace_examples(cohort, {label_key: labels})
