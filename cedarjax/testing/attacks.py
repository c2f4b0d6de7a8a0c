"""Laws of a model-poisoning attack, which is an aggregator's neighbour in the chain and keeps the client axis."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cedarjax.core import PyTree, num_clients, take_info
from cedarjax.testing.cases import cast, check_laws, close, count_traces, filled, finite, take, where_rows, widths


class AttackCase(NamedTuple):
    """An attack and what its laws are checked on."""

    attack: optax.GradientTransformationExtraArgs
    """The kernel."""
    updates: PyTree
    """Finite updates of at least three clients, leaves `[C, ...]`."""
    byzantine: jax.Array
    """`[C]` bool with both values."""
    dtypes: tuple[Any, ...] = ()
    """Further dtypes of updates in which the kernel is to work."""
    seed: int = 0
    """Seed of the key."""
    rtol: float = 1e-4
    """Relative tolerance."""
    atol: float = 1e-5
    """Absolute tolerance."""


def _poisoned(
    attack: optax.GradientTransformationExtraArgs,
    updates: PyTree,
    byzantine: jax.Array,
    weights: jax.Array,
    key: jax.Array,
) -> PyTree:
    params = jax.tree.map(lambda x: jnp.zeros_like(x[0]), updates)
    return attack.update(updates, attack.init(params), params, weights=weights, key=key, byzantine=byzantine)[0]


def _poison(case: AttackCase, *, jit: bool = True, weights: jax.Array | None = None) -> PyTree:
    weights = jnp.ones(num_clients(case.updates), jnp.float32) if weights is None else weights
    run = jax.jit(_poisoned, static_argnums=0) if jit else _poisoned
    return run(case.attack, case.updates, case.byzantine, weights, jax.random.key(case.seed))


def keeps_client_axis(case: AttackCase) -> None:
    """Shapes and dtypes stay."""
    for dtype in (None, *case.dtypes):
        with widths(jnp.float32 if dtype is None else dtype):
            updates = case.updates if dtype is None else cast(case.updates, dtype)
            out = jax.eval_shape(lambda u: _poison(case._replace(updates=u)), updates)
            chex.assert_trees_all_equal_shapes_and_dtypes(out, updates)


def touches_malicious_rows_only(case: AttackCase) -> None:
    """The rows of honest clients keep their bits, malicious ones change; with nobody malicious, nothing does."""
    out = _poison(case)
    finite("poisoned updates", out)
    honest = [i for i, bad in enumerate(case.byzantine.tolist()) if not bad]
    malicious = [i for i, bad in enumerate(case.byzantine.tolist()) if bad]
    chex.assert_trees_all_equal(take(out, honest), take(case.updates, honest))
    for row in malicious:
        same = [bool((x[row] == y[row]).all()) for x, y in zip(*map(jax.tree.leaves, (out, case.updates)), strict=True)]
        assert not all(same), f"row {row} is malicious and unchanged"
    nobody = jnp.zeros_like(case.byzantine)
    chex.assert_trees_all_equal(_poison(case._replace(byzantine=nobody)), case.updates)


def contains_nonfinite_rows(case: AttackCase) -> None:
    """NaN in an honest row stays there, and what an absent row holds does not matter."""
    honest = int(jnp.argmin(case.byzantine))
    place = jnp.arange(num_clients(case.updates)) == honest
    bad = where_rows(place, filled(case.updates, jnp.nan), case.updates)
    others = [i for i in range(place.shape[0]) if i != honest]
    weights = jnp.where(place, 0, jnp.ones(place.shape, jnp.float32))
    finite("other rows beside an absent row of NaN", take(_poison(case._replace(updates=bad), weights=weights), others))


def agrees_without_jit(case: AttackCase) -> None:
    """Jitted and not jitted, the result is the same."""
    close(case, "jit against no jit", _poison(case), _poison(case, jit=False))


def traces_once(case: AttackCase) -> None:
    """Three steps are one trace."""

    def update(updates: PyTree, state: PyTree, byzantine: jax.Array, key: jax.Array) -> PyTree:
        return case.attack.update(updates, state, None, weights=None, key=key, byzantine=byzantine)[1]

    step, traces = count_traces(update)
    state = take_info(case.attack.init(jax.tree.map(lambda x: x[0], case.updates)))[0]
    for i in range(3):
        state = take_info(step.trace(case.updates, state, case.byzantine, jax.random.key(i)).out_info)[0]
    assert len(traces) == 1, f"three steps were traced {len(traces)} times"


def repeats_with_its_key(case: AttackCase) -> None:
    """Equal keys give equal bits, and the inputs are not changed."""
    before = jax.tree.map(lambda x: jnp.array(x, copy=True), case.updates)
    chex.assert_trees_all_equal(_poison(case), _poison(case))
    chex.assert_trees_all_equal(case.updates, before)


ATTACK_LAWS = {
    law.__name__: law
    for law in (
        keeps_client_axis,
        touches_malicious_rows_only,
        contains_nonfinite_rows,
        agrees_without_jit,
        traces_once,
        repeats_with_its_key,
    )
}
"""Name to law; each is a function of an `AttackCase`."""


def check_attack(
    attack: optax.GradientTransformationExtraArgs,
    updates: PyTree,
    byzantine: jax.Array,
    *,
    dtypes: tuple[Any, ...] = (),
    seed: int = 0,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    laws: tuple[str, ...] | None = None,
) -> None:
    """Puts an attack on uploads through the laws of `ATTACK_LAWS`.

    Args:
      attack: the kernel.
      updates: finite updates of several clients, leaves `[C, ...]`.
      byzantine: `[C]` bool with both values.
      dtypes: further dtypes of updates in which the kernel is to work, for instance `jnp.bfloat16`.
      seed: seed of the key.
      rtol: relative tolerance.
      atol: absolute tolerance.
      laws: names of the laws to check; default: all.

    Raises:
      AssertionError: naming the law that is broken and what differed.
      ValueError: if `byzantine` does not name both honest and malicious clients.

    Example:
      >>> import jax.numpy as jnp
      >>> import cedarjax as cj
      >>> from cedarjax.testing import check_attack
      >>> updates = {"w": jnp.array([[1.0, 2.0], [3.0, 5.0], [4.0, 0.0]])}
      >>> check_attack(cj.attacks.sign_flip(2.0), updates, jnp.array([True, False, False]))
    """
    if byzantine.shape != (num_clients(updates),) or bool(byzantine.all()) or not bool(byzantine.any()):
        raise ValueError(f"byzantine must be [C] bool with both values, got {byzantine}.")
    check_laws(ATTACK_LAWS, AttackCase(attack, updates, byzantine, tuple(dtypes), seed, rtol, atol), laws)
