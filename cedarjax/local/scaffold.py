"""SCAFFOLD: local steps that are corrected for the client's drift by control variates.

Reference: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, `SCAFFOLD: Stochastic Controlled Averaging for Federated
Learning <https://arxiv.org/abs/1910.06378>`_, 2020, with option II for the client's control. The paper gives every
client the same number of steps `K`; here it is the client's own, so that a straggler's control is the mean of the
gradients that it took.
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
    Upload,
    accumulator,
    displacement,
    train_epochs,
)


class ScaffoldShared(NamedTuple):
    """What the server broadcasts."""

    params: Params
    """The model's parameters."""
    control: Params
    """The server's control `c`, the mean of the controls of all clients."""


class ScaffoldState(NamedTuple):
    """What a client keeps."""

    control: Params
    """The client's control `c_i`, the mean of the gradients that it took in its last round."""


def next_control(
    control: jax.Array,
    server_control: jax.Array,
    moved: jax.Array,
    num_steps: jax.Array,
    learning_rate: float | jax.Array,
) -> jax.Array:
    """The client's next control by option II.

    `c_i <- c_i - c + (x - y_K) / (K eta)`, which is the mean of the `K` gradients; `c_i` stays where `K = 0`.

    Args:
      control: the client's, `c_i`.
      server_control: the server's, `c`.
      moved: `x - y_K`, from the received parameters to the trained ones.
      num_steps: int32 scalar, `K`.
      learning_rate: `eta`.

    Returns:
      An array like `control`.

    Example:
      >>> import jax.numpy as jnp
      >>> one = jnp.float32(1.0)
      >>> print(next_control(one, 2 * one, moved=3 * one, num_steps=jnp.int32(2), learning_rate=0.5))
      2.0
    """
    dtype = accumulator(control)
    own, server, moved = (x.astype(dtype) for x in (control, server_control, moved))
    rate = jnp.asarray(learning_rate, dtype) * jnp.maximum(num_steps, 1).astype(dtype)
    return jnp.where(num_steps > 0, own - server + moved / rate, own).astype(control.dtype)


def scaffold(
    loss_fn: LossFn,
    learning_rate: float | jax.Array,
    *,
    batch_size: int,
    num_epochs: int = 1,
    num_steps_fn: NumStepsFn | None = None,
    participation: float | jax.Array = 1.0,
) -> LocalUpdate:
    """Local epochs of SGD with the server's control in place of the client's, `y <- y - eta (g(y) - c_i + c)`.

    Both controls are uploaded and averaged as the parameters are. A client multiplies the change of its control by
    `participation`, so that under `optax.chain(robust.mean(), optax.sgd(1.0))` the server does `x <- x + mean_i (y_i -
    x)` and `c <- c + |S| / N mean_i (c_i_next - c_i)`. The server's control remains the mean of the clients' if clients
    have equal weights (`weighting="uniform"` in `run_rounds` and `take_clients`). Weights by examples need all clients
    in every round; then it is their weighted mean, and the weighted objective is what is minimised.

    For a server that takes the parameters elsewhere, say by Adam, the control keeps a rate of 1::

        optax.partition({"params": optax.adam(1e-2), "control": optax.sgd(1.0)}, ScaffoldShared("params", "control"))

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      learning_rate: `eta`, above 0; the rule fixes SGD. It may be a traced scalar.
      batch_size: examples per batch.
      num_epochs: passes over the client's examples.
      num_steps_fn: as in `core.Epochs`; a client that does no step keeps its control.
      participation: `|S| / N`, the part of all clients that takes part in a round, above 0 and at most 1.

    Returns:
      A `LocalUpdate` that shares a `ScaffoldShared`, with a `ScaffoldState` and info `LocalInfo` (its loss is the
      client's own). Controls are 0 at first, with which the first round is `local.sgd`.

    Raises:
      ValueError: if a count is not positive, or `learning_rate` or `participation` out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> curvature, optimum = jnp.array([[1.0], [4.0]]), jnp.array([[0.0], [5.0]])  # the sum is smallest at 4
      >>> loss_fn = lambda w, batch, key: 0.5 * jnp.mean(batch["a"] * (w - batch["b"]) ** 2)
      >>> one = jnp.ones(2, jnp.int32)
      >>> data = cj.ClientData({"a": curvature, "b": optimum}, num_examples=one, num_support=one)
      >>> server = optax.chain(cj.robust.mean(), optax.sgd(1.0))
      >>> def run(local):
      ...     algorithm = cj.federated_round(local, server)
      ...     state, clients = algorithm.init(jnp.float32(0.0)), jax.vmap(lambda _: local.init(jnp.float32(0.0)))(one)
      ...     for i in range(30):
      ...         cohort = cj.Cohort(data, jnp.ones(2), jnp.arange(2), clients)
      ...         state, clients, _ = algorithm.step(state, cohort, jax.random.key(i))
      ...     return local.model(state.params, clients)
      >>> plain = cj.local.sgd(loss_fn, optax.sgd(0.1), batch_size=1, num_epochs=10)
      >>> corrected = scaffold(loss_fn, 0.1, batch_size=1, num_epochs=10)
      >>> print(f"{run(plain):.2f} {run(corrected):.2f}")
      3.02 4.00
    """
    if isinstance(learning_rate, int | float) and learning_rate <= 0:
        raise ValueError(f"learning_rate must be above 0, got {learning_rate}.")
    if isinstance(participation, int | float) and not 0 < participation <= 1:
        raise ValueError(f"participation must satisfy 0 < participation <= 1, got {participation}.")
    epochs = Epochs(batch_size, num_epochs, num_steps_fn).checked()
    tx = optax.stateless_with_tree_map(lambda g, _: -jnp.asarray(learning_rate, g.dtype) * g)

    def init(params: Params) -> ScaffoldState:
        return ScaffoldState(jax.tree.map(jnp.zeros_like, params))

    def share(params: Params) -> ScaffoldShared:
        return ScaffoldShared(params, jax.tree.map(jnp.zeros_like, params))

    def model(shared: ScaffoldShared, state: ScaffoldState) -> Params:
        return shared.params

    def update(
        shared: ScaffoldShared, state: ScaffoldState, data: ClientData, key: jax.Array
    ) -> tuple[Upload, ScaffoldState, LocalInfo]:
        drift = displacement(shared.control, state.control)

        def correct(grads: Params, params: Params) -> Params:
            return jax.tree.map(jnp.add, grads, drift)

        params, info = train_epochs(loss_fn, tx, shared.params, data, key, epochs, correct)
        moved = displacement(shared.params, params)
        control = jax.tree.map(
            lambda own, server, m: next_control(own, server, m, info.num_steps, learning_rate),
            state.control,
            shared.control,
            moved,
        )
        change = jax.tree.map(
            lambda own, new: jnp.asarray(participation, own.dtype) * (own - new), state.control, control
        )
        return Upload(ScaffoldShared(moved, change)), ScaffoldState(control), info

    return LocalUpdate(init, update, share, model)
