"""FetchSGD: clients send sketches, the server keeps momentum and error in sketches and applies the largest numbers.

Reference: Rothchild et al., `FetchSGD: Communication-Efficient Federated Learning with Sketching
<https://arxiv.org/abs/2007.07682>`_, 2020. The paper's algorithm subtracts the sketch of what was applied from the
error. Its published code sets the cells that were touched to zero, because the difference diverges unless few numbers
are large: what is estimated too large is subtracted too large. The code is followed by default, `error="zero"`, and the
paper by `error="subtract"`.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cedarjax.compress.codec import Compressor
from cedarjax.compress.counting import largest
from cedarjax.compress.top_k import check_fraction
from cedarjax.compress.top_k import num_kept as num_kept_of
from cedarjax.core.batches import check_positive
from cedarjax.core.client_mean import client_mean
from cedarjax.core.dtypes import accumulator
from cedarjax.core.types import Aggregator, Params, PyTree

ErrorRule = Literal["subtract", "zero"]


class FetchSGDState(NamedTuple):
    """State of `fetchsgd` and `fetchsgd_of_mean`."""

    momentum: PyTree
    """Compressed tree, the momentum."""
    error: PyTree
    """Compressed tree, what was not applied yet."""
    round: jax.Array
    """int32 scalar, rounds done."""
    num_nonfinite: jax.Array
    """int32 scalar, uploads left out so far because they were not finite; counted by `fetchsgd`."""


def keep_largest(tree: PyTree, num_kept: int) -> PyTree:
    """The numbers of a tree that are largest in absolute value, and zeros.

    Args:
      tree: arrays of floats.
      num_kept: how many to keep, at least 1; of equal ones the first.

    Returns:
      Tree of the same shapes and dtypes.

    Example:
      >>> import jax.numpy as jnp
      >>> keep_largest({"a": jnp.array([1.0, -5.0]), "b": jnp.array([2.0])}, 2)
      {'a': Array([ 0., -5.], dtype=float32), 'b': Array([2.], dtype=float32)}
    """
    leaves, structure = jax.tree.flatten(tree)
    dtype = accumulator(*leaves)
    kept = largest(jnp.concatenate([x.astype(dtype).reshape(-1) for x in leaves]), num_kept)
    outs, start = [], 0
    for x in leaves:
        outs.append(jnp.where(kept[start : start + x.size].reshape(x.shape), x, jnp.zeros_like(x)))
        start += x.size
    return jax.tree.unflatten(structure, outs)


class _Descent(NamedTuple):
    """The server's step on a compressed mean."""

    compressor: Compressor
    """A linear one."""
    num_kept: int | None
    """Numbers that are applied, or None."""
    fraction: float | None
    """Share of the parameters that is applied, or None."""
    momentum: float | jax.Array
    """`rho`."""
    learning_rate: optax.ScalarOrSchedule
    """`eta`."""
    error: ErrorRule
    """What becomes of cells that the applied numbers touch."""

    def compress(self, tree: PyTree) -> PyTree:
        return self.compressor.compress(tree, (), jax.random.key(0))[0]

    def init(self, params: Params) -> FetchSGDState:
        def zeros() -> PyTree:  # twice, so that the state can be donated
            shapes = jax.eval_shape(self.compress, params)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        return FetchSGDState(zeros(), zeros(), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def chosen(self, estimates: PyTree) -> PyTree:
        if self.num_kept is not None:
            return keep_largest(estimates, self.num_kept)
        assert self.fraction is not None
        return keep_largest(estimates, num_kept_of(sum(x.size for x in jax.tree.leaves(estimates)), self.fraction))

    def step(self, mean: PyTree, state: FetchSGDState) -> tuple[PyTree, FetchSGDState]:
        rate = self.learning_rate(state.round) if callable(self.learning_rate) else self.learning_rate

        def plus(scale: float | jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.asarray(scale, x.dtype) * x + y

        momentum = jax.tree.map(lambda m, x: plus(self.momentum, m, x.astype(m.dtype)), state.momentum, mean)
        error = jax.tree.map(lambda m, e: plus(rate, m, e), momentum, state.error)
        step = self.chosen(self.compressor.decompress(error))
        applied = self.compress(step)

        def unless_applied(x: jax.Array, a: jax.Array) -> jax.Array:
            return jnp.where(a == 0, x, jnp.zeros_like(x))

        momentum = jax.tree.map(unless_applied, momentum, applied)
        rest = unless_applied if self.error == "zero" else jnp.subtract
        return step, state._replace(momentum=momentum, error=jax.tree.map(rest, error, applied), round=state.round + 1)


def _checked(
    compressor: Compressor,
    num_kept: int | None,
    fraction: float | None,
    momentum: float | jax.Array,
    learning_rate: optax.ScalarOrSchedule,
    error: ErrorRule,
) -> _Descent:
    if (num_kept is None) == (fraction is None):
        raise ValueError(f"num_kept or fraction must be given, and not both, got {num_kept} and {fraction}.")
    if num_kept is not None:
        check_positive(num_kept=num_kept)
    if fraction is not None:
        check_fraction(fraction)
    if isinstance(momentum, int | float) and not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie within [0, 1), got {momentum}.")
    if error not in get_args(ErrorRule):
        raise ValueError(f"error must be one of {get_args(ErrorRule)}, got {error!r}.")
    return _Descent(compressor, num_kept, fraction, momentum, learning_rate, error)


def fetchsgd(
    compressor: Compressor,
    *,
    num_kept: int | None = None,
    fraction: float | None = None,
    momentum: float | jax.Array = 0.9,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    error: ErrorRule = "zero",
) -> Aggregator:
    """FetchSGD: the server's momentum, error feedback and selection, all from sketches.

    With `S` the weighted mean of the clients' sketches: `S_u = rho S_u + S`, `S_e = S_e + eta S_u`, applied are the
    `num_kept` largest numbers of the estimates from `S_e`, and their sketch is taken out of `S_e`. Cells of `S_u` that
    it touches are set to zero (momentum factor masking). Where no two numbers meet in a cell this is momentum SGD with
    the largest numbers of the true error.

    Args:
      compressor: that of `send_compressed`: linear, without a state, as `count_sketch` is.
      num_kept: numbers that are applied in a round, at least 1; give either this or `fraction`.
      fraction: share of the parameters that is applied in a round, in (0, 1].
      momentum: `rho`, in [0, 1). A traced scalar is allowed.
      learning_rate: `eta`, or a schedule over rounds, before the error; leave it at 1 where the optimiser that follows
        has a constant one.
      error: what becomes of cells of the error that the applied numbers touch: `"zero"` forgets what else was in them;
        `"subtract"` forgets nothing, and diverges where many numbers share a cell.

    Returns:
      An `Aggregator` of compressed uploads whose result is shaped like the parameters, zeros but for what is applied.
      It reads `weights=` (`[C]`, or `None` for equal weights) and `mesh=`; its state is a `FetchSGDState`. A client
      whose sketch is not finite is absent.

    Raises:
      ValueError: if an argument is out of range; when `update` is traced, if the updates are not what `compressor`
        makes of the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cedarjax as cj
      >>> compressor = cj.compress.count_sketch(3, 16)
      >>> loss_fn = lambda w, x, key: 0.5 * jnp.sum((w - x) ** 2)
      >>> local = cj.compress.send_compressed(cj.local.sgd(loss_fn, optax.sgd(1.0), batch_size=1), compressor)
      >>> server = optax.chain(fetchsgd(compressor, num_kept=1), optax.sgd(1.0))
      >>> algorithm = cj.federated_round(local, server)
      >>> one, params = jnp.ones(2, jnp.int32), jnp.zeros(3)
      >>> data = cj.ClientData(jnp.array([[[9.0, 1.0, 0.0]], [[7.0, 1.0, 0.0]]]), num_examples=one, num_support=one)
      >>> client_state = jax.vmap(lambda _: algorithm.init_client(params))(jnp.arange(2))
      >>> cohort = cj.Cohort(data, weights=jnp.ones(2), client_id=jnp.arange(2), state=client_state)
      >>> state, _, _ = algorithm.step(algorithm.init(params), cohort, jax.random.key(0))
      >>> print(state.params)
      [8. 0. 0.]
    """
    descent = _checked(compressor, num_kept, fraction, momentum, learning_rate, error)

    def update(
        updates: PyTree,
        state: FetchSGDState,
        params: Params | None = None,
        *,
        weights: PyTree | None = None,
        mesh: Mesh | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, FetchSGDState]:
        del params, extra_args
        if jax.tree.structure(updates) != jax.tree.structure(state.momentum):
            raise ValueError(
                "updates must be what the compressor of fetchsgd makes of the parameters, as send_compressed uploads "
                f"it, expected {jax.tree.structure(state.momentum)}, got {jax.tree.structure(updates)}."
            )
        found = client_mean(updates, weights, mesh=mesh)
        step, state = descent.step(found.mean, state)
        return step, state._replace(num_nonfinite=state.num_nonfinite + found.num_nonfinite)

    return optax.GradientTransformationExtraArgs(descent.init, update)


def fetchsgd_of_mean(
    compressor: Compressor,
    *,
    num_kept: int | None = None,
    fraction: float | None = None,
    momentum: float | jax.Array = 0.9,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    error: ErrorRule = "zero",
) -> optax.GradientTransformation:
    """FetchSGD on a mean that was taken already, as in `streamed_round`.

    The sketch of the mean is the mean of the sketches, so `streamed_round(local, chain(fetchsgd_of_mean(...), ...))`
    simulates clients that send sketches with the numbers of `fetchsgd`, to rounding, and the memory of one client.

    Args:
      compressor: as in `fetchsgd`.
      num_kept: as in `fetchsgd`.
      fraction: as in `fetchsgd`.
      momentum: as in `fetchsgd`.
      learning_rate: as in `fetchsgd`.
      error: as in `fetchsgd`.

    Returns:
      An optax transformation of updates shaped like the parameters, with the state `FetchSGDState`.

    Raises:
      ValueError: as in `fetchsgd`.
    """
    descent = _checked(compressor, num_kept, fraction, momentum, learning_rate, error)

    def update(updates: PyTree, state: FetchSGDState, params: Params | None = None) -> tuple[PyTree, FetchSGDState]:
        del params
        return descent.step(descent.compress(updates), state)

    return optax.GradientTransformation(descent.init, update)
