"""ANIL: MAML whose inner steps change the head alone.

Reference: Raghu, Raghu, Bengio, Vinyals, `Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of
MAML <https://arxiv.org/abs/1909.09157>`_, 2020.
"""

import optax

from cedarjax.core import LocalUpdate, LossFn, Part, Representation
from cedarjax.meta.inner import Mode
from cedarjax.meta.maml import maml


def anil(
    loss_fn: LossFn,
    inner_tx: optax.GradientTransformation,
    num_steps: int,
    adapted: Part = "head",
    *,
    first_order: bool = False,
    mode: Mode = "reverse",
    remat: bool = True,
    batch_size: int | None = None,
    query_batch_size: int | None = None,
    representation: Representation = "dense",
) -> LocalUpdate:
    """`maml` with inner steps on a part of the model; the meta-gradient is that of the whole.

    With `theta = (head, body)`: `head_{t+1} = head_t + inner_tx.update(d/d head loss(head_t, body; support))`, and
    `delta = d/d theta loss(head_m(theta), body; query)`. A device adapts the same part:
    `adapt(loss_fn, core.train_only(tx, adapted), num_steps)`.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      inner_tx: optax optimiser of the inner steps; it sees the adapted part only.
      num_steps: inner steps.
      adapted: the part that the inner steps change, see `core.in_part`.
      first_order: as in `maml`.
      mode: as in `maml`.
      remat: as in `maml`.
      batch_size: as in `maml`.
      query_batch_size: as in `maml`.
      representation: as in `maml`.

    Returns:
      A `LocalUpdate` over `ClientData` without client state, info `MamlInfo`.

    Raises:
      ValueError: as in `maml`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> loss_fn = lambda w, x, key: 0.5 * jnp.mean((w["body"] + w["head"] - x) ** 2)
      >>> params = {"body": jnp.float32(0.0), "head": jnp.float32(0.0)}
      >>> data = cj.ClientData(jnp.array([1.0, 2.0]), num_examples=jnp.int32(2), num_support=jnp.int32(1))
      >>> local = cj.meta.anil(loss_fn, optax.sgd(0.5), 1)
      >>> print(local.update(params, (), data, jax.random.key(0))[0].delta)  # (0.5 - 2) * (1 - 0.5), each
      {'body': Array(-0.75, dtype=float32), 'head': Array(-0.75, dtype=float32)}
    """
    return maml(
        loss_fn,
        inner_tx,
        num_steps,
        first_order=first_order,
        mode=mode,
        adapted=adapted,
        remat=remat,
        batch_size=batch_size,
        query_batch_size=query_batch_size,
        representation=representation,
    )
