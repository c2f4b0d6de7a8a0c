"""FedALA: a client learns, number by number, how much of the shared model to take over before it trains.

Reference: Zhang, Hua, Wang, Song, Xue, Ma, Guan, `FedALA: Adaptive Local Aggregation for Personalized Federated
Learning <https://arxiv.org/abs/2212.01197>`_, 2023. The paper lets the weights of a client's first aggregation
converge, and does one pass over its sample in every later one. When they have converged it leaves open; the published
code asks for a standard deviation below 0.1 of the losses of the last 10 passes, which is the default here, with the
mean loss of a pass for that of its last batch, and a bound on the number of passes. In a client's first round, before
it has a model of its own, it starts from the shared one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cedarjax.core import (
    ClientData,
    Epochs,
    LocalInfo,
    LocalUpdate,
    LossFn,
    NumStepsFn,
    Params,
    Part,
    PyTree,
    Stream,
    Upload,
    check_positive,
    displacement,
    merge,
    num_batches,
    partition,
    shuffled_epochs,
    train,
    train_epochs,
)


class FedALAState(NamedTuple):
    """What a client keeps."""

    params: Params
    """The model that it trained in its last round."""
    weights: Params
    """How much of the shared model to take, in [0, 1], for every number of the adapted part; `None` elsewhere."""
    num_rounds: jax.Array
    """int32 scalar, rounds that the client took part in."""


class FedALAInfo(NamedTuple):
    """What a client tells."""

    local: LocalInfo
    """Of the training."""
    weight_loss: jax.Array
    """Mean loss of the last pass over the weights' sample, 0 if there was none."""
    num_passes: jax.Array
    """int32, passes over the weights' sample."""
    mean_weight: jax.Array
    """Mean of the weights after them: 1 takes the shared model, 0 the client's own."""


class Passes(NamedTuple):
    """How the weights are learnt; the arguments of `fedala` by shorter names."""

    rate: float | jax.Array
    """Learning rate."""
    fraction: float
    """Part of the client's examples that is drawn for them in every round."""
    tol: float | jax.Array
    """Standard deviation of the losses of the last passes below which they have settled."""
    window: int
    """Passes that are looked at for that."""
    max_passes: int
    """The most passes of the first aggregation."""

    def checked(self) -> "Passes":
        """The same, or an error.

        Returns:
          Itself.

        Raises:
          ValueError: if a number is out of range.
        """
        check_positive(window=self.window, max_passes=self.max_passes)
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must satisfy 0 < fraction <= 1, got {self.fraction}.")
        for name, value in (("weight_rate", self.rate), ("tol", self.tol)):
            if isinstance(value, int | float) and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}.")
        return self


def aggregate(own: Params, shared: Params, weights: Params, adapted: Part) -> Params:
    """Takes over a part of the shared model, `own + (shared - own) * weights` on the adapted part, `shared` elsewhere.

    Args:
      own: the client's model.
      shared: the received model.
      weights: in [0, 1], with `None` outside the adapted part.
      adapted: the adapted part, see `core.in_part`.

    Returns:
      Parameters to start training from.

    Raises:
      ValueError: as in `core.in_part`.

    Example:
      >>> print(aggregate({"body": 1.0, "head": 1.0}, {"body": 3.0, "head": 3.0}, {"body": None, "head": 0.25}, "head"))
      {'body': 3.0, 'head': 1.5}
    """
    theirs, rest = partition(shared, adapted)
    mixed = jax.tree.map(lambda o, s, w: o + (s - o) * w, partition(own, adapted)[0], theirs, weights)
    return merge(mixed, rest)


def sample(key: jax.Array, data: ClientData, fraction: float) -> Stream:
    """One shuffled pass over a random part of a client's examples.

    Args:
      key: PRNG key of the sample; the same for all passes over it.
      data: the client's examples.
      fraction: part of them, rounded to whole examples, at least one.

    Returns:
      A `core.Stream` of one epoch.
    """
    length = jax.tree.leaves(data.examples)[0].shape[0]
    stream = shuffled_epochs(key, jnp.int32(0), data.num_examples, length=length, num_epochs=1)
    wanted = jnp.round(jnp.float32(fraction) * data.num_examples.astype(jnp.float32)).astype(jnp.int32)
    return stream._replace(num_rows=jnp.clip(wanted, 1, data.num_examples))


def learn_weights(
    loss_fn: LossFn,
    own: Params,
    shared: Params,
    weights: Params,
    data: ClientData,
    key: jax.Array,
    max_passes: jax.Array,
    *,
    adapted: Part,
    batch_size: int,
    passes: Passes,
) -> tuple[Params, jax.Array, jax.Array]:
    """Passes of projected SGD, `W <- clip(W - rate * grad loss(aggregate(W)) * (shared - own), 0, 1)`.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      own: the client's model.
      shared: the received model.
      weights: where the weights start.
      data: the client's examples.
      key: PRNG key: the sample, its order, the loss.
      max_passes: int32 scalar; passes end before it when the losses have settled.
      adapted: the adapted part.
      batch_size: examples per batch.
      passes: how long and how fast.

    Returns:
      The weights, the mean loss of the last pass, and the number of passes.
    """
    sample_key, order_key, loss_key = jax.random.split(key, 3)
    length = jax.tree.leaves(data.examples)[0].shape[0]
    chosen = sample(sample_key, data, passes.fraction)

    def loss_of(weights: Params, batch: PyTree, key: jax.Array) -> jax.Array:
        return loss_fn(aggregate(own, shared, weights, adapted), batch, key)

    def project(grad: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.clip(w - jnp.asarray(passes.rate, w.dtype) * grad, 0, 1) - w

    def one_pass(carry: tuple) -> tuple:
        done, weights, losses = carry
        key = jax.random.fold_in(order_key, done)
        order = shuffled_epochs(key, jnp.int32(0), chosen.num_rows, length=length, num_epochs=1)
        weights, loss = train(
            loss_of,
            optax.stateless_with_tree_map(project),
            weights,
            data.examples,
            chosen._replace(orders=chosen.orders[0][order.orders]),
            jax.random.fold_in(loss_key, done),
            batch_size=batch_size,
            num_steps=num_batches(chosen.num_rows, batch_size, 1),
            max_steps=num_batches(min(length, round(passes.fraction * length) + 1), batch_size, 1),
        )
        # The step w + (clip(..) - w) may miss the bound by a rounding.
        weights = jax.tree.map(lambda w: jnp.clip(w, 0, 1), weights)
        return done + 1, weights, jnp.append(losses[1:], loss.astype(losses.dtype))

    def goes_on(carry: tuple) -> jax.Array:
        done, _, losses = carry
        settled = (done >= passes.window) & (losses.std() < passes.tol)
        return (done < max_passes) & ~settled

    # A loop, unlike a scan of bounded length, costs no more passes than there are: one, but for the first aggregation.
    start = (jnp.zeros((), jnp.int32), weights, jnp.zeros(passes.window, jnp.float32))
    done, weights, losses = jax.lax.while_loop(goes_on, one_pass, start)
    return weights, losses[-1], done


def fedala(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    adapted: Part = "head",
    *,
    weight_rate: float | jax.Array = 1.0,
    fraction: float = 0.8,
    tol: float | jax.Array = 0.1,
    window: int = 10,
    max_passes: int = 50,
    batch_size: int,
    num_epochs: int = 1,
    num_steps_fn: NumStepsFn | None = None,
) -> LocalUpdate:
    """Local epochs from a mixture of the client's model and the shared one, whose weights are learnt first.

    The client starts from `aggregate(own, shared, weights, adapted)`, trains, keeps the trained model, and uploads how
    far it is from the shared one: the server averages the trained models.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      tx: optax optimiser of the training; runs from `tx.init` in every round.
      adapted: the part that is mixed, see `core.in_part`, in the paper the last layers; the rest is taken over.
      weight_rate: learning rate of the weights, at least 0. It may be a traced scalar.
      fraction: part of the client's examples that is drawn for the weights in every round, above 0 and at most 1.
      tol: the client's first aggregation ends when the losses of its last `window` passes have a smaller standard
        deviation than this. 0 takes all `max_passes`.
      window: passes that are looked at, which is also the least number of passes.
      max_passes: the most passes of a client's first aggregation; later ones have one pass.
      batch_size: examples per batch, of the weights' steps too.
      num_epochs: passes over the client's examples when it trains.
      num_steps_fn: as in `core.Epochs`, for the training.

    Returns:
      A `LocalUpdate` with a `FedALAState` and info `FedALAInfo`. Its `model` is what the client trained last, or the
      shared one for a client that never took part. Weights are found in a `while_loop`, so that nothing can be
      differentiated through it backwards.

    Raises:
      ValueError: if a number is out of range (here), or `adapted` is not a part of the model (when `init` is traced).

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> loss_fn = lambda w, x, key: 0.5 * jnp.mean((w["body"] + w["head"] - x) ** 2)
      >>> local = fedala(loss_fn, optax.sgd(0.0), "head", batch_size=1)
      >>> data = cj.ClientData(jnp.array([4.0]), num_examples=jnp.int32(1), num_support=jnp.int32(1))
      >>> shared = {"body": jnp.float32(0.0), "head": jnp.float32(0.0)}
      >>> state = local.init(shared | {"head": jnp.float32(4.0)})._replace(num_rounds=jnp.int32(1))
      >>> _, state, info = local.update(shared, state, data, jax.random.key(0))
      >>> print(state.weights["head"], state.params["head"])  # its own head was right
      0.0 4.0
    """
    passes = Passes(weight_rate, fraction, tol, window, max_passes).checked()
    epochs = Epochs(batch_size, num_epochs, num_steps_fn).checked()

    def init(params: Params) -> FedALAState:
        weights = jax.tree.map(jnp.ones_like, partition(params, adapted)[0])
        return FedALAState(params, weights, jnp.zeros((), jnp.int32))

    def model(shared: Params, state: FedALAState) -> Params:
        return jax.tree.map(lambda own, s: jnp.where(state.num_rounds > 0, own, s), state.params, shared)

    def update(
        shared: Params, state: FedALAState, data: ClientData, key: jax.Array
    ) -> tuple[Upload, FedALAState, FedALAInfo]:
        train_key, weight_key = jax.random.split(key)
        own = model(shared, state)
        # None in the first round, many in the second, then one.
        most = jnp.where(state.num_rounds == 1, max_passes, jnp.minimum(state.num_rounds, 1))
        weights, weight_loss, num_passes = learn_weights(
            loss_fn,
            own,
            shared,
            state.weights,
            data,
            weight_key,
            most,
            adapted=adapted,
            batch_size=batch_size,
            passes=passes,
        )
        start = aggregate(own, shared, weights, adapted)
        params, local = train_epochs(loss_fn, tx, start, data, train_key, epochs)
        leaves = jax.tree.leaves(weights)
        total = sum((w.astype(jnp.float32).sum() for w in leaves), start=jnp.zeros((), jnp.float32))
        info = FedALAInfo(local, weight_loss, num_passes, total / sum(w.size for w in leaves))
        state = FedALAState(params, weights, state.num_rounds + 1)
        return Upload(displacement(shared, params)), state, info

    return LocalUpdate(init, update, model=model)
