"""Finding the data whose simulated upload is the observed one, by gradient descent on the data.

Reference: the loop that Zhu et al. (`dlg.py`) and Geiping et al. (`inverting_gradients.py`) share. A restart keeps the
best of the points that it visited rather than the last one, so that a diverging optimiser costs nothing but its steps,
and the best restart is told by the objective alone, as an attacker must.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from cedarjax.attacks.inversion.distances import squared_distance
from cedarjax.attacks.inversion.simulate import SimulateFn
from cedarjax.core.batches import check_positive
from cedarjax.core.types import PyTree

DistanceFn = Callable[[PyTree, PyTree, PyTree | None], jax.Array]
"""`distance_fn(simulated, observed, mask) -> scalar`."""
Guess = TypeVar("Guess")


class MatchInfo(NamedTuple):
    """What a search tells."""

    objective: jax.Array
    """`[num_restarts, num_steps + 1]` float: at the start and after each step; Inf where it was not finite."""
    chosen: jax.Array
    """int32 scalar, the restart whose guess is returned."""
    value: jax.Array
    """Scalar, objective of that guess; Inf where no finite one was met, and then the guess is a start."""


def match(
    simulate_fn: SimulateFn,
    observed: PyTree,
    start_fn: Callable[[jax.Array], Guess],
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    num_steps: int,
    num_restarts: int = 1,
    mask: PyTree | None = None,
    distance_fn: DistanceFn = squared_distance,
    prior_fn: Callable[[Guess], jax.Array] | None = None,
    project_fn: Callable[[Guess], Guess] | None = None,
) -> tuple[Guess, MatchInfo]:
    """Minimises `distance_fn(simulate_fn(guess, key), observed, mask) + prior_fn(guess)` over the guess.

    Written for one victim; vmap it over victims. Restarts are vmapped.

    Args:
      simulate_fn: differentiable map from a guess of the data and a key to an upload.
      observed: the upload; what the mask leaves out may hold anything.
      start_fn: `key -> guess`, a tree of floats.
      tx: optax optimiser; `optax.lbfgs` and others that search along a line get what they need.
      key: PRNG key. All steps and restarts simulate with `fold_in(key, 0)`; restart `r` starts from
        `fold_in(key, r + 1)`. To fix the client's own key, let `simulate_fn` ignore this one.
      num_steps: steps of the optimiser.
      num_restarts: starts.
      mask: tree shaped like `observed` of scalars or arrays, above 0 where something was sent; everything by default.
      distance_fn: `(simulated, observed, mask) -> scalar`.
      prior_fn: `guess -> scalar`, added; nothing by default.
      project_fn: `guess -> guess` after the start and after every step, for bounds.

    Returns:
      The best guess, and a `MatchInfo`.

    Raises:
      ValueError: if a number is below 1, or upload and observation differ in structure or shapes.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> simulate_fn = lambda guess, key: {"a": guess**2, "b": 3 * guess}
      >>> observed, mask = {"a": jnp.array([4.0]), "b": jnp.array([jnp.nan])}, {"a": 1.0, "b": 0.0}
      >>> guess, info = match(
      ...     simulate_fn, observed, lambda key: jnp.ones(1), optax.sgd(0.5), jax.random.key(0), num_steps=50, mask=mask
      ... )
      >>> print(guess.round(3), info.objective.shape)
      [2.] (1, 51)
    """
    check_positive(num_steps=num_steps, num_restarts=num_restarts)
    tx = optax.with_extra_args_support(tx)
    simulation_key = jax.random.fold_in(key, 0)
    project = (lambda guess: guess) if project_fn is None else project_fn

    def objective(guess: Guess) -> jax.Array:
        simulated = simulate_fn(guess, simulation_key)
        _check_same(simulated, observed)
        value = distance_fn(simulated, observed, mask)
        return value if prior_fn is None else value + prior_fn(guess)

    def keep(
        best: tuple[Guess, jax.Array], guess: Guess, value: jax.Array
    ) -> tuple[tuple[Guess, jax.Array], jax.Array]:
        value = jnp.where(jnp.isfinite(value), value, jnp.asarray(jnp.inf, value.dtype))
        better = value < best[1]
        kept = jax.tree.map(lambda new, old: jnp.where(better, new, old), guess, best[0])
        return (kept, jnp.where(better, value, best[1])), value

    def search(start_key: jax.Array) -> tuple[Guess, jax.Array, jax.Array]:
        start = project(start_fn(start_key))

        def step(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
            guess, state, best = carry
            value, gradient = jax.value_and_grad(objective)(guess)
            best, told = keep(best, guess, value)
            # The search along a line evaluates the objective itself; other optimisers ignore these.
            change, state = tx.update(gradient, state, guess, value=value, grad=gradient, value_fn=objective)
            return (project(optax.apply_updates(guess, change)), state, best), told

        dtype = jax.eval_shape(objective, start).dtype
        best = start, jnp.asarray(jnp.inf, dtype)
        (last, _, best), told = jax.lax.scan(step, (start, tx.init(start), best), None, length=num_steps)
        best, value = keep(best, last, objective(last))
        return *best, jnp.concatenate([told, value[None]])

    starts = jax.vmap(lambda r: jax.random.fold_in(key, r))(jnp.arange(1, num_restarts + 1, dtype=jnp.uint32))
    guesses, values, told = jax.vmap(search)(starts)
    chosen = jnp.argmin(values).astype(jnp.int32)
    return jax.tree.map(lambda x: x[chosen], guesses), MatchInfo(told, chosen, values[chosen])


def _check_same(simulated: PyTree, observed: PyTree) -> None:
    if jax.tree.structure(simulated) != jax.tree.structure(observed):
        raise ValueError(
            f"observed must have the structure of a simulated upload, {jax.tree.structure(simulated)}, got "
            f"{jax.tree.structure(observed)}."
        )
    for a, b in zip(jax.tree.leaves(simulated), jax.tree.leaves(observed), strict=True):
        if jnp.shape(a) != jnp.shape(b):
            raise ValueError(
                f"observed must have the shapes of a simulated upload, {jnp.shape(a)}, got {jnp.shape(b)}."
            )
