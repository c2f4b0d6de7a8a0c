"""Cedar's rule: clients are weighted by how far their model agrees with the received one on what is alike.

Reference: You et al., `A framework reforming personalized Internet of Things by federated meta-learning
<https://doi.org/10.1038/s41467-025-59217-z>`_, 2025. Where the published code differs, this file does not follow it:

- row 3: the minority cluster is dropped, not the honest majority, and only across a real gap;
- row 4: similarity weights and detection hold for all parameters, not for the unjudged ones alone;
- rows 5 and 6: true Pearson correlation of the upper triangles (see `rdm.py`);
- row 9: defined for any number of stimuli from 3 on, of classes, and for constant outputs;
- rows 13 and 14: the stimuli are the caller's, and regression uses outputs in place of class probabilities.

`compat=True` reproduces the published arithmetic, except that the honest cluster is the one that is kept.

Screening is no general defence. It sees what a client's model says about the stimuli and nothing else: clients that
flip the sign of their update with factor 1, send Gaussian noise or flip labels are dropped hardly more often than
honest ones. Compose it with a rule on distances, and choose `min_gap` by the share of honest clients that may be lost:
with nobody malicious, 34 wearers of a smartwatch lost 9 % of their uploads at a gap of 0.3 and none at 0.5
(docs/results.md).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cedarjax.core.cohort import MapFn, cohort_map
from cedarjax.core.lowrank import dense
from cedarjax.core.names import layer_mask
from cedarjax.core.trees import weighted_sum
from cedarjax.core.types import Aggregator, Params, PyTree
from cedarjax.robust.clusters import two_means
from cedarjax.robust.presence import read_presence
from cedarjax.robust.rdm import euclidean_rdm, rdm, rdm_similarity, upper_triangle

Representation = Literal["softmax", "raw"]


class CedarInfo(NamedTuple):
    """What the rule tells about one round."""

    similarity: jax.Array
    """`[C]` similarity of each client's model to the received one; 0 for absent clients."""
    labels: jax.Array
    """`[C]` int32 in {0, 1}, 1 = cluster of the more similar; 0 for absent clients."""
    dropped: jax.Array
    """`[C]` bool, clients that detection removed."""
    nonfinite: jax.Array
    """`[C]` bool, clients treated as absent because their update or their model's outputs are not finite."""
    weights: jax.Array
    """`[C]` weights of the similarity part, summing to 1; all 0 if nobody kept a weight and the parameters stay."""
    gap: jax.Array
    """Scalar, distance between the two cluster centers; 0 if there is one cluster."""
    ok: jax.Array
    """bool scalar. False if nobody kept a weight, or if the received model holds all stimuli to be equally alike, so
    that nothing could be screened and the clients' own weights were used."""


class CedarState(NamedTuple):
    """State of `cedar`."""

    num_dropped: jax.Array
    """int32 scalar, clients that detection removed so far, summed over rounds."""
    info: CedarInfo | None = None
    """What the last round tells; `None` after `init`."""


def similarity_weights(similarity: jax.Array, weights: jax.Array, dropped: jax.Array) -> jax.Array:
    """Weight of each client before normalisation: `max(s_i, 0) * n_i`, and 0 for dropped clients.

    Args:
      similarity: `[C]` in `[-1, 1]`.
      weights: `[C]` `n_i`, for example numbers of examples; 0 = absent.
      dropped: `[C]` bool.

    Returns:
      `[C]`, at least 0.

    Example:
      >>> import jax.numpy as jnp
      >>> similarity_weights(jnp.array([0.5, -0.5, 1.0]), jnp.array([2.0, 2.0, 3.0]), jnp.array([False, False, True]))
      Array([1., 0., 0.], dtype=float32)
    """
    kept = (weights > 0) & (similarity > 0) & ~dropped
    return jnp.where(kept, similarity.astype(weights.dtype) * weights, jnp.zeros_like(weights))


def lower_minority(labels: jax.Array, centers: jax.Array, present: jax.Array, min_gap: float) -> jax.Array:
    """Clients of the lower cluster, if it is the strict minority and lies more than `min_gap` below the upper one.

    Args:
      labels: `[C]` from `two_means`.
      centers: `[2]` from `two_means`.
      present: `[C]` bool.
      min_gap: distance between the centers that must be exceeded.

    Returns:
      `[C]` bool, clients to drop; fewer than half of the present ones.

    Example:
      >>> import jax.numpy as jnp
      >>> labels, centers = jnp.array([1, 0, 1]), jnp.array([0.2, 0.9])
      >>> print(lower_minority(labels, centers, jnp.ones(3, bool), min_gap=0.3))
      [False  True False]
    """
    lower = present & (labels == 0)
    minority = 2 * lower.sum(dtype=jnp.int32) < present.sum(dtype=jnp.int32)
    return lower & minority & (centers[1] - centers[0] > min_gap)


def published_minority(labels: jax.Array, present: jax.Array) -> jax.Array:
    """Clients outside the larger cluster; of two equal clusters that of the first present client is kept.

    Args:
      labels: `[C]` from `two_means`.
      present: `[C]` bool.

    Returns:
      `[C]` bool, clients whose similarity weight the published rule sets to 0.

    Example:
      >>> import jax.numpy as jnp
      >>> print(published_minority(jnp.array([0, 1, 0]), jnp.ones(3, bool)))
      [False  True False]
    """
    upper = (present & (labels == 1)).sum(dtype=jnp.int32)
    lower = (present & (labels == 0)).sum(dtype=jnp.int32)
    first = labels[jnp.argmax(present)]
    kept = jnp.where(upper == lower, first, (upper > lower).astype(labels.dtype))
    return present & (labels != kept)


def _normalise(weights: jax.Array) -> jax.Array:
    total = weights.sum()
    return jnp.where(total == 0, jnp.zeros_like(weights), weights / jnp.where(total == 0, jnp.ones_like(total), total))


def _check_options(min_gap: float, compat: bool, layers: tuple[str, ...], representation: str) -> None:
    if min_gap < 0:
        raise ValueError(f"min_gap must be at least 0, got {min_gap}.")
    if representation not in get_args(Representation):
        raise ValueError(f"representation must be one of {get_args(Representation)}, got {representation!r}.")
    if layers and not compat:
        raise ValueError(f"layers must be empty unless compat=True, got {layers}.")
    if compat and representation != "softmax":
        raise ValueError(f"compat=True must come with representation 'softmax', got {representation!r}.")


def cedar(
    logits_fn: Callable[[Params, PyTree], jax.Array],
    stimuli: PyTree,
    detect: bool = True,
    min_gap: float = 0.3,
    compat: bool = False,
    *,
    layers: tuple[str, ...] = (),
    representation: Representation = "softmax",
    map_fn: MapFn | None = None,
) -> Aggregator:
    """Representational screening and aggregation.

    With `s_i` the similarity between the dissimilarity matrices of client `i`'s model and of the received one on the
    stimuli:

        w_i = max(s_i, 0) n_i                     0 for clients that detection dropped
        update_l = sum_i u_il w_i delta_il / sum_i u_il w_i

    where `u_il` tells whether client `i` uploaded layer `l`, and 0 where nobody did. A layer that a client left out is
    the received one when its model is evaluated. Detection splits the similarities of the present clients by
    `two_means` and drops the lower cluster if it is the strict minority and the centers are more than `min_gap` apart;
    the decision holds for all layers.

    If every weight ends 0, the update is 0 and the info says so. If the received model holds all stimuli to be equally
    alike (a head that starts at zero), similarity means nothing: the clients' own weights are used and the info says
    so.

    Args:
      logits_fn: `logits_fn(params, stimuli) -> [S, K]`.
      stimuli: the server's inputs, public or synthetic, `S` at least 3.
      detect: whether to drop a minority cluster.
      min_gap: distance between the centers that detection asks for, at least 0.
      compat: the published arithmetic: `w_i` is the published correlation, neither clipped nor multiplied by `n_i`;
        judged layers get equal weights of those who uploaded them; detection keeps the larger cluster whatever the gap
        and touches only the similarity weights, so unjudged layers alone.
      layers: names of the judged layers, for `compat` only; needed there when clients leave layers out.
      representation: `"softmax"` compares class probabilities by cosine; `"raw"` compares what `logits_fn` returns by
        Euclidean distance, for regression.
      map_fn: how the client axis is laid out while the clients' models are evaluated, best the same `cohort_map` as in
        `federated_round`; default: one vmap. Without its mesh the updates of all clients are gathered on every device.

    Returns:
      An `Aggregator` that reads `params` and `weights=` (`[C]` `n_i`, a tree of `[C]` leaves, or `None` for equal
      weights). Same dtype out as in. Clients that are absent or not finite change nothing.

    Raises:
      ValueError: for options that are out of range or exclude each other (here), and for missing `params`, fewer than
        3 stimuli or client axes that disagree (when `update` is traced).

    Example:
      >>> import jax.numpy as jnp, optax
      >>> logits_fn = lambda params, x: x @ params["head"]
      >>> params = {"head": jnp.eye(3)}
      >>> poison = jnp.eye(3) - jnp.array([[0.0, -9.0, 0.0], [0.0, 50.0, 0.0], [0.0, -9.0, 0.0]])
      >>> updates = {"head": jnp.stack([0.1 * jnp.eye(3), -0.1 * jnp.eye(3), poison])}
      >>> stimuli = jnp.array([[3.0, 0.0, 0.0], [2.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]])
      >>> rule = cedar(logits_fn, stimuli)
      >>> update, state = rule.update(updates, rule.init(params), params, weights=jnp.ones(3))
      >>> print(state.info.dropped, state.num_dropped)
      [False False  True] 1
    """
    _check_options(min_gap, compat, layers, representation)
    map_fn = cohort_map() if map_fn is None else map_fn

    def represent(params: Params) -> jax.Array:
        outputs = logits_fn(params, stimuli)
        if outputs.ndim != 2 or outputs.shape[0] < 3:
            raise ValueError(f"logits_fn must return [S, K] with S >= 3 stimuli, got the shape {outputs.shape}.")
        return rdm(outputs) if representation == "softmax" else euclidean_rdm(outputs)

    def similarities(params: Params, reference: jax.Array, updates: PyTree, weights: PyTree) -> jax.Array:
        # The reference is handed in with what all clients share: on a mesh, a closed-over array has another placement.
        def one(shared: tuple[Params, jax.Array], delta: Params, weight: PyTree) -> jax.Array:
            received, reference = shared
            model = jax.tree.map(
                lambda p, d, w: jnp.where(w > 0, p - d.astype(p.dtype), p), received, dense(delta), weight
            )
            return rdm_similarity(represent(model), reference, compat)

        return map_fn(one, (params, reference), updates, weights).astype(jnp.float32)

    def published_coefficients(params: Params, per_leaf: PyTree, weights: jax.Array) -> PyTree:
        """Equal weights on judged layers, similarity weights on the others, normalised over who uploaded the leaf."""
        unjudged = layer_mask(params, dict.fromkeys(layers, jnp.zeros((), jnp.float32)))

        def leaf(w: jax.Array, is_unjudged: jax.Array) -> jax.Array:
            chosen = jnp.where(is_unjudged > 0, weights, jnp.ones_like(weights))
            return _normalise(jnp.where(w > 0, chosen, 0))

        return jax.tree.map(leaf, per_leaf, unjudged)

    def init(params: PyTree) -> CedarState:
        del params
        return CedarState(jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree,
        state: CedarState,
        params: Params | None = None,
        *,
        weights: PyTree | None = None,
        mesh: Mesh | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, CedarState]:
        del extra_args
        if params is None:
            raise ValueError(
                "params must be given to update, the received model is what clients are compared with; got None."
            )
        masked = weights is not None and jax.tree.structure(weights) != jax.tree.structure(0)
        if compat and masked and not layers:
            raise ValueError(
                "layers must name the judged layers when clients leave layers out and compat=True, got ()."
            )

        presence = read_presence(updates, weights)
        reference = represent(params)
        raw = similarities(params, reference, updates, presence.weights)
        nonfinite = presence.nonfinite | (presence.present & ~jnp.isfinite(raw))
        present = presence.present & ~nonfinite
        per_leaf = jax.tree.map(lambda w: jnp.where(present, w.astype(jnp.float32), 0), presence.weights)
        similarity = jnp.where(present, raw, 0)
        labels, centers = two_means(similarity, present.astype(jnp.float32))

        none = jnp.zeros_like(present)
        if compat:
            dropped = published_minority(labels, present) if detect else none
            client_weights = jnp.where(present & ~dropped, similarity, 0)
            coefficients = published_coefficients(params, per_leaf, client_weights)
            blind = jnp.zeros((), bool)
        else:
            triangle = upper_triangle(reference)
            blind = triangle.max() == triangle.min()
            dropped = lower_minority(labels, centers, present, min_gap) if detect else none
            dropped = dropped & ~blind
            trust = jnp.where(blind, jnp.ones_like(similarity), similarity)
            client_weights = similarity_weights(trust, jnp.stack(jax.tree.leaves(per_leaf)).max(axis=0), dropped)
            coefficients = jax.tree.map(lambda w: _normalise(similarity_weights(trust, w, dropped)), per_leaf)

        info = CedarInfo(
            similarity=similarity,
            labels=labels,
            dropped=dropped,
            nonfinite=nonfinite,
            weights=_normalise(client_weights),
            gap=centers[1] - centers[0],
            ok=~blind & (client_weights != 0).any(),
        )
        num_dropped = state.num_dropped + dropped.sum(dtype=jnp.int32)
        return weighted_sum(coefficients, updates, mesh=mesh), CedarState(num_dropped, info)

    return optax.GradientTransformationExtraArgs(init, update)
