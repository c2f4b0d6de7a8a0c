"""Clients that keep models of their own and exchange knowledge in place of parameters.

Clients of one architecture form a group: their parameters and the states of their optimisers are stacked, and one
function trains them all. Groups meet only in what they know.

An algorithm over several groups takes any nest of `Group`s, a tuple or a dict say, and then cohorts, client states and
infos are nests of the same structure; a single `Group` is such a nest, and its algorithm runs in `core.run_rounds`.

Here the loss is known sample by sample. So the last batch of a client, which `core.batches` fills up from the start of
the shuffled order, counts only the samples that belong to it: every sample is learned from, read and written once an
epoch, and the bytes are those of the samples.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cedarjax.core import (
    ClientData,
    Cohort,
    Epochs,
    Params,
    PyTree,
    batch_indices,
    num_batches,
    shuffled_epochs,
    take_batch,
)
from cedarjax.core.rounds import check_cohort, client_keys

ApplyFn = Callable[[Params, jax.Array, jax.Array], jax.Array]
"""`(params, x [B, ...], key) -> logits [B, K]`; the key feeds dropout and other noise."""
FeaturesFn = Callable[[Params, jax.Array, jax.Array], jax.Array]
"""`(params, x [B, ...], key) -> [B, d]`."""
SampleLossFn = Callable[[Params, PyTree, PyTree, jax.Array], tuple[jax.Array, jax.Array]]
"""`(params, examples, knowledge, key) -> (loss of each sample [B], logits [B, K])`."""


class Group(NamedTuple):
    """Clients of one architecture."""

    apply_fn: ApplyFn
    """`(params, x [B, ...], key) -> logits [B, K]`."""
    tx: optax.GradientTransformation
    """Their optimiser, whose state a client keeps between rounds."""
    features_fn: FeaturesFn | None = None
    """`(params, x [B, ...], key) -> [B, d]`, read by `fedcache2` alone."""


class ClientModel(NamedTuple):
    """What a client keeps between rounds."""

    params: Params
    """Its own model."""
    opt_state: PyTree
    """State of its optimiser."""


class Batch(NamedTuple):
    """Rows of one step."""

    examples: PyTree
    """Leaves `[B, ...]`."""
    rows: jax.Array
    """`[B]` int32, where they lie among the client's rows."""
    counted: jax.Array
    """`[B]` bool; False for what fills up the last batch, and for all rows of a step that is not done."""


class TrainInfo(NamedTuple):
    """What one client's training tells."""

    loss: jax.Array
    """Mean of the batch losses, each taken before its step; 0 without any step."""
    num_steps: jax.Array
    """int32, optimiser steps done."""
    num_rows: jax.Array
    """int32, samples that these steps counted: `num_epochs * num_examples`, fewer for a straggler, 0 for an absent
    client. So many rows of knowledge go each way."""


def is_group(node: PyTree) -> bool:
    """Whether a node of a nest is a group.

    Args:
      node: any.

    Returns:
      A Python bool.
    """
    return isinstance(node, Group)


def init_client(group: Group, params: Params) -> ClientModel:
    """State of a client that never took part; vmap it over stacked parameters for clients that begin differently.

    Args:
      group: the client's.
      params: initial parameters.

    Returns:
      A `ClientModel`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> group = Group(lambda params, x, key: x @ params, optax.sgd(0.1, momentum=0.9))
      >>> jax.vmap(lambda params: init_client(group, params))(jnp.zeros((5, 3, 2))).params.shape
      (5, 3, 2)
    """
    # The explicit dtype makes a weak type strong, so that a step changes no type.
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), params)
    opt_state = group.tx.init(params)
    return ClientModel(params, jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), opt_state))


def init_clients(groups: PyTree, params: PyTree) -> PyTree:
    """State of one client of each group.

    Args:
      groups: nest of `Group`s.
      params: parameters of one client of each, in the same nest.

    Returns:
      Nest of `ClientModel`s.
    """
    return jax.tree.map(init_client, groups, params, is_leaf=is_group)


def split_groups(groups: PyTree) -> tuple[Sequence[Group], jax.tree_util.PyTreeDef]:
    """The groups of a nest in order, and the nest.

    Args:
      groups: nest of `Group`s.

    Returns:
      The groups, and a structure with a leaf for each.

    Raises:
      TypeError: if a leaf is not a `Group`.
      ValueError: if there is none.
    """
    leaves, structure = jax.tree.flatten(groups, is_leaf=is_group)
    for leaf in leaves:
        if not is_group(leaf):
            raise TypeError(f"groups must be a Group or a nest of them, got {type(leaf).__name__}.")
    if not leaves:
        raise ValueError("groups must hold at least one Group, got none.")
    return leaves, structure


def logits_of(group: Group, params: Params, x: jax.Array, key: jax.Array, num_classes: int | None = None) -> jax.Array:
    """The model's logits, of the shape they must have.

    Args:
      group: the client's.
      params: its parameters.
      x: `[B, ...]`.
      key: PRNG key.
      num_classes: `K`, or None for any.

    Returns:
      `[B, K]`.

    Raises:
      ValueError: if the shape is another.
    """
    logits = group.apply_fn(params, x, key)
    if logits.ndim != 2 or logits.shape[0] != x.shape[0] or logits.shape[1] != (num_classes or logits.shape[1]):
        want = (x.shape[0], "K" if num_classes is None else num_classes)
        raise ValueError(f"apply_fn must return [B, K] = {want}, got the shape {logits.shape}.")
    return logits


def client_rows(cohort: Cohort, key: jax.Array, names: Sequence[str]) -> tuple[PyTree, ...]:
    """What each client of a cohort works with, stacked.

    Args:
      cohort: its data is a `ClientData` whose examples are a dict.
      key: PRNG key of the round.
      names: entries that the examples must have.

    Returns:
      `(state, data, key, present, malicious)`, leaves `[C, ...]`; the keys are `fold_in(key, client_id)`.

    Raises:
      ValueError: if an entry is missing or the parts disagree on the client axis.
    """
    count = check_cohort(cohort)
    examples = cohort.data.examples
    missing = [name for name in names if not isinstance(examples, dict) or name not in examples]
    if missing:
        found = sorted(examples) if isinstance(examples, dict) else type(examples).__name__
        hint = " (distill.with_index adds it)" if "index" in missing else ""
        raise ValueError(f"cohort.data.examples must be a dict with {missing}{hint}, got {found}.")
    malicious = jnp.zeros(count, bool) if cohort.byzantine is None else cohort.byzantine
    return cohort.state, cohort.data, client_keys(key, cohort.client_id), cohort.weights > 0, malicious


def descend(
    loss_fn: SampleLossFn,
    tx: optax.GradientTransformation,
    model: ClientModel,
    data: ClientData,
    key: jax.Array,
    epochs: Epochs,
    present: jax.Array,
    *,
    store: PyTree = (),
    read_fn: Callable[[PyTree, PyTree], PyTree] = lambda store, examples: (),
    write_fn: Callable[[PyTree, Batch, PyTree, jax.Array], PyTree] = lambda store, batch, knowledge, logits: store,
) -> tuple[ClientModel, PyTree, TrainInfo]:
    """One client's epochs, in each step of which it reads some knowledge and writes some.

    In a step: `knowledge = read_fn(store, examples)`; a step of the optimiser on the mean of `loss_fn(params, examples,
    knowledge, key)` over the counted samples; `store = write_fn(store, batch, knowledge, logits)` with the logits that
    the loss was taken from, those before the step.

    Args:
      loss_fn: see `SampleLossFn`.
      tx: optax optimiser.
      model: where training starts, the optimiser's state included.
      data: the client's examples.
      key: PRNG key: order of the examples, the model, the number of steps.
      epochs: how long.
      present: bool scalar; an absent client does no step, whatever its data hold.
      store: what is read and written.
      read_fn: `(store, examples) -> knowledge`.
      write_fn: `(store, batch, knowledge, logits) -> store`; rows that are not counted must change nothing.

    Returns:
      The model after the last step, the store, and a `TrainInfo`.
    """
    size = epochs.batch_size
    length = jax.tree.leaves(data.examples)[0].shape[0]
    order_key, model_key, steps_key = jax.random.split(key, 3)
    stream = shuffled_epochs(order_key, jnp.int32(0), data.num_examples, length=length, num_epochs=epochs.num_epochs)
    total = stream.num_rows * epochs.num_epochs
    num_steps = num_batches(stream.num_rows, size, epochs.num_epochs)
    if epochs.num_steps_fn is not None:
        num_steps = jnp.clip(epochs.num_steps_fn(data, steps_key).astype(jnp.int32), 0, num_steps)
    num_steps = jnp.where(present, num_steps, 0)

    def step(carry: tuple[ClientModel, PyTree], index: jax.Array) -> tuple[tuple[ClientModel, PyTree], jax.Array]:
        model, store = carry
        fresh = index * size + jnp.arange(size, dtype=jnp.int32) < total
        batch = Batch(
            take_batch(data.examples, stream, index, size),
            batch_indices(stream, index, size),
            fresh & (index < num_steps),
        )
        knowledge = read_fn(store, batch.examples)

        def mean_of(params: Params, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            losses, logits = loss_fn(params, batch.examples, knowledge, key)
            mean = jnp.where(fresh, losses, jnp.zeros_like(losses)).sum() / fresh.sum().astype(losses.dtype)
            return mean, logits

        def train(model: ClientModel) -> tuple[ClientModel, jax.Array, jax.Array]:
            step_key = jax.random.fold_in(model_key, index)
            (loss, logits), grads = jax.value_and_grad(mean_of, has_aux=True)(model.params, step_key)
            update, opt_state = tx.update(grads, model.opt_state, model.params)
            return ClientModel(optax.apply_updates(model.params, update), opt_state), loss, logits

        def skip(model: ClientModel) -> tuple[ClientModel, jax.Array, jax.Array]:
            _, loss, logits = jax.eval_shape(train, model)
            return model, jnp.zeros(loss.shape, loss.dtype), jnp.zeros(logits.shape, logits.dtype)

        # What is stored stays out of the branch, so that it is written in place.
        model, loss, logits = jax.lax.cond(index < num_steps, train, skip, model)
        return (model, write_fn(store, batch, knowledge, logits)), loss

    steps = jnp.arange(epochs.max_steps(data), dtype=jnp.int32)
    (model, store), losses = jax.lax.scan(step, (model, store), steps)
    loss = losses.sum() / jnp.maximum(num_steps, 1).astype(losses.dtype)
    return model, store, TrainInfo(loss, num_steps, jnp.minimum(total, num_steps * size))
