"""The asymmetric upload: a client sends only the layers that matter.

Reference: You et al., `A framework reforming personalized Internet of Things by federated meta-learning
<https://doi.org/10.1038/s41467-025-59217-z>`_, 2025. Where the published code differs, this file does not follow it:

- row 1: the received parameters are kept, so that the consistency compares before with after training;
- row 7: the pairs of stimuli are fixed for the run (see `rdv.py`);
- row 8: a client's first round uploads every layer, and every uploaded layer is used;
- row 9: dead layers, zero scores and few stimuli have defined results (see `rcs.py`).

Layers are owned by exact path (`core/names.py`), not by a part of their name. Beyond the paper: a budget of bytes in
place of a number of layers, and other scores with the same face.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from cedarjax.core.batches import mean_loss
from cedarjax.core.lowrank import dense, keep
from cedarjax.core.names import layer_bytes, layer_leaves, layer_mask
from cedarjax.core.types import LocalUpdate, LossFn, Params, PyTree, Upload
from cedarjax.layers.importance import cosine_change, fisher, taylor, update_norm
from cedarjax.layers.masks import least_changed, within_budget
from cedarjax.layers.payload import payload_bytes
from cedarjax.layers.rcs import rcs, relative_change
from cedarjax.layers.rdv import rdv, stimulus_pairs

Score = Literal["rcs", "update_norm", "fisher", "taylor", "cosine", "random"]

_FILTER_STREAM = 0x6C617972  # keeps the filter's own draws apart from those of the wrapped update


class FilterState(NamedTuple):
    """What a client keeps between its rounds."""

    client_state: PyTree
    """State of the wrapped update."""
    scores: jax.Array
    """`[L]` float32 scores of the client's previous round."""
    age: jax.Array
    """`[L]` int32, rounds of this client since each layer was last uploaded."""
    credit: jax.Array
    """int32 scalar, unspent bytes of earlier rounds."""
    started: jax.Array
    """bool scalar, False until the client has taken part once."""
    previous: PyTree
    """Previous update of the judged layers with `score="cosine"`, else `()`."""


class FilterInfo(NamedTuple):
    """What the filter tells about one client's round."""

    local: PyTree
    """Info of the wrapped update."""
    mask: jax.Array
    """`[L]` float32, 1 = uploaded; layers in sorted order of their names."""
    scores: jax.Array
    """`[L]` float32 scores of this round."""
    uploaded_bytes: jax.Array
    """int32 scalar, `payload_bytes` of what was sent, bitmap included."""
    full_bytes: jax.Array
    """int32 scalar, bytes of an upload without a filter."""


def budget_priority(importance: jax.Array, age: jax.Array) -> jax.Array:
    """Order in which layers spend a byte budget: share of the importance plus age.

    `priority_l = importance_l / sum(importance) + age_l / L`; all shares are equal if the importances are, and layers
    whose importance is NaN or Inf share everything among themselves.

    No layer waits for ever, given that the layer of highest priority is always uploaded. Shares lie in `[0, 1]`, so a
    layer `y` can precede `x` only while `age_x - age_y <= L`. Once `age_x >= L`, a layer that is uploaded ahead of `x`
    restarts at age 0, more than `L` behind, and the distance stays until `x` is uploaded: it never precedes `x` again.
    There are `L - 1` other layers, so `x` comes up by age `2 L - 1`: it is uploaded at least once in every `2 L`
    rounds of the client.

    Args:
      importance: `[L]`, at least 0.
      age: `[L]` int32 rounds since the last upload.

    Returns:
      `[L]` float32, finite.

    Example:
      >>> import jax.numpy as jnp
      >>> budget_priority(jnp.array([3.0, 1.0]), jnp.array([0, 2], jnp.int32))
      Array([0.75, 1.25], dtype=float32)
    """
    importance = importance.astype(jnp.float32)
    unbounded = ~jnp.isfinite(importance)
    bounded = jnp.where(unbounded, 0.0, importance)
    bounded = bounded / jnp.maximum(bounded.max(), jnp.finfo(jnp.float32).tiny)
    parts = jnp.where(unbounded.any(), unbounded.astype(jnp.float32), bounded)
    total = parts.sum()
    num_layers = importance.shape[0]
    shares = jnp.where(total > 0, parts / jnp.where(total > 0, total, 1.0), 1.0 / num_layers)
    return shares + age.astype(jnp.float32) / num_layers


def _check_options(
    num_skipped: int | None,
    max_bytes: int | None,
    score: str,
    loss_fn: LossFn | None,
    carry_limit: int,
    compat: bool,
) -> None:
    if score not in get_args(Score):
        raise ValueError(f"score must be one of {get_args(Score)}, got {score!r}.")
    if num_skipped is not None and max_bytes is not None:
        raise ValueError(f"num_skipped and max_bytes exclude each other, got {num_skipped} and {max_bytes}.")
    if max_bytes is None and carry_limit != 0:
        raise ValueError(f"carry_limit needs max_bytes, got {carry_limit} without it.")
    if carry_limit < 0:
        raise ValueError(f"carry_limit must be at least 0, got {carry_limit}.")
    if max_bytes is not None and not 0 < max_bytes + carry_limit < 2**31:
        raise ValueError(f"max_bytes + carry_limit must lie within (0, 2^31), got {max_bytes} + {carry_limit}.")
    if loss_fn is None and score in ("fisher", "taylor"):
        raise ValueError(f"loss_fn must be given with score {score!r}, got None.")
    if compat and (score != "rcs" or max_bytes is not None):
        raise ValueError(f"compat must come with score 'rcs' and without max_bytes, got {score!r} and {max_bytes}.")


def _check_pairs(pairs: jax.Array, num_stimuli: int, compat: bool) -> None:
    """Static shape, and the values where they are known at trace time."""
    if pairs.ndim != 2 or pairs.shape[1:] != (2,) or not jnp.issubdtype(pairs.dtype, jnp.integer):
        raise ValueError(f"pairs must be [E, 2] integers, got {pairs.dtype} of the shape {pairs.shape}.")
    if isinstance(pairs, jax.core.Tracer):
        return
    for a, b in pairs.tolist():
        if not (0 <= a < num_stimuli and 0 <= b < num_stimuli):
            raise ValueError(f"pairs must lie within [0, num_stimuli) = [0, {num_stimuli}), got ({a}, {b}).")
        if a == b and not compat:
            raise ValueError(f"pairs must not pair a stimulus with itself unless compat=True, got ({a}, {b}).")


def upload_filter(
    local_update: LocalUpdate,
    features_fn: Callable[[Params, PyTree], dict[str, jax.Array]],
    stimuli: PyTree,
    *,
    pairs: jax.Array | None = None,
    num_skipped: int | None = None,
    max_bytes: int | None = None,
    score: Score = "rcs",
    loss_fn: LossFn | None = None,
    carry_limit: int = 0,
    compat: bool = False,
) -> LocalUpdate:
    """Wraps a local update so that the client uploads only its important layers.

    The judged layers are the keys of `features_fn`, in sorted order; every other parameter is always uploaded. Each
    round scores them, and then leaves out the `num_skipped` least important ones, or fills a budget of `max_bytes` in
    the order of `budget_priority`. A skipped layer's update is 0 and its mask is 0: the server never reads it,
    `payload_bytes` does not count it. A client's first round has nothing to compare with: it uploads everything,
    whatever the budget, and only stores its scores.

    Importance of layer `l`, by `score`:

    - `"rcs"`: `relative_change` of the consistency (squared Pearson correlation of the layer's distances between
      stimuli under the received and under the trained parameters) since the client's previous round;
    - `"update_norm"`: Euclidean norm of the update;
    - `"fisher"`: mean squared gradient of the client's mean loss at the trained parameters;
    - `"taylor"`: `sum |theta * gradient|`, of the same gradient;
    - `"cosine"`: 1 - cosine between this update and the client's previous one;
    - `"random"`: a uniform draw, the baseline that every score has to beat.

    Args:
      local_update: any update whose `shared` is the parameter tree; it receives its key and its data unchanged, so that
        `num_skipped=0` changes no delta.
      features_fn: `features_fn(params, stimuli) -> {layer name: [S, F_l]}`.
      stimuli: inputs on which representations are compared, fixed for the run.
      pairs: `[E, 2]` pairs of stimuli for `"rcs"`, from `stimulus_pairs`; default: all `a < b`.
      num_skipped: layers to leave out, `0 <= num_skipped < L`. Default, unless `max_bytes` is given: `min(3, L // 4)`
        as in the paper.
      max_bytes: cap on the bytes of the judged layers in each round after the first, exact; without the bitmap.
      score: see above.
      loss_fn: the contract `LossFn`, for `"fisher"` and `"taylor"`; the client's `data` must then be a `ClientData`.
      carry_limit: unspent bytes that a client may take along to its next round, which may then spend `max_bytes` and
        these; 0 makes `max_bytes` a strict cap.
      compat: the published arithmetic, number for number: NaN for a dead layer, no floor under the present score, NaN
        counts as the largest change, `pairs` may hold self pairs and repeats. The first round still uploads
        everything.

    Returns:
      A `LocalUpdate` with `FilterState` and `FilterInfo`. The mask is multiplied with the wrapped update's own, if it
      has one.

    Raises:
      ValueError: for options that are out of range or exclude each other (here), and for features that do not fit the
        stimuli or the parameters, a `num_skipped` out of range or a judged layer larger than `max_bytes` (when `init`
        or `update` is traced).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cedarjax.core import LocalUpdate, Upload
      >>> params = {"one": {"kernel": jnp.ones((2, 3))}, "two": {"kernel": jnp.ones((3, 1))}}
      >>> local = LocalUpdate(lambda params: (), lambda shared, state, data, key: (Upload(shared), state, ()))
      >>> def features_fn(params, x):
      ...     hidden = x @ params["one"]["kernel"]
      ...     return {"one": hidden, "two": hidden @ params["two"]["kernel"]}
      >>> filtered = upload_filter(local, features_fn, jnp.eye(4, 2), num_skipped=1, score="update_norm")
      >>> state = filtered.init(params)
      >>> _, state, info = filtered.update(params, state, None, jax.random.key(0))
      >>> upload, state, info = filtered.update(params, state, None, jax.random.key(1))
      >>> print(info.mask, info.uploaded_bytes, info.full_bytes)
      [1. 0.] 25 36
    """
    _check_options(num_skipped, max_bytes, score, loss_fn, carry_limit, compat)
    pairs = None if pairs is None else jnp.asarray(pairs)

    def judge(params: Params) -> tuple[tuple[str, ...], tuple[int, ...], int]:
        """Names and bytes of the judged layers and the number of stimuli; static."""
        shapes = jax.eval_shape(features_fn, params, stimuli)
        if not isinstance(shapes, Mapping) or not shapes:
            raise ValueError(f"features_fn must return a dict of at least one layer, got {shapes}.")
        names = tuple(sorted(shapes))
        num_stimuli = shapes[names[0]].shape[0] if shapes[names[0]].shape else 0
        for name in names:
            if len(shapes[name].shape) != 2 or shapes[name].shape[0] != num_stimuli:
                raise ValueError(
                    f"features_fn must return [S, F] for every layer with one S, got {shapes[name].shape} for {name!r}."
                )
        if score == "rcs" and pairs is not None:
            _check_pairs(pairs, num_stimuli, compat)
        sizes = layer_bytes(params, names)
        if max_bytes is not None:
            for name, size in zip(names, sizes, strict=True):
                if size > max_bytes:
                    raise ValueError(
                        f"max_bytes must be at least the bytes of every judged layer, got {max_bytes} for layer "
                        f"{name!r} of {size} bytes."
                    )
        elif num_skipped is not None and not 0 <= num_skipped < len(names):
            raise ValueError(
                f"num_skipped must satisfy 0 <= num_skipped < num_layers, got {num_skipped} and {len(names)}."
            )
        return names, sizes, num_stimuli

    def consistency(received: Params, trained: Params, names: tuple[str, ...], num_stimuli: int) -> jax.Array:
        chosen = stimulus_pairs(num_stimuli) if pairs is None else pairs
        before, after = features_fn(received, stimuli), features_fn(trained, stimuli)

        def one(name: str) -> jax.Array:
            a, b = rdv(before[name], chosen), rdv(after[name], chosen)
            value = rcs(a, b)
            if compat:  # the published correlation divides 0 by 0 here
                value = jnp.where((a.max() == a.min()) | (b.max() == b.min()), jnp.nan, value)
            return value.astype(jnp.float32)

        return jnp.stack([one(name) for name in names])

    def scores_and_importance(
        received: Params,
        delta: Params,
        state: FilterState,
        data: PyTree,
        key: jax.Array,
        names: tuple[str, ...],
        num_stimuli: int,
    ) -> tuple[jax.Array, jax.Array]:
        if score == "random":
            scores = jax.random.uniform(key, (len(names),), jnp.float32)
        elif score == "update_norm":
            scores = update_norm(delta, names)
        elif score == "cosine":
            scores = cosine_change(delta, state.previous, names)
        else:
            trained = jax.tree.map(lambda p, d: p - d.astype(p.dtype), received, delta)
            if score == "rcs":
                scores = consistency(received, trained, names, num_stimuli)
                floor = {"eps": 0.0} if compat else {}
                return scores, relative_change(state.scores, scores, **floor)
            assert loss_fn is not None  # these scores were refused without it
            rows = jax.tree.leaves(data.examples)[0].shape[0]
            valid = jnp.arange(rows, dtype=jnp.int32) < data.num_examples
            gradient = jax.grad(lambda p: mean_loss(loss_fn, p, data.examples, valid, key))(trained)
            scores = fisher(gradient, names) if score == "fisher" else taylor(trained, gradient, names)
        return scores, scores

    def previous_update(delta: Params, names: tuple[str, ...]) -> PyTree:
        return dict(zip(names, layer_leaves(delta, names), strict=True)) if score == "cosine" else ()

    def init(params: Params) -> FilterState:
        names, _, _ = judge(params)
        return FilterState(
            client_state=local_update.init(params),
            scores=jnp.zeros(len(names), jnp.float32),
            age=jnp.zeros(len(names), jnp.int32),
            credit=jnp.zeros((), jnp.int32),
            started=jnp.zeros((), bool),
            previous=previous_update(jax.tree.map(jnp.zeros_like, params), names),
        )

    def update(
        shared: Params, state: FilterState, data: PyTree, key: jax.Array
    ) -> tuple[Upload, FilterState, FilterInfo]:
        names, sizes, num_stimuli = judge(shared)
        upload, client_state, local_info = local_update.update(shared, state.client_state, data, key)
        filter_key = jax.random.fold_in(key, _FILTER_STREAM)
        delta = dense(upload.delta)
        scores, importance = scores_and_importance(shared, delta, state, data, filter_key, names, num_stimuli)

        credit = state.credit
        if max_bytes is None:
            count = min(3, len(names) // 4) if num_skipped is None else num_skipped
            chosen = least_changed(importance, count)
        else:
            budget = max_bytes + state.credit
            chosen = within_budget(budget_priority(importance, state.age), sizes, budget)
            spent = jnp.where(chosen > 0, jnp.asarray(sizes, jnp.int32), 0).sum(dtype=jnp.int32)
            credit = jnp.where(state.started, jnp.minimum(budget - spent, carry_limit), 0)
        chosen = jnp.where(state.started, chosen, 1.0)

        mask = layer_mask(shared, {name: chosen[i] for i, name in enumerate(names)})
        if upload.mask is not None:
            mask = jax.tree.map(lambda ours, theirs: ours * theirs.astype(ours.dtype), mask, upload.mask)
        uploaded = jax.tree.map(lambda m, d: keep(m > 0, d), mask, upload.delta)
        next_state = FilterState(
            client_state=client_state,
            scores=scores,
            age=jnp.where(chosen > 0, 0, state.age + 1),
            credit=credit,
            started=jnp.ones((), bool),
            previous=previous_update(delta, names),
        )
        info = FilterInfo(
            local=local_info,
            mask=chosen,
            scores=scores,
            uploaded_bytes=payload_bytes(mask, shared, num_layers=len(names)),
            full_bytes=payload_bytes(None, shared),
        )
        return Upload(uploaded, mask), next_state, info

    def model(shared: Params, state: FilterState) -> Params:
        return local_update.model(shared, state.client_state)

    return LocalUpdate(init, update, local_update.share, model)
