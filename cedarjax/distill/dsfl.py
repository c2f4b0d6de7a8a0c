"""DS-FL: clients label public samples together, and learn from the sharpened mean of their labels.

Reference: Itahara, Nishio, Koda, Morikura, Yamamoto, `Distillation-Based Semi-Supervised Federated Learning for
Communication-Efficient Collaborative Training with Non-IID Private Data <https://arxiv.org/abs/2008.06180>`_, 2020. Its
server also trains a model of its own on the labels it hands out; here the models are the clients'.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cedarjax.core import (
    ClientData,
    Epochs,
    FederatedAlgorithm,
    MapFn,
    NumStepsFn,
    Params,
    PyTree,
    ServerState,
    accumulator,
    check_positive,
    cohort_map,
)
from cedarjax.distill.blocks import in_blocks
from cedarjax.distill.clients import (
    ClientModel,
    Group,
    TrainInfo,
    client_rows,
    descend,
    init_clients,
    logits_of,
    split_groups,
)
from cedarjax.distill.losses import label_loss
from cedarjax.distill.poison import PoisonFn, poison_logits


class DSFLKnowledge(NamedTuple):
    """Labels of the public samples, as the clients agreed on them last."""

    labels: jax.Array
    """`[P, K]`, sharpened probabilities; zeros where there are none yet."""
    written: jax.Array
    """`[P]` bool, whether there are."""


class DSFLInfo(NamedTuple):
    """What a round tells, `[C]` each."""

    private: TrainInfo
    """Of the steps on the client's own samples."""
    public: TrainInfo
    """Of the steps on the public samples, whose number is what `dsfl_bytes` wants to know."""
    used: jax.Array
    """bool, whether the client's labels went into the mean: it was present and they were finite."""


def sharpen(probabilities: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """Entropy reduction, `softmax(p / T)` of a mean of probabilities.

    Args:
      probabilities: `[..., K]`.
      temperature: `T`, above 0; the lower, the sharper. A traced scalar is allowed.

    Returns:
      `[..., K]`.

    Example:
      >>> import jax.numpy as jnp
      >>> [f"{p:.4f}" for p in sharpen(jnp.array([0.6, 0.4]), 0.1)]
      ['0.8808', '0.1192']
    """
    return jax.nn.softmax(probabilities / jnp.asarray(temperature, probabilities.dtype), axis=-1)


def dsfl(
    groups: Group | PyTree,
    public: jax.Array,
    *,
    num_classes: int,
    temperature: float | jax.Array = 0.1,
    num_public: int | None = None,
    batch_size: int,
    num_epochs: int = 1,
    public_epochs: int = 1,
    num_steps_fn: NumStepsFn | None = None,
    poison_fn: PoisonFn | None = None,
    map_fn: MapFn | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> FederatedAlgorithm:
    """Personal models that agree on the labels of public samples.

    In a round: each client trains on its own samples; uploads `softmax(z)` for the public samples of the round; the
    server broadcasts `softmax(mean / T)`, the sharpened mean over the clients, equally weighted; and each client trains
    on the public samples, on the cross entropy with these labels. The state's `params` are a `DSFLKnowledge`, the
    client states are `ClientModel`s, and examples are a dict with `"x"` and `"y"`.

    Args:
      groups: a `Group`, or a nest of them, as in `fedcache`.
      public: `[P, ...]`, samples without labels that all clients have.
      num_classes: `K`.
      temperature: `T` of `sharpen`, above 0; a traced scalar is allowed.
      num_public: how many of them a round labels, drawn anew each time; default: all.
      batch_size: samples per batch, of both kinds.
      num_epochs: passes over a client's own samples in a round.
      public_epochs: passes over the round's public samples.
      num_steps_fn: as in `core.Epochs`, for the client's own samples.
      poison_fn: what malicious clients upload in place of their probabilities: `permuted_logits`, `peaked_logits(1.0)`.
      map_fn: layout of the client axis, from `cohort_map`; default: one vmap.
      dtype: of what is exchanged.

    Returns:
      A `FederatedAlgorithm` with info `DSFLInfo`. Clients of weight 0 change nothing, whatever their data hold; one
      whose labels are not finite is left out of the mean. The parameters that its `init` takes are not read.

    Raises:
      ValueError: if an argument is out of range (here), or examples, logits or flags of malicious clients are not there
        or not of the right shape (when `step` is traced).
      TypeError: if `groups` is neither.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, optax
      >>> import cedarjax as cj
      >>> from cedarjax import distill
      >>> x, y = np.eye(4, 3, dtype=np.float32), np.array([0, 1, 0, 1])
      >>> dataset = cj.data.federated_dataset({"x": x, "y": y}, client_id=[0, 0, 1, 1])
      >>> group = distill.Group(lambda params, x, key: x @ params, optax.sgd(0.1))
      >>> algorithm = dsfl(group, jnp.ones((5, 3)), num_classes=2, batch_size=2)
      >>> state = cj.init_run(algorithm, dataset, jnp.zeros((3, 2)))
      >>> state, history, _ = cj.run_rounds(algorithm, dataset, state, jax.random.key(0), num_rounds=2)
      >>> history.info.public.num_rows.tolist(), bool(state.server.params.written.all())
      ([[5, 5], [5, 5]], True)
    """
    leaves, structure = split_groups(groups)
    check_positive(num_classes=num_classes, public_epochs=public_epochs)
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")
    if jnp.ndim(public) < 1 or public.shape[0] < 1:
        raise ValueError(f"public must be [P, ...] with P at least 1, got the shape {jnp.shape(public)}.")
    total = public.shape[0]
    size = total if num_public is None else num_public
    if not 1 <= size <= total:
        raise ValueError(f"num_public must satisfy 1 <= num_public <= {total} (all public samples), got {size}.")
    own_epochs = Epochs(batch_size, num_epochs, num_steps_fn).checked()
    shared_epochs = Epochs(batch_size, public_epochs)
    layout = cohort_map() if map_fn is None else map_fn

    def learn_and_label(group: Group, x: jax.Array, *one: PyTree) -> tuple[ClientModel, TrainInfo, jax.Array]:
        model, data, key, present, malicious = one
        own_key, label_key = jax.random.split(jax.random.fold_in(key, 0))

        def loss(params: Params, examples: PyTree, knowledge: PyTree, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = logits_of(group, params, examples["x"], key, num_classes)
            return label_loss(logits, examples["y"]), logits

        def probabilities(x: jax.Array) -> jax.Array:
            logits = logits_of(group, model.params, x, label_key, num_classes)
            return jax.nn.softmax(logits.astype(accumulator(logits)), axis=1).astype(dtype)

        model, _, told = descend(loss, group.tx, model, data, own_key, own_epochs, present)
        labels = in_blocks(probabilities, x, batch_size)
        return model, told, labels if poison_fn is None else poison_logits(labels, malicious, poison_fn)

    def distil(group: Group, shared: tuple[PyTree, jax.Array], *one: PyTree) -> tuple[ClientModel, TrainInfo]:
        examples, known = shared
        model, key, present = one

        def loss(params: Params, examples: PyTree, knowledge: PyTree, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = logits_of(group, params, examples["x"], key, num_classes)
            log_p = jax.nn.log_softmax(logits.astype(accumulator(logits)), axis=1)
            return -(examples["y"].astype(log_p.dtype) * log_p).sum(axis=1), logits

        count = jnp.asarray(size, jnp.int32)
        data, key = ClientData(examples, count, count), jax.random.fold_in(key, 1)
        model, _, told = descend(loss, group.tx, model, data, key, shared_epochs, present & known)
        return model, told

    def init(params: PyTree) -> ServerState:
        del params
        knowledge = DSFLKnowledge(jnp.zeros((total, num_classes), dtype), jnp.zeros(total, bool))
        return ServerState(knowledge, (), jnp.zeros((), jnp.int32))

    def step(state: ServerState, cohort: PyTree, key: jax.Array) -> tuple[ServerState, PyTree, PyTree]:
        cohorts = structure.flatten_up_to(cohort)
        if poison_fn is not None and any(one.byzantine is None for one in cohorts):
            raise ValueError("cohort.byzantine must be given, [C] bool, with a poison_fn; got None.")
        draw_key, key = jax.random.split(key)
        rows = jnp.arange(total, dtype=jnp.int32)
        if size < total:
            rows = jax.random.permutation(draw_key, rows)[:size]
        x = public[rows]

        sums, count, trained = jnp.zeros((size, num_classes), dtype), jnp.zeros((), dtype), []
        for group, one in zip(leaves, cohorts, strict=True):
            clients = client_rows(one, key, ("x", "y"))
            model, told, labels = layout(
                lambda shared, *one, group=group: learn_and_label(group, shared, *one), x, *clients
            )
            used = (one.weights > 0) & jnp.isfinite(labels).all(axis=(1, 2))
            labels = jnp.where(used[:, None, None], labels, jnp.zeros_like(labels))
            sums = sums + jnp.tensordot(used.astype(dtype), labels, axes=1, precision=jax.lax.Precision.HIGHEST)
            count = count + used.astype(dtype).sum()
            trained.append((model, clients, told, used))

        known = count > 0
        agreed = sharpen(sums / jnp.maximum(count, 1), temperature)
        results = []
        for group, (model, clients, told, used) in zip(leaves, trained, strict=True):
            _, _, keys, present, _ = clients
            model, public_told = layout(
                lambda shared, *one, group=group: distil(group, shared, *one),
                ({"x": x, "y": agreed}, known),
                model,
                keys,
                present,
            )
            results.append((model, DSFLInfo(told, public_told, used)))

        before = state.params
        knowledge = DSFLKnowledge(
            before.labels.at[rows].set(jnp.where(known, agreed, before.labels[rows])),
            before.written.at[rows].set(known | before.written[rows]),
        )
        models, infos = (structure.unflatten(list(part)) for part in zip(*results, strict=True))
        return ServerState(knowledge, state.opt_state, state.round + 1), models, infos

    def model(shared: PyTree, client_state: PyTree) -> PyTree:
        return structure.unflatten([one.params for one in structure.flatten_up_to(client_state)])

    return FederatedAlgorithm(init, step, lambda params: init_clients(groups, params), model)
