"""Noise that is correlated over rounds: in the sum of all updates so far it largely cancels.

With a strategy matrix `A` (lower triangular, one row a round) and independent noise `Z`, the noise of the rounds is
`A^-1 Z`, and what a client adds to the rounds it takes part in, seen through `A`, is hidden by `Z`. The banded Toeplitz
matrices and the streamed product with their inverses are those of `jax-privacy` (the extra `privacy`). It has no binary
trees; the Toeplitz strategy with as many bands as rounds is optimal where those are not.

References:
  Kairouz et al., `Practical and Private (Deep) Learning without Sampling or Shuffling
  <https://arxiv.org/abs/2103.00039>`_, 2021: DP-FTRL.

  Choquette-Choo et al., `(Amplified) Banded Matrix Factorization <https://arxiv.org/abs/2306.08153>`_, 2023: with `b`
  bands, and clients in `b` groups that are sampled in turns, `n` rounds cost what `ceil(n / b)` rounds of independent
  noise cost.

  Choquette-Choo et al., `Correlated Noise Mechanisms for Differentially Private Learning
  <https://arxiv.org/abs/2506.08201>`_, 2025.
"""

import math
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cedarjax.core.batches import check_positive
from cedarjax.core.selection import Selection, Selector
from cedarjax.core.types import Aggregator, Params, PyTree
from cedarjax.privacy.accounting import Accountant, epsilon
from cedarjax.privacy.clip import check_above_zero
from cedarjax.privacy.mechanism import (
    NOISE_STREAM,
    MechanismInfo,
    check_limits,
    check_noise,
    gaussian_noise,
    release,
    told,
)
from cedarjax.privacy.plan import PrivatePlan, chosen_noise, delta_left, overflow_probability, poisson_law
from cedarjax.privacy.rows import check_cohort_size, check_rows, clipped_sum


class CorrelatedState(NamedTuple):
    """State of `correlated_gaussian_mechanism`."""

    stream: PyTree
    """What the streamed product remembers, `num_bands - 1` times the parameters. It is a secret: who knows the noise
    removes it."""
    num_releases: jax.Array
    """int32 scalar, updates that were told so far."""
    info: MechanismInfo | None = None
    """What the last round tells; `None` after `init`."""


class TurnState(NamedTuple):
    """State of `in_turns`."""

    inner: PyTree
    """Of the selector."""
    round: jax.Array
    """int32 scalar, rounds that were selected."""


def _library() -> ModuleType:
    try:
        from jax_privacy.matrix_factorization import toeplitz
    except ImportError as error:
        raise ImportError(
            "Correlated noise needs jax-privacy: pip install 'cedarjax[privacy]' (or pip install jax-privacy)."
        ) from error
    return toeplitz


def banded_toeplitz(num_rounds: int, num_bands: int, *, num_steps: int = 250) -> tuple[float, ...]:
    """The strategy with the least mean squared error of all prefix sums, of so many bands.

    Args:
      num_rounds: rounds of the run.
      num_bands: bands, between 1 and `num_rounds`; 1 is independent noise.
      num_steps: steps of the optimisation, at least 0; 0 gives the closed form that is optimal for the largest error
        where `num_bands == num_rounds`.

    Returns:
      First column of the matrix, `num_bands` numbers of Euclidean length 1, the first the largest.

    Raises:
      ValueError: if an argument is out of range.
      ImportError: if `jax-privacy` is not installed.

    Example:
      >>> print(" ".join(f"{c:.2f}" for c in banded_toeplitz(8, 2)))
      0.89 0.46
    """
    check_positive(num_rounds=num_rounds)
    if not 1 <= num_bands <= num_rounds:
        raise ValueError(f"num_bands must satisfy 1 <= num_bands <= num_rounds, got {num_bands} and {num_rounds}.")
    if num_steps < 0:
        raise ValueError(f"num_steps must be at least 0, got {num_steps}.")
    if num_bands == 1:
        return (1.0,)
    library = _library()
    with jax.numpy_dtype_promotion("standard"):
        if num_steps:
            found = library.optimize_banded_toeplitz(num_rounds, num_bands, max_optimizer_steps=num_steps)
        else:
            found = library.optimal_max_error_strategy_coefs(num_bands)
    column = [float(c) for c in found]
    length = math.sqrt(sum(c * c for c in column))
    return tuple(c / length for c in column)


def correlated_gaussian_mechanism(
    column: tuple[float, ...],
    noise_multiplier: jax.Array | float,
    max_norm: jax.Array | float,
    expected_cohort: jax.Array | float,
    *,
    num_rounds: int,
    cohort_size: int | None = None,
) -> Aggregator:
    """`gaussian_mechanism` whose noise over the rounds is `A^-1 Z`, with `Z` of standard deviation `z C |column|`.

    What it costs depends on how often and how far apart a client takes part. `correlated_plan` makes selection,
    mechanism and epsilon from one object; behind plain Poisson sampling, where nothing keeps a client from taking part
    in rounds that share noise, there is no accounting for more than one band.

    Args:
      column: first column of the Toeplitz strategy `A`, from `banded_toeplitz`; at least 0 and not increasing.
      noise_multiplier: `z`, at least 0; may be traced.
      max_norm: `C`, above 0 and finite; may be traced. It must not change in the run.
      expected_cohort: the fixed denominator, above 0; may be traced.
      num_rounds: rounds that the strategy was made for; after these the update is 0.
      cohort_size: as in `gaussian_mechanism`.

    Returns:
      An `Aggregator` as `gaussian_mechanism`, with a `CorrelatedState`. The first round's noise has the standard
      deviation `info.noise_std`; that of the others differs.

    Raises:
      ValueError: as in `gaussian_mechanism`, and if `column` is no such column.
      ImportError: if `jax-privacy` is not installed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> rule = correlated_gaussian_mechanism((0.8, 0.6), 1.0, 1.0, 1.0, num_rounds=2)
      >>> updates, state = jnp.zeros((1, 1)), rule.init(jnp.zeros(1))
      >>> first, state = rule.update(updates, state, weights=jnp.ones(1), key=jax.random.key(0))
      >>> second, state = rule.update(updates, state, weights=jnp.ones(1), key=jax.random.key(1))
      >>> first.shape, bool(first == second)
      ((1,), False)
    """
    check_noise(noise_multiplier)
    check_above_zero("max_norm", max_norm)
    check_above_zero("expected_cohort", expected_cohort)
    check_limits(num_rounds, cohort_size)
    column = tuple(float(c) for c in column)
    falling = all(a >= b >= 0 for a, b in zip(column, column[1:], strict=False))
    if not column or not 0 < column[0] < math.inf or not falling:
        raise ValueError(f"column must hold numbers above or equal to 0 that do not increase, got {column}.")
    if len(column) > num_rounds:
        raise ValueError(f"column must have at most num_rounds = {num_rounds} numbers, got {len(column)}.")
    library = _library()
    length = math.sqrt(sum(c * c for c in column))

    def inverse() -> Any:
        return library.inverse_as_streaming_matrix(jnp.asarray(column, jnp.float32))

    def narrow(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), jnp.float32), tree)

    def init(params: Params) -> CorrelatedState:
        return CorrelatedState(inverse().init_multiply(narrow(params)), jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree,
        state: CorrelatedState,
        params: Params | None = None,
        *,
        weights: PyTree | None = None,
        key: jax.Array | None = None,
        mesh: Mesh | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, CorrelatedState]:
        check_rows(updates, weights, key, params, **extra_args)
        assert key is not None
        check_cohort_size(updates, cohort_size)
        total, clipped = clipped_sum(updates, weights, max_norm, mesh)
        ok = state.num_releases < num_rounds
        fresh = gaussian_noise(jax.random.fold_in(key, NOISE_STREAM), narrow(total))
        noise, stream = inverse().multiply_next(fresh, state.stream)
        limit = jnp.asarray(max_norm, jnp.float32)
        std = jnp.asarray(noise_multiplier, jnp.float32) * limit * length
        out = release(total, noise, std, expected_cohort, ok, updates)
        info = told(clipped, limit, std / column[0] / jnp.asarray(expected_cohort, jnp.float32), ok)
        return out, CorrelatedState(stream, state.num_releases + ok.astype(jnp.int32), info)

    return optax.GradientTransformationExtraArgs(init, update)


def in_turns(selector: Selector, num_groups: int) -> Selector:
    """Lets a selector choose in round `r` among the clients `i` with `i % num_groups == r % num_groups`.

    Two rounds in which a client takes part are at least `num_groups` apart. Who else is in the federation does not
    change a client's group.

    Args:
      selector: any selector.
      num_groups: groups, at least 1.

    Returns:
      A `Selector` with a `TurnState`; its law is another one, so `sampling` is `None`.

    Raises:
      ValueError: if `num_groups` is below 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import cedarjax as cj
      >>> selector = in_turns(cj.select.uniform(2), 3)
      >>> state, everybody = selector.init(6), jnp.ones(6, bool)
      >>> for _ in range(2):
      ...     selection, state = selector.select(state, jax.random.key(0), everybody)
      ...     print(jnp.sort(selection.client_id))
      [0 3]
      [1 4]
    """
    check_positive(num_groups=num_groups)

    def init(num_clients: int) -> TurnState:
        return TurnState(selector.init(num_clients), jnp.zeros((), jnp.int32))

    def select(state: TurnState, key: jax.Array, available: jax.Array) -> tuple[Selection, TurnState]:
        turn = jnp.arange(available.shape[0], dtype=jnp.int32) % num_groups == state.round % num_groups
        selection, inner = selector.select(state.inner, key, available & turn)
        return selection, TurnState(inner, state.round + 1)

    def observe(state: TurnState, selection: Selection, info: PyTree) -> TurnState:
        return state._replace(inner=selector.observe(state.inner, selection, info))

    return Selector(init, select, observe)


def correlated_plan(
    selector: Selector,
    *,
    num_clients: int,
    num_rounds: int,
    num_groups: int,
    delta: float,
    max_norm: float,
    column: tuple[float, ...] | None = None,
    noise_multiplier: float | None = None,
    target_epsilon: float | None = None,
    accountant: Accountant = "pld",
) -> PrivatePlan:
    """A run of correlated noise behind groups that are sampled in turns, and its epsilon, from one set of numbers.

    Costs `ceil(num_rounds / num_groups)` rounds of `accounting.epsilon` with the selector's probability. For the same
    expected cohort that probability is `num_groups` times that of `poisson_plan`, and the noise cancels over rounds.

    Args:
      selector: from `select.bernoulli`, chance of each client in the rounds of its group; `in_turns` is put around it.
      num_clients: clients in the federation.
      num_rounds: rounds of the run.
      num_groups: groups that take turns.
      delta: as in `poisson_plan`.
      max_norm: clip norm, fixed for the run.
      column: strategy of at most `num_groups` bands; default: `banded_toeplitz(num_rounds, num_groups)`.
      noise_multiplier: as in `poisson_plan`.
      target_epsilon: as in `poisson_plan`.
      accountant: as in `poisson_plan`.

    Returns:
      A `PrivatePlan`, whose selector is the one to run with.

    Raises:
      ValueError: if the selector cannot be accounted for, there are more bands than groups, or an argument is out of
        range.
      TypeError: if `noise_multiplier` is traced.
      ImportError: if `dp-accounting` or `jax-privacy` is not installed.

    Example:
      >>> import cedarjax as cj
      >>> plan = correlated_plan(
      ...     cj.select.bernoulli(0.5, max_selected=25),
      ...     num_clients=100,
      ...     num_rounds=40,
      ...     num_groups=4,
      ...     delta=1e-4,
      ...     max_norm=1.0,
      ...     noise_multiplier=3.0,
      ... )
      >>> print(f"{plan.epsilon:.2f} {plan.expected_cohort}")
      1.99 12.5
    """
    law = poisson_law(selector, num_clients)
    check_positive(num_rounds=num_rounds)
    if not 1 <= num_groups <= min(num_clients, num_rounds):
        raise ValueError(
            "num_groups must lie between 1 and both num_clients and num_rounds, "
            f"got {num_groups} for {num_clients} and {num_rounds}."
        )
    column = banded_toeplitz(num_rounds, num_groups) if column is None else column
    if len(column) > num_groups:
        raise ValueError(
            f"column must have at most num_groups = {num_groups} numbers, got {len(column)}: a client that takes part "
            "in two rounds which share noise is not covered by the accounting."
        )
    turns = -(-num_rounds // num_groups)
    overflow = overflow_probability(-(-num_clients // num_groups), law.probability, law.max_selected, num_rounds)
    left = delta_left(delta, overflow)
    cost: dict[str, Any] = {"sampling_rate": law.probability, "num_rounds": turns, "delta": left}
    cost["accountant"] = accountant
    noise = chosen_noise(noise_multiplier, target_epsilon, **cost)
    expected = law.probability * num_clients / num_groups
    aggregator = correlated_gaussian_mechanism(
        column, noise, max_norm, expected, num_rounds=num_rounds, cohort_size=law.max_selected
    )
    return PrivatePlan(
        in_turns(selector, num_groups),
        aggregator,
        epsilon(noise_multiplier=noise, **cost),
        delta,
        noise,
        law.probability,
        expected,
        num_clients,
        num_rounds,
        overflow,
        accountant,
    )
