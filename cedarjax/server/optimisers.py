"""Server optimisers: momentum, and the adaptive ones of FedOpt.

References: Hsu, Qi, Brown, `Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification <https://arxiv.org/abs/1909.06335>`_, 2019 (FedAvgM); Reddi, Charles, Zaheer, Garrett, Rush, Konecny,
Kumar, McMahan, `Adaptive Federated Optimization <https://arxiv.org/abs/2003.00295>`_, 2021 (FedAdagrad, FedAdam,
FedYogi). The paper's rules differ from those that go by these names elsewhere, `optax.adam` among them: nothing is
corrected for its bias, `tau` stands outside the root, and the second moment begins at `tau^2`.

All of them follow an aggregator, `optax.chain(robust.mean(), server.fedadam(1e-2))`, and step along the pseudo-gradient
`d = x - mean_i x_i`, the paper's `-Delta`.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from cedarjax.core import Params, accumulator

Scalar: TypeAlias = float | jax.Array

SecondMoment: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""`(v, d^2) -> v`, the next second moment."""


class FedOptState(NamedTuple):
    """State of the adaptive optimisers, without that of a schedule of the rate; float32 or wider."""

    first: Params
    """`m`, the mean of the pseudo-gradients."""
    second: Params
    """`v`, what their squares are collected in."""


def _descend(learning_rate: Scalar | optax.Schedule) -> optax.GradientTransformation:
    if callable(learning_rate):
        return optax.scale_by_learning_rate(learning_rate)
    return optax.stateless_with_tree_map(lambda u, _: -jnp.asarray(learning_rate, u.dtype) * u)


def _check(*, tau: Scalar, initial_accumulator: Scalar | None, **decays: Scalar) -> None:
    for name, decay in decays.items():
        if isinstance(decay, int | float) and not 0 <= decay < 1:
            raise ValueError(f"{name} must satisfy 0 <= {name} < 1, got {decay}.")
    if isinstance(tau, int | float) and tau <= 0:
        raise ValueError(f"tau must be above 0, got {tau}.")
    if isinstance(initial_accumulator, int | float) and initial_accumulator < 0:
        raise ValueError(f"initial_accumulator must be at least 0, got {initial_accumulator}.")


def _adaptive(
    rule: SecondMoment,
    learning_rate: Scalar | optax.Schedule,
    b1: Scalar,
    tau: Scalar,
    initial_accumulator: Scalar | None,
) -> optax.GradientTransformation:
    """The part that is common to all: `x <- x - eta m / (sqrt(v) + tau)`."""

    def init(params: Params) -> FedOptState:
        def zeros(p: jax.Array) -> jax.Array:
            return jnp.zeros(jnp.shape(p), accumulator(p))

        def start(p: jax.Array) -> jax.Array:
            small = jnp.asarray(tau, accumulator(p))
            v = jnp.square(small) if initial_accumulator is None else jnp.asarray(initial_accumulator, small.dtype)
            return jnp.full(jnp.shape(p), v, v.dtype)

        return FedOptState(jax.tree.map(zeros, params), jax.tree.map(start, params))

    def update(updates: Params, state: FedOptState, params: Params | None = None) -> tuple[Params, FedOptState]:
        del params

        def mean(m: jax.Array, d: jax.Array) -> jax.Array:
            decay = jnp.asarray(b1, m.dtype)
            return decay * m + (1 - decay) * d.astype(m.dtype)

        first = jax.tree.map(mean, state.first, updates)
        second = jax.tree.map(lambda v, d: rule(v, jnp.square(d.astype(v.dtype))), state.second, updates)
        scaled = jax.tree.map(
            lambda d, m, v: (m / (jnp.sqrt(v) + jnp.asarray(tau, v.dtype))).astype(d.dtype), updates, first, second
        )
        return scaled, FedOptState(first, second)

    return optax.chain(optax.GradientTransformation(init, update), _descend(learning_rate))


def fedavgm(learning_rate: Scalar | optax.Schedule = 1.0, momentum: Scalar = 0.9) -> optax.GradientTransformation:
    """FedAvgM: `m <- momentum m + d`, `x <- x - eta m`.

    This is `optax.sgd(learning_rate, momentum)` under its federated name.

    Args:
      learning_rate: `eta`, a number, a traced scalar, or an optax schedule over rounds.
      momentum: at least 0 and below 1; 0 is federated averaging where `learning_rate` is 1.

    Returns:
      An optax optimiser.

    Raises:
      ValueError: if `momentum` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = fedavgm(1.0, momentum=0.5)
      >>> state = tx.init(jnp.float32(0.0))
      >>> for _ in range(3):
      ...     step, state = tx.update(jnp.float32(1.0), state)
      >>> print(step)
      -1.75
    """
    _check(tau=1.0, initial_accumulator=None, momentum=momentum)
    return optax.chain(optax.trace(momentum), _descend(learning_rate))


def fedadagrad(
    learning_rate: Scalar | optax.Schedule,
    *,
    b1: Scalar = 0.0,
    tau: Scalar = 1e-3,
    initial_accumulator: Scalar | None = None,
) -> optax.GradientTransformation:
    """FedAdagrad: `m <- b1 m + (1 - b1) d`, `v <- v + d^2`, `x <- x - eta m / (sqrt(v) + tau)`.

    Args:
      learning_rate: `eta`, a number, a traced scalar, or an optax schedule over rounds.
      b1: decay of the mean, at least 0 and below 1.
      tau: degree of adaptivity, above 0: the smaller, the more.
      initial_accumulator: where `v` begins, at least 0; default `tau^2`, the least that the paper allows.

    Returns:
      An optax optimiser, whose first state is a `FedOptState`.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = fedadagrad(0.1, tau=1.0, initial_accumulator=0.0)
      >>> step, _ = tx.update(jnp.float32(3.0), tx.init(jnp.float32(0.0)))
      >>> print(f"{step:.3f}")  # 0.1 * 3 / (3 + 1)
      -0.075
    """
    _check(tau=tau, initial_accumulator=initial_accumulator, b1=b1)
    return _adaptive(lambda v, square: v + square, learning_rate, b1, tau, initial_accumulator)


def fedadam(
    learning_rate: Scalar | optax.Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    tau: Scalar = 1e-3,
    initial_accumulator: Scalar | None = None,
) -> optax.GradientTransformation:
    """FedAdam: `m <- b1 m + (1 - b1) d`, `v <- b2 v + (1 - b2) d^2`, `x <- x - eta m / (sqrt(v) + tau)`.

    Args:
      learning_rate: `eta`, a number, a traced scalar, or an optax schedule over rounds.
      b1: decay of the mean, at least 0 and below 1.
      b2: decay of the squares, at least 0 and below 1.
      tau: degree of adaptivity, above 0: the smaller, the more.
      initial_accumulator: where `v` begins, at least 0; default `tau^2`, the least that the paper allows.

    Returns:
      An optax optimiser, whose first state is a `FedOptState`.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = fedadam(1.0, b1=0.5, b2=0.75, tau=1.0, initial_accumulator=0.0)
      >>> step, _ = tx.update(jnp.float32(2.0), tx.init(jnp.float32(0.0)))
      >>> print(step)  # 1 / (1 + 1)
      -0.5
    """
    _check(tau=tau, initial_accumulator=initial_accumulator, b1=b1, b2=b2)

    def rule(v: jax.Array, square: jax.Array) -> jax.Array:
        decay = jnp.asarray(b2, v.dtype)
        return decay * v + (1 - decay) * square

    return _adaptive(rule, learning_rate, b1, tau, initial_accumulator)


def fedyogi(
    learning_rate: Scalar | optax.Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    tau: Scalar = 1e-3,
    initial_accumulator: Scalar | None = None,
) -> optax.GradientTransformation:
    """FedYogi: as `fedadam`, with `v <- v - (1 - b2) d^2 sign(v - d^2)`.

    The second moment moves by what `d^2` tells alone, so it falls slowly where `d` gets small at once.

    Args:
      learning_rate: `eta`, a number, a traced scalar, or an optax schedule over rounds.
      b1: decay of the mean, at least 0 and below 1.
      b2: decay of the squares, at least 0 and below 1.
      tau: degree of adaptivity, above 0: the smaller, the more.
      initial_accumulator: where `v` begins, at least 0; default `tau^2`, the least that the paper allows.

    Returns:
      An optax optimiser, whose first state is a `FedOptState`.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = fedyogi(1.0, b1=0.0, b2=0.75, tau=1.0, initial_accumulator=5.0)
      >>> step, _ = tx.update(jnp.float32(2.0), tx.init(jnp.float32(0.0)))
      >>> print(f"{step:.3f}")  # 2 / (sqrt(5 - 1) + 1)
      -0.667
    """
    _check(tau=tau, initial_accumulator=initial_accumulator, b1=b1, b2=b2)

    def rule(v: jax.Array, square: jax.Array) -> jax.Array:
        return v - (1 - jnp.asarray(b2, v.dtype)) * square * jnp.sign(v - square)

    return _adaptive(rule, learning_rate, b1, tau, initial_accumulator)
