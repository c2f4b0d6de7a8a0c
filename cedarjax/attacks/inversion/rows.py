"""Guesses of a batch of examples with labels that are known, or guessed as well."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cedarjax.attacks.inversion.matching import DistanceFn, MatchInfo, match
from cedarjax.attacks.inversion.simulate import SimulateFn
from cedarjax.core.types import PyTree

DrawFn = Callable[[jax.Array, tuple[int, ...]], jax.Array]
"""`draw_fn(key, shape) -> inputs` to start from."""


class Inversion(NamedTuple):
    """What an attack reconstructs of one upload."""

    x: jax.Array
    """`[B, ...]` inputs; the order of the rows is not that of the client."""
    y: jax.Array
    """`[B]` int32 labels, as given or as guessed."""
    info: MatchInfo
    """How the search went."""


def invert_rows(
    simulate_fn: SimulateFn,
    observed: PyTree,
    shape: Sequence[int],
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    labels: jax.Array | None,
    num_classes: int | None,
    draw_fn: DrawFn,
    num_steps: int,
    num_restarts: int,
    mask: PyTree | None,
    distance_fn: DistanceFn,
    prior_fn: Callable[[jax.Array], jax.Array] | None = None,
    project_fn: Callable[[jax.Array], jax.Array] | None = None,
) -> Inversion:
    """Matches inputs, and labels as well where they are not known.

    Labels that are not known are optimised as logits, and the simulation sees their probabilities.

    Args:
      simulate_fn: `(batch, key) -> upload`.
      observed: the upload.
      shape: `[B, ...]` of the inputs.
      tx: optax optimiser.
      key: PRNG key.
      labels: `[B]` integers, or None.
      num_classes: `K`, needed where the labels are not known.
      draw_fn: `(key, shape) -> inputs` to start from.
      num_steps: steps of the optimiser.
      num_restarts: starts.
      mask: as in `match`.
      distance_fn: as in `match`.
      prior_fn: `x -> scalar`.
      project_fn: `x -> x`.

    Returns:
      An `Inversion`.

    Raises:
      ValueError: for labels that do not fit the shape, or neither labels nor a number of classes.
      TypeError: for labels that are no integers.
    """
    shape = tuple(shape)
    if labels is None:
        if num_classes is None or num_classes < 2:
            raise ValueError(f"num_classes must be at least 2 where labels are not known, got {num_classes}.")
    else:
        labels = jnp.asarray(labels)
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise TypeError(f"labels must be integers, got {labels.dtype}.")
        if labels.shape != shape[:1]:
            raise ValueError(f"labels must be {shape[:1]} for inputs {shape}, got {labels.shape}.")

    def start(start_key: jax.Array) -> dict[str, jax.Array]:
        x_key, y_key = jax.random.split(start_key)
        guess = {"x": draw_fn(x_key, shape)}
        if labels is None:
            assert num_classes is not None  # refused above
            guess["y"] = jax.random.normal(y_key, (shape[0], num_classes), guess["x"].dtype)
        return guess

    def simulate(guess: dict[str, jax.Array], simulation_key: jax.Array) -> PyTree:
        y = jax.nn.softmax(guess["y"]) if labels is None else labels
        return simulate_fn({"x": guess["x"], "y": y}, simulation_key)

    prior: Any = None if prior_fn is None else lambda guess: prior_fn(guess["x"])
    project: Any = None if project_fn is None else lambda guess: {**guess, "x": project_fn(guess["x"])}
    guess, info = match(
        simulate,
        observed,
        start,
        tx,
        key,
        num_steps=num_steps,
        num_restarts=num_restarts,
        mask=mask,
        distance_fn=distance_fn,
        prior_fn=prior,
        project_fn=project,
    )
    found = guess["y"].argmax(axis=1) if labels is None else labels
    return Inversion(guess["x"], found.astype(jnp.int32), info)
