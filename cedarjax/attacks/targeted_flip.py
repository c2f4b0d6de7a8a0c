"""Targeted flip: attackers train honestly on one class under the name of another.

Reference: Tolpegin et al., `Data Poisoning Attacks Against Federated Learning Systems
<https://arxiv.org/abs/2007.08432>`_, 2020.
"""

import jax
import jax.numpy as jnp

from cedarjax.attacks.labels import check_labels, example_of, replace_examples
from cedarjax.attacks.rows import overwrite_rows
from cedarjax.core.types import Cohort


def targeted_flip(labels: jax.Array, byzantine: jax.Array | None, source: int, target: int) -> jax.Array:
    """Maps the labels `source` of flagged clients to `target`.

    Args:
      labels: `[C, ...]` integers; `[C, M]` for a cohort, or `[n]` for a flat data set with one flag a row.
      byzantine: `[C]` bool.
      source: the class that is renamed, at least 0.
      target: its new name, at least 0 and another one.

    Returns:
      Labels of the same shape and dtype.

    Raises:
      ValueError: if `source` or `target` is out of range, `labels` is a scalar or `byzantine` is missing or not `[C]`.
      TypeError: if `labels` are not integers or `byzantine` is not bool.

    Example:
      >>> import jax.numpy as jnp
      >>> labels = jnp.array([[0, 1, 2], [0, 1, 2]])
      >>> targeted_flip(labels, jnp.array([False, True]), source=0, target=2).tolist()
      [[0, 1, 2], [2, 1, 2]]
    """
    if source < 0 or target < 0 or source == target:
        raise ValueError(f"source and target must be two classes, at least 0, got {source} and {target}.")
    labels, flags = check_labels(labels, byzantine)
    return overwrite_rows(flags, labels, jnp.where(labels == source, jnp.asarray(target, labels.dtype), labels))


def targeted_flip_cohort(cohort: Cohort, source: int, target: int, *, label_key: str = "y") -> Cohort:
    """The cohort with one class of its byzantine clients renamed, support and query alike.

    Args:
      cohort: its `data.examples` is a dict that holds the labels, `[C, M]`; its `byzantine` flags the attackers.
      source: the class that is renamed.
      target: its new name.
      label_key: key of the labels.

    Returns:
      A `Cohort` that differs in these labels only.

    Raises:
      ValueError: if `cohort.byzantine` is missing or the examples hold no `label_key`; see also `targeted_flip`.

    Example:
      >>> import jax.numpy as jnp
      >>> from cedarjax.core import ClientData, Cohort
      >>> two = jnp.full(2, 2, jnp.int32)
      >>> data = ClientData({"y": jnp.array([[0, 1], [0, 1]])}, num_examples=two, num_support=two)
      >>> cohort = Cohort(data, jnp.ones(2), jnp.arange(2), byzantine=jnp.array([True, False]))
      >>> targeted_flip_cohort(cohort, source=1, target=7).data.examples["y"].tolist()
      [[0, 7], [0, 1]]
    """
    labels = targeted_flip(example_of(cohort, label_key, "label_key"), cohort.byzantine, source, target)
    return replace_examples(cohort, {label_key: labels})
