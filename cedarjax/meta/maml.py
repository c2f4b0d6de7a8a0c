"""MAML and first-order MAML as a client's work.

Reference: Finn, Abbeel, Levine, `Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks
<https://arxiv.org/abs/1703.03400>`_, 2017.

A client uploads its meta-gradient, so one round is one step of the server's optimiser on the mean over clients, as in
Chen, Luo, Dong, Li, He, `Federated Meta-Learning with Fast Convergence and Efficient Communication
<https://arxiv.org/abs/1802.07876>`_, 2018 (FedMeta).

Second order needs an inner optimiser with a derivative. `optax.sgd`, momentum and weight decay have one everywhere. Two
do not where a gradient is exactly 0, as for a unit that no example reaches, or a client without support examples, and
the meta-gradient is NaN: Adam and its relatives with `eps_root=0`, whose square root has an infinite slope there (give
`eps_root > 0`), and `optax.clip_by_global_norm`, which divides by the norm (take `meta.clip_by_global_norm`).
"""

from typing import NamedTuple

import jax
import optax

from cedarjax.core import (
    ClientData,
    LocalUpdate,
    LossFn,
    Params,
    Part,
    PyTree,
    Representation,
    Upload,
    represented,
)
from cedarjax.meta.inner import Mode, check_options, inner_loop, objectives


class MamlInfo(NamedTuple):
    """What one client's meta-gradient tells."""

    loss: jax.Array
    """Query loss after the inner steps: the meta objective."""
    support_loss: jax.Array
    """Loss of the first inner step, before any adaptation."""
    rank: PyTree = ()
    """int32 a parameter: rank of its update where that is held by factors, 0 where it is dense; `()` if all are dense
    because `representation` says so."""


def maml(
    loss_fn: LossFn,
    inner_tx: optax.GradientTransformation,
    num_steps: int,
    *,
    first_order: bool = False,
    mode: Mode = "reverse",
    adapted: Part | None = None,
    remat: bool = True,
    batch_size: int | None = None,
    query_batch_size: int | None = None,
    representation: Representation = "dense",
) -> LocalUpdate:
    """The exact gradient of the adapted loss with respect to the initialisation.

    `delta = d/d theta loss(theta_m(theta); query)`, where `theta_0 = theta` and
    `theta_{t+1} = theta_t + inner_tx.update(grad loss(theta_t; support))`.

    With `mode="mixed"` the backward pass multiplies by the Hessian of each step, forward over reverse. For one step of
    SGD at rate `a` that is the closed form, `(I - a H(theta; support)) grad loss(theta_1; query)`: one Hessian-vector
    product and no graph.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      inner_tx: optax optimiser of the inner steps; differentiable unless `first_order`.
      num_steps: inner steps `m`.
      first_order: take `d theta_m / d theta` as the identity.
      mode: `"reverse"` differentiates the inner gradients reverse over reverse, `"mixed"` by
        `core.mixed_value_and_grad`: the same numbers to rounding.
      adapted: the part that the inner steps change, see `core.in_part`; default: everything. The meta-gradient is that
        of all parameters, and no step keeps a copy of the others.
      remat: compute each inner step again in the backward pass. Memory then grows by one copy of what is adapted and of
        the optimiser's state per inner step, and no longer by all activations. With `mode="mixed"` no activations
        are kept either way; what is computed again is the gradient, and only if the optimiser is not linear in it.
      batch_size: support examples per inner step, from shuffled epochs over the support set; default: all of them, each
        step. The default takes the exact mean over a ragged set by `core.mean_loss`, which asks for a loss that is a
        mean over examples; beyond 1024 rows it goes through them in blocks, so that memory does not grow with them.
      query_batch_size: query examples in the outer loss; default: all of them.
      representation: `"dense"`; `"lowrank"` to hold every matrix that enters through products by its exact factors,
        for optimisers that are linear in the gradients (SGD, momentum, weight decay); or `"auto"`, which does so where
        the factors have fewer numbers. See `core.lowrank`.

    Returns:
      A `LocalUpdate` over `ClientData` without client state, info `MamlInfo`. Its delta is a gradient, so the server
      needs an optimiser with a learning rate. A client without support examples takes its inner steps with gradient 0.

    Raises:
      ValueError: if a count is not positive, the mode or the representation unknown, or `"lowrank"` with an optimiser
        that is not linear (here); or if `adapted` is not a part of the parameters (when `update` is traced).

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> loss_fn = lambda w, x, key: 0.5 * jnp.mean((w - x) ** 2)
      >>> data = cj.ClientData(jnp.array([1.0, 2.0]), num_examples=jnp.int32(2), num_support=jnp.int32(1))
      >>> local = cj.meta.maml(loss_fn, optax.sgd(0.5), 1)
      >>> print(local.update(jnp.float32(0.0), (), data, jax.random.key(0))[0].delta)  # (0.5 - 2) * (1 - 0.5)
      -0.75
    """
    check_options(num_steps=num_steps, mode=mode, batch_size=batch_size, query_batch_size=query_batch_size)

    def update(
        shared: Params, client_state: PyTree, data: ClientData, key: jax.Array
    ) -> tuple[Upload, PyTree, MamlInfo]:
        support, query_loss = objectives(
            loss_fn, data, key, num_steps=num_steps, batch_size=batch_size, query_batch_size=query_batch_size
        )

        def meta_loss(params: Params) -> tuple[jax.Array, jax.Array]:
            params, before = inner_loop(
                support,
                inner_tx,
                params,
                num_steps,
                first_order=first_order,
                mode=mode,
                adapted=adapted,
                remat=remat,
            )
            return query_loss(params), before

        (loss, before), delta = jax.value_and_grad(meta_loss, has_aux=True)(shared)
        return Upload(delta), client_state, MamlInfo(loss, before)

    def num_rows(data: ClientData) -> int:
        length = jax.tree.leaves(data.examples)[0].shape[0]
        support, query = (length if size is None else size for size in (batch_size, query_batch_size))
        return query if first_order else 2 * num_steps * support + query

    held = represented(update, representation, inner_tx, num_rows=num_rows)
    return LocalUpdate(lambda params: (), held)
