"""A long scan with evaluations in between: what runs over rounds and runs over events have in common."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from cedarjax.core.types import PyTree

State = TypeVar("State")
Told = TypeVar("Told")


def check_segments(name: str, length: int, eval_every: int, *, has_eval: bool) -> None:
    """Raises unless a length can be cut into segments.

    Args:
      name: of the argument that is the length.
      length: steps in all.
      eval_every: steps of a segment.
      has_eval: whether there is something to evaluate.

    Raises:
      ValueError: if the length is negative or `eval_every` does not divide it.
    """
    if length < 0:
        raise ValueError(f"{name} must be at least 0, got {length}.")
    if eval_every < 1 or (has_eval and length % eval_every):
        raise ValueError(f"eval_every must be at least 1 and divide {name}, got {eval_every} and {length}.")


def scan_segments(
    step: Callable[[State], tuple[State, Told]],
    state: State,
    key: jax.Array,
    length: int,
    eval_fn: Callable[[Any, jax.Array], PyTree] | None,
    eval_every: int,
) -> tuple[State, Told, PyTree]:
    """Repeats a step, and evaluates the server's parameters after every segment.

    Args:
      step: `state -> (state, told)`; a state has `server.params`.
      state: before the first step.
      key: of the run; evaluations get one of their own, the same each time.
      length: static number of steps.
      eval_fn: `(params, key) -> metrics`.
      eval_every: steps of a segment; must divide `length`.

    Returns:
      The last state, what the steps told `[length, ...]`, and the metrics `[length // eval_every, ...]` (`None` without
      `eval_fn`).
    """

    def one_step(state: Any, _: None) -> tuple[Any, Told]:
        return step(state)

    if eval_fn is None:
        state, history = jax.lax.scan(one_step, state, None, length=length)
        return state, history, None

    eval_key = jax.random.fold_in(key, jnp.uint32(2**32 - 1))

    def segment(state: Any, _: None) -> tuple[Any, tuple[Told, PyTree]]:
        state, history = jax.lax.scan(one_step, state, None, length=eval_every)
        return state, (history, eval_fn(state.server.params, eval_key))

    state, (history, metrics) = jax.lax.scan(segment, state, None, length=length // eval_every)
    return state, jax.tree.map(lambda x: x.reshape(length, *x.shape[2:]), history), metrics
