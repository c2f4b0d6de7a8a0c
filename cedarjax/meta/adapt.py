"""Deployment: a device downloads the meta-model and adapts it to its own few examples."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from cedarjax.core import (
    ClientData,
    LossFn,
    Params,
    PyTree,
    batch_indices,
    check_positive,
    mean_loss,
    shuffled_epochs,
    take_rows,
)

AdaptFn = Callable[[Params, ClientData, jax.Array], tuple[Params, PyTree]]


def adapt(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    num_steps: int,
    *,
    batch_size: int | None = None,
    max_support: int | None = None,
    eval_fn: Callable[[Params, ClientData], PyTree] | None = None,
    eval_steps: Sequence[int] | None = None,
) -> AdaptFn:
    """Steps of an optimiser on a client's support set, with metrics along the way.

    `theta_{t+1} = theta_t + tx.update(grad loss(theta_t; support))`. Written for one client: `cohort_map` or vmap lifts
    it to many.

    Args:
      loss_fn: `(params, batch, key) -> scalar`.
      tx: optax optimiser.
      num_steps: steps, 0 or more.
      batch_size: support examples per step, from shuffled epochs over the support set; default: all of them, each step,
        by `core.mean_loss`.
      max_support: static bound on the support examples of a client, when it is known: without `batch_size` a step costs
        so many rows; default: the padded length `M`. Support examples beyond it are not used.
      eval_fn: `(params, data) -> metrics`; it decides what it reads, usually the query rows.
      eval_steps: numbers of steps after which `eval_fn` is called, increasing, within `[0, num_steps]`; default: all.
        In a loop over clients the other steps cost no evaluation.

    Returns:
      `run(params, data, key) -> (adapted params, history)`; the history has leaves `[num_steps + 1, ...]`, or
      `[len(eval_steps), ...]`, or is `None` without `eval_fn`. A client without support examples takes its steps with
      gradient 0.

    Raises:
      ValueError: if `num_steps` is negative, `batch_size` or `max_support` is not positive, or `eval_steps` are not
        increasing within `[0, num_steps]`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> loss_fn = lambda w, x, key: 0.5 * jnp.mean((w - x) ** 2)
      >>> run = cj.meta.adapt(loss_fn, optax.sgd(0.5), 3, eval_fn=lambda w, data: w)
      >>> data = cj.ClientData(jnp.array([8.0, 0.0]), num_examples=jnp.int32(2), num_support=jnp.int32(1))
      >>> print(run(jnp.float32(0.0), data, jax.random.key(0)))
      (Array(7., dtype=float32), Array([0., 4., 6., 7.], dtype=float32))
    """
    if num_steps < 0:
        raise ValueError(f"num_steps must be at least 0, got {num_steps}.")
    check_positive(**{k: v for k, v in {"batch_size": batch_size, "max_support": max_support}.items() if v is not None})
    told = tuple(range(num_steps + 1)) if eval_steps is None else tuple(eval_steps)
    if not told or list(told) != sorted(set(told)) or not 0 <= told[0] <= told[-1] <= num_steps:
        raise ValueError(f"eval_steps must be increasing within [0, num_steps] = [0, {num_steps}], got {told}.")

    def run(params: Params, data: ClientData, key: jax.Array) -> tuple[Params, PyTree]:
        length = jax.tree.leaves(data.examples)[0].shape[0]
        order_key, loss_key = jax.random.split(key)
        if batch_size is None:
            rows = length if max_support is None else min(length, max_support)
            mask = jnp.arange(rows, dtype=jnp.int32) < data.num_support
            support = jax.tree.map(lambda x: x[:rows], data.examples)

            def support_loss(params: Params, index: jax.Array, key: jax.Array) -> jax.Array:
                return mean_loss(loss_fn, params, support, mask, key)

        else:
            epochs = max(num_steps, 1)
            stream = shuffled_epochs(order_key, jnp.int32(0), data.num_support, length=length, num_epochs=epochs)

            def support_loss(params: Params, index: jax.Array, key: jax.Array) -> jax.Array:
                batch = take_rows(data.examples, batch_indices(stream, index, batch_size))
                return jnp.where(data.num_support > 0, loss_fn(params, batch, key), 0.0)

        def step(carry: tuple[Params, PyTree], at: tuple[jax.Array, jax.Array]) -> tuple[tuple[Params, PyTree], PyTree]:
            params, opt_state = carry
            index, is_told = at
            grads = jax.grad(support_loss)(params, index, jax.random.fold_in(loss_key, index))
            step_update, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, step_update)
            return (params, opt_state), evaluate(params, is_told)

        def evaluate(params: Params, is_told: jax.Array) -> PyTree:
            if eval_fn is None:
                return None
            shapes = jax.eval_shape(eval_fn, params, data)
            skipped = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            return jax.lax.cond(is_told, lambda: eval_fn(params, data), lambda: skipped)

        flags = jnp.zeros(num_steps + 1, bool).at[jnp.array(told)].set(True)
        start = evaluate(params, flags[0])
        steps = (jnp.arange(num_steps, dtype=jnp.int32), flags[1:])
        (adapted, _), history = jax.lax.scan(step, (params, tx.init(params)), steps)
        if eval_fn is None:
            return adapted, None
        rows = jnp.array(told)
        return adapted, jax.tree.map(lambda a, rest: jnp.concatenate([a[None], rest])[rows], start, history)

    return run
