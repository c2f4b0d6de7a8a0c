"""Backdoor: attackers teach the model to answer a trigger with a class of their choice.

References: Gu et al., `BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain
<https://arxiv.org/abs/1708.06733>`_, 2017, for the stamped trigger; Bagdasaryan et al., `How To Backdoor Federated
Learning <https://arxiv.org/abs/1807.00459>`_, 2020, for attackers who train on clean and stamped examples and scale up
what they learn (`model_replacement`).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from cedarjax.attacks.labels import check_labels, example_of, replace_examples
from cedarjax.core.types import Cohort, PyTree


def stamp(x: jax.Array, trigger: jax.Array, mask: jax.Array) -> jax.Array:
    """The input with the trigger in its place.

    Args:
      x: `[...]` one input, or many with leading axes.
      trigger: values of the trigger, of the shape of one input, or a scalar.
      mask: bool, of the shape of one input: where the trigger is.

    Returns:
      As `x`, in its dtype; to measure a backdoor, stamp the test inputs.

    Raises:
      ValueError: if the mask is not of the shape of the last axes of `x`.
      TypeError: if `mask` is not bool.

    Example:
      >>> import jax.numpy as jnp
      >>> stamp(jnp.zeros((2, 3)), jnp.float32(9.0), jnp.array([False, False, True])).tolist()
      [[0.0, 0.0, 9.0], [0.0, 0.0, 9.0]]
    """
    x, trigger, mask = jnp.asarray(x), jnp.asarray(trigger), jnp.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}.")
    if mask.ndim > x.ndim or x.shape[x.ndim - mask.ndim :] != mask.shape:
        raise ValueError(f"mask must have the shape of one input, got {mask.shape} for inputs of shape {x.shape}.")
    if trigger.ndim and trigger.shape != mask.shape:
        raise ValueError(f"trigger must be a scalar or have the shape of mask, {mask.shape}, got {trigger.shape}.")
    leading = (1,) * (x.ndim - mask.ndim)
    values = jnp.broadcast_to(trigger.astype(x.dtype), mask.shape)
    return jnp.where(mask.reshape(leading + mask.shape), values.reshape(leading + mask.shape), x)


def _spread(num_rows: int, fraction: float) -> jax.Array:
    """`[M]` bool: among the first `m` rows, `floor(m * fraction)` for every `m`."""
    passed = [math.floor(m * fraction + 1e-9) for m in range(num_rows + 1)]
    return jnp.array([b > a for a, b in zip(passed, passed[1:], strict=False)], bool)


def _poisoned_rows(cohort: Cohort, num_rows: int, fraction: float, key: jax.Array | None) -> jax.Array:
    """`[C, M]` bool, the rows that every client would poison."""
    if key is None:
        return jnp.broadcast_to(_spread(num_rows, fraction)[None], (cohort.client_id.shape[0], num_rows))
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(cohort.client_id)
    return jax.vmap(lambda k: jax.random.uniform(k, (num_rows,), jnp.float32))(keys) < fraction


def backdoor_cohort(
    cohort: Cohort,
    trigger_fn: Callable[[PyTree], PyTree],
    target: int,
    fraction: float = 0.5,
    *,
    key: jax.Array | None = None,
    input_key: str = "x",
    label_key: str = "y",
) -> Cohort:
    """The cohort with a share of the examples of its byzantine clients stamped and labelled `target`.

    Without a key the share is spread evenly over a client's rows: of the first `m` rows `floor(m * fraction)` are
    poisoned, so that support and query get theirs. With a key every row is drawn on its own, from `fold_in(key,
    client_id)`: order and shards of the clients change nothing.

    Args:
      cohort: its `data.examples` is a dict that holds inputs `[C, M, ...]` and labels `[C, M]`; its `byzantine` flags
        the attackers.
      trigger_fn: stamps one input `[...]`, for instance `lambda x: stamp(x, trigger, mask)`.
      target: the class that the trigger is to call up, at least 0.
      fraction: share of an attacker's examples that are poisoned, in `[0, 1]`.
      key: PRNG key for a random choice of rows.
      input_key: key of the inputs.
      label_key: key of the labels.

    Returns:
      A `Cohort` that differs in these inputs and labels only.

    Raises:
      ValueError: if `target` or `fraction` is out of range, `cohort.byzantine` is missing or the examples lack a key.
      TypeError: if the labels are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from cedarjax.core import ClientData, Cohort
      >>> two = jnp.full(2, 2, jnp.int32)
      >>> examples = {"x": jnp.zeros((2, 2)), "y": jnp.zeros((2, 2), jnp.int32)}
      >>> data = ClientData(examples, num_examples=two, num_support=two)
      >>> cohort = Cohort(data, jnp.ones(2), jnp.arange(2), byzantine=jnp.array([True, False]))
      >>> poisoned = backdoor_cohort(cohort, lambda x: x + 1.0, target=3, fraction=0.5).data.examples
      >>> poisoned["x"].tolist(), poisoned["y"].tolist()
      ([[0.0, 1.0], [0.0, 0.0]], [[0, 3], [0, 0]])
    """
    if target < 0:
        raise ValueError(f"target must be at least 0, got {target}.")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}.")
    inputs = example_of(cohort, input_key, "input_key")
    labels, flags = check_labels(example_of(cohort, label_key, "label_key"), cohort.byzantine)
    rows = flags[:, None] & _poisoned_rows(cohort, labels.shape[1], fraction, key)

    def poison(x: jax.Array, stamped: jax.Array) -> jax.Array:
        return jnp.where(rows.reshape(rows.shape + (1,) * (x.ndim - 2)), stamped.astype(x.dtype), x)

    stamped = jax.tree.map(poison, inputs, jax.vmap(jax.vmap(trigger_fn))(inputs))
    renamed = jnp.where(rows, jnp.asarray(target, labels.dtype), labels)
    return replace_examples(cohort, {input_key: stamped, label_key: renamed})
