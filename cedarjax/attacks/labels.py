"""What attacks on data share: checks of labels, and a cohort with other examples."""

import jax
import jax.numpy as jnp

from cedarjax.attacks.rows import check_byzantine
from cedarjax.core.types import Cohort, PyTree


def check_labels(labels: jax.Array, byzantine: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Checks labels and the flags of the attackers.

    Args:
      labels: `[C, ...]` integers.
      byzantine: `[C]` bool.

    Returns:
      Both as arrays.

    Raises:
      ValueError: if `labels` is a scalar or `byzantine` is missing or not `[C]`.
      TypeError: if `labels` are not integers or `byzantine` is not bool.
    """
    labels = jnp.asarray(labels)
    if labels.ndim == 0:
        raise ValueError("labels must be [C, ...], got a scalar.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}.")
    return labels, check_byzantine(byzantine, labels.shape[0])


def example_of(cohort: Cohort, key: str, argument: str) -> jax.Array:
    """One entry of the cohort's examples.

    Args:
      cohort: its `data.examples` is a dict.
      key: key of the entry.
      argument: name of the argument that holds the key, for the message.

    Returns:
      `[C, M, ...]`.

    Raises:
      ValueError: if there is no such entry.
    """
    examples = cohort.data.examples
    if not isinstance(examples, dict) or key not in examples:
        found = sorted(examples) if isinstance(examples, dict) else type(examples).__name__
        raise ValueError(f"{argument} must be a key of cohort.data.examples, got {key!r} for {found}.")
    return examples[key]


def replace_examples(cohort: Cohort, entries: dict[str, PyTree]) -> Cohort:
    """The cohort with other entries in its examples.

    Args:
      cohort: its `data.examples` is a dict.
      entries: what takes the place of the entries of the same keys.

    Returns:
      A `Cohort` that differs in these entries only.
    """
    return cohort._replace(data=cohort.data._replace(examples={**cohort.data.examples, **entries}))
