"""Cedar's local meta update.

Reference: You, Guo, Yuen, Chen, Zhang, Poor, `A framework reforming personalized Internet of Things
by federated meta-learning <https://doi.org/10.1038/s41467-025-59217-z>`_, 2025.

First order and sequential: the query step starts where the support step ended and nothing is rolled back, so this is
neither MAML nor first-order MAML. The published code crashes on a client with fewer than two full batches; here every
client with a support and a query example takes part, its batches filled up from its own examples.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cedarjax.core import (
    ClientData,
    LocalUpdate,
    LossFn,
    Params,
    PyTree,
    Representation,
    Upload,
    check_positive,
    displacement,
    masked_scan,
    num_batches,
    optimiser_step,
    represented,
    shuffled_epochs,
    take_batch,
)


class CedarLocalInfo(NamedTuple):
    """What one client's meta update tells."""

    loss: jax.Array
    """Mean of the query losses, each taken after the support step and before the query step."""
    num_steps: jax.Array
    """int32, pairs of steps done; 0 for a client without support or without query examples."""
    rank: PyTree = ()
    """int32 a parameter: rank of its update where that is held by factors, 0 where it is dense; `()` if all are dense
    because `representation` says so."""


def cedar(
    loss_fn: LossFn,
    inner_tx: optax.GradientTransformation,
    outer_tx: optax.GradientTransformation,
    *,
    batch_size: int = 10,
    num_epochs: int = 1,
    representation: Representation = "dense",
) -> LocalUpdate:
    """Alternating steps of two optimisers over the same parameters, one on support and one on query batches.

    For each pair of batches (support `s_b`, query `q_b`), both optimisers fresh in each round::

        theta <- theta + inner_tx.update(grad loss(theta; s_b))
        theta <- theta + outer_tx.update(grad loss(theta; q_b))

    A client does `ceil(num_epochs * min(num_support, num_query) / batch_size)` pairs.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      inner_tx: optax optimiser of the support steps; the paper's example is `optax.adam(1e-3)` for both.
      outer_tx: optax optimiser of the query steps.
      batch_size: examples in each of the two batches.
      num_epochs: passes over the smaller of the two sets.
      representation: `"dense"`; `"lowrank"` to hold every matrix that enters through products by its exact factors,
        for optimisers that are linear in the gradients (SGD, momentum, weight decay); or `"auto"`, which does so where
        the factors have fewer numbers. See `core.lowrank`.

    Returns:
      A `LocalUpdate` over `ClientData` without client state, info `CedarLocalInfo`. A client without support or without
      query examples changes nothing; `data.split_support_query` makes the two sets.

    Raises:
      ValueError: if `batch_size` or `num_epochs` is not positive, the representation unknown, or `"lowrank"` with an
        optimiser that is not linear.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> loss_fn = lambda w, x, key: 0.5 * jnp.mean((w - x) ** 2)
      >>> local = cj.meta.cedar(loss_fn, optax.sgd(0.5), optax.sgd(0.25), batch_size=1)
      >>> data = cj.ClientData(jnp.array([4.0, 8.0]), num_examples=jnp.int32(2), num_support=jnp.int32(1))
      >>> upload, _, info = local.update(jnp.float32(0.0), (), data, jax.random.key(0))
      >>> print(upload.delta, info.loss)
      -3.5 18.0
    """
    check_positive(batch_size=batch_size, num_epochs=num_epochs)

    def update(
        shared: Params, client_state: PyTree, data: ClientData, key: jax.Array
    ) -> tuple[Upload, PyTree, CedarLocalInfo]:
        length = jax.tree.leaves(data.examples)[0].shape[0]
        num_query = data.num_examples - data.num_support
        support_key, query_key, loss_key = jax.random.split(key, 3)
        epochs = {"length": length, "num_epochs": num_epochs}
        support = shuffled_epochs(support_key, jnp.int32(0), data.num_support, **epochs)
        query = shuffled_epochs(query_key, data.num_support, num_query, **epochs)

        num_pairs = num_batches(jnp.minimum(data.num_support, num_query), batch_size, num_epochs)

        def pair(
            carry: tuple[Params, PyTree, PyTree], index: jax.Array
        ) -> tuple[tuple[Params, PyTree, PyTree], jax.Array]:
            params, inner, outer = carry
            inner_key, outer_key = jax.random.split(jax.random.fold_in(loss_key, index))
            support_batch, query_batch = (
                take_batch(data.examples, stream, index, batch_size) for stream in (support, query)
            )
            params, inner, _ = optimiser_step(loss_fn, inner_tx, params, inner, support_batch, inner_key)
            params, outer, loss = optimiser_step(loss_fn, outer_tx, params, outer, query_batch, outer_key)
            return (params, inner, outer), loss

        carry = (shared, inner_tx.init(shared), outer_tx.init(shared))
        # The smaller of two sets that share `length` rows has at most half of them.
        (params, _, _), loss = masked_scan(pair, carry, num_pairs, num_batches(length // 2, batch_size, num_epochs))
        return Upload(displacement(shared, params)), client_state, CedarLocalInfo(loss, num_pairs)

    def num_rows(data: ClientData) -> int:
        length = jax.tree.leaves(data.examples)[0].shape[0]
        return 2 * batch_size * num_batches(length // 2, batch_size, num_epochs)

    held = represented(update, representation, inner_tx, outer_tx, num_rows=num_rows)
    return LocalUpdate(lambda params: (), held)
