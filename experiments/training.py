"""Trains one variant over all seeds, in segments of rounds that are one compiled program each."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cedarjax as cj
from cedarjax.core import FederatedDataset, RunState
from experiments.seeds import OverSeeds, side_by_side
from experiments.setting import Preset, Setting
from experiments.variants import Variant


class Segment(NamedTuple):
    """What some consecutive rounds did, as host arrays with the seeds on axis 1."""

    loss: np.ndarray
    """`[R, seeds]` mean loss of the clients' batches."""
    uploaded_bytes: np.ndarray
    """`[R, seeds]` int64, bytes uploaded by the cohort."""
    full_bytes: np.ndarray
    """`[R, seeds]` int64, bytes that the cohort would upload without a filter; as much is downloaded."""
    upload_rate: np.ndarray | None
    """`[R, seeds, L]` share of the cohort that uploaded each judged layer; `None` without a filter."""
    caught: np.ndarray | None
    """`[R, seeds]` attackers that were dropped; `None` without detection."""
    attackers: np.ndarray
    """`[R, seeds]` attackers in the cohort."""
    wronged: np.ndarray | None
    """`[R, seeds]` honest clients that were dropped."""
    cohort: int
    """Clients in a round."""


def draw_byzantine(setting: Setting, variant: Variant) -> jax.Array:
    """Which training clients attack: the same share in every seed.

    Args:
      setting: the setting.
      variant: says how many.

    Returns:
      `[seeds, N]` bool.
    """
    count = 0 if variant.attack == "none" else round(variant.attack_fraction * setting.num_train)

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.permutation(jax.random.fold_in(key, 7), jnp.arange(setting.num_train) < count)

    return jax.vmap(draw)(setting.keys)


def poison(setting: Setting, variant: Variant, byzantine: jax.Array) -> FederatedDataset:
    """The training data with the labels of attackers flipped where the attack is on the data.

    Args:
      setting: the setting.
      variant: names the attack.
      byzantine: `[seeds, N]` bool.

    Returns:
      The training federation, `[seeds, ...]`.

    Raises:
      ValueError: if labels are to be flipped in a regression.
    """
    if variant.attack != "label_flip":
        return setting.train
    if setting.task != "classification":
        raise ValueError(f"attack 'label_flip' needs classes, got a data set for {setting.task}.")

    def flip(dataset: FederatedDataset, attackers: jax.Array) -> jax.Array:
        rows = jnp.arange(dataset.num_examples)
        owner = jnp.clip(jnp.searchsorted(dataset.offsets, rows, side="right") - 1, 0, dataset.num_clients - 1)
        labels = dataset.examples["y"]
        return jnp.where(attackers[owner], setting.num_outputs - 1 - labels, labels)

    labels = jax.vmap(flip)(setting.train, byzantine)
    return dataclasses.replace(setting.train, examples={**setting.train.examples, "y": labels})


def judged_layers(setting: Setting) -> tuple[str, ...]:
    """Names of the layers that a filter may leave out, in the order of the filter.

    Args:
      setting: the setting.

    Returns:
      The names.
    """
    one = jax.tree.map(lambda x: x[0], (setting.params, setting.stimuli))
    return tuple(sorted(jax.eval_shape(setting.model.features, *one)))


def local_update(
    setting: Setting, preset: Preset, variant: Variant, learning_rate: float | jax.Array
) -> cj.LocalUpdate:
    """One client's work.

    Args:
      setting: the setting.
      preset: hyper-parameters.
      variant: names the algorithm.
      learning_rate: of the client's Adam.

    Returns:
      A `LocalUpdate` without upload filter.
    """
    tx = optax.adam(learning_rate)
    loss_fn, size, epochs = setting.loss_fn, preset.batch_size, preset.epochs
    match variant.algorithm:
        case "cedar":
            return cj.meta.cedar(loss_fn, tx, tx, batch_size=size, num_epochs=epochs)
        case "fedavg":
            return cj.local.sgd(loss_fn, tx, batch_size=size, num_epochs=epochs)
        case "fedprox":
            return cj.local.prox(0.1, loss_fn, tx, batch_size=size, num_epochs=epochs)
        case "reptile":
            steps = math.ceil(setting.mean_examples * epochs / size)
            return cj.meta.reptile(loss_fn, tx, steps, batch_size=size)
        case "maml" | "fomaml":
            inner = optax.sgd(preset.inner_rate)
            first = variant.algorithm == "fomaml"
            return cj.meta.maml(
                loss_fn, inner, 1, first_order=first, batch_size=size, query_batch_size=preset.meta_batch
            )
        case other:
            raise ValueError(f"algorithm {other!r} does not train together.")


def make_algorithm(
    setting: Setting,
    preset: Preset,
    variant: Variant,
    stimuli: jax.Array,
    map_fn: cj.core.MapFn,
    learning_rate: float | jax.Array,
) -> cj.FederatedAlgorithm:
    """Composes a variant: local update, upload filter, attack, aggregator, server optimiser.

    Args:
      setting: the setting.
      preset: hyper-parameters.
      variant: what to compose.
      stimuli: `[S, ...]`, one seed's stimuli.
      map_fn: how the client axis is laid out.
      learning_rate: of the client's Adam, or of the server's for the MAMLs.

    Returns:
      The algorithm.
    """
    local = local_update(setting, preset, variant, learning_rate)
    if variant.filters:
        options: dict[str, Any] = {"score": variant.score, "num_skipped": variant.num_skipped}
        if variant.score in ("fisher", "taylor"):
            options["loss_fn"] = setting.loss_fn
        if variant.budget is not None:
            one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), setting.params)
            judged = sum(cj.core.layer_bytes(one, judged_layers(setting)))
            options["max_bytes"] = int(variant.budget * judged)
            options["carry_limit"] = int(variant.carry * variant.budget * judged)
        local = cj.layers.upload_filter(local, setting.model.features, stimuli, **options)
    attack = {
        "sign_flip": lambda: cj.attacks.sign_flip(variant.attack_scale),
        "gaussian": lambda: cj.attacks.gaussian(variant.attack_scale),
    }.get(variant.attack, optax.identity)()
    if variant.server == "mean":
        rule = cj.robust.mean()
    else:
        outputs: Literal["softmax", "raw"] = "softmax" if setting.task == "classification" else "raw"
        rule = cj.robust.cedar(
            setting.model.apply,
            stimuli,
            detect=variant.server == "screening",
            min_gap=variant.min_gap,
            representation=outputs,
            map_fn=map_fn,
        )
    meta = variant.algorithm in ("maml", "fomaml")
    server = optax.adam(learning_rate) if meta else optax.sgd(1.0)
    return cj.federated_round(local, optax.chain(attack, rule, server), map_fn)


class Trainer:
    """Runs a variant segment by segment; the program is compiled once.

    Args:
      setting: the setting.
      preset: hyper-parameters.
      variant: what to train; not `scratch`.
      learning_rate: overrides the preset's.
    """

    def __init__(self, setting: Setting, preset: Preset, variant: Variant, learning_rate: float | None = None):
        """Draws the attackers and composes the program; nothing is compiled yet."""
        self.setting, self.preset, self.variant = setting, preset, variant
        self.learning_rate = preset.learning_rate[variant.algorithm] if learning_rate is None else learning_rate
        self.cohort = max(1, round(preset.participation * setting.num_train))
        self.map_fn = cj.cohort_map(side_by_side())
        self.byzantine = draw_byzantine(setting, variant)
        self.train = poison(setting, variant, self.byzantine)

    def _algorithm(self, stimuli: jax.Array) -> cj.FederatedAlgorithm:
        return make_algorithm(self.setting, self.preset, self.variant, stimuli, self.map_fn, self.learning_rate)

    def init(self) -> RunState:
        """State before the first round, `[seeds, ...]`."""
        one_seed = functools.partial(jax.tree.map, lambda x: x[0])
        dataset = one_seed(self.train)

        def init(params: Any, stimuli: jax.Array) -> RunState:
            return cj.init_run(self._algorithm(stimuli), dataset, params)

        return jax.jit(jax.vmap(init))(self.setting.params, self.setting.stimuli)

    def _one_seed(self, args: tuple, num_rounds: int) -> tuple[RunState, Any]:
        state, train, stimuli, byzantine, key = args
        state, history, _ = cj.run_rounds(
            self._algorithm(stimuli),
            train,
            state,
            key,
            num_rounds=num_rounds,
            num_clients=self.cohort,
            byzantine=byzantine,
        )
        return state, summarise_history(history, byzantine, self.variant, self.setting)

    @functools.cache  # noqa: B019 - a trainer lives as long as its run
    def _program(self, num_rounds: int) -> OverSeeds:
        return OverSeeds(lambda one, _: self._one_seed(one, num_rounds), self.setting.num_seeds)

    def _arguments(self, state: RunState) -> tuple:
        return state, self.train, self.setting.stimuli, self.byzantine, self.setting.keys

    def compile(self, state: RunState, num_rounds: int) -> None:
        """Compiles a segment without running it.

        Args:
          state: from `init`.
          num_rounds: length of the segment.
        """
        self._program(num_rounds).compile(self._arguments(state))

    def segment(self, state: RunState, num_rounds: int) -> tuple[RunState, Segment]:
        """Runs some rounds.

        Args:
          state: from `init` or an earlier segment.
          num_rounds: how many rounds.

        Returns:
          The next state and what happened.
        """
        setting = self.setting
        state, told = self._program(num_rounds)(self._arguments(state))
        told = {name: np.swapaxes(np.asarray(value), 0, 1) for name, value in told.items()}
        params_bytes = sum(x[0].nbytes for x in jax.tree.leaves(setting.params))
        full = np.full(told["loss"].shape, self.cohort * params_bytes, np.int64)
        uploaded = told["uploaded"].astype(np.int64).sum(axis=2) if "uploaded" in told else full
        return state, Segment(
            told["loss"],
            uploaded,
            full,
            told.get("upload_rate"),
            told.get("caught"),
            told["attackers"],
            told.get("wronged"),
            self.cohort,
        )


def summarise_history(
    history: cj.History, byzantine: jax.Array, variant: Variant, setting: Setting
) -> dict[str, jax.Array]:
    """Boils one seed's history `[R, C]` down to what is logged.

    Args:
      history: of `run_rounds`.
      byzantine: `[N]` bool.
      variant: says what the infos hold.
      setting: the setting.

    Returns:
      Arrays `[R]`, `[R, C]` (`uploaded`) and `[R, L]` (`upload_rate`) by name.
    """
    told: dict[str, jax.Array] = {}
    local = history.info.local
    if variant.filters:
        told["uploaded"] = local.uploaded_bytes
        told["upload_rate"] = local.mask.mean(axis=1)
        local = local.local
    attackers = byzantine[history.client_id]
    told["loss"] = local.loss.mean(axis=1)
    told["attackers"] = attackers.sum(axis=1)
    if variant.server != "mean":
        dropped = next(info for info in history.info.server if hasattr(info, "dropped")).dropped
        told["caught"] = (dropped & attackers).sum(axis=1)
        told["wronged"] = (dropped & ~attackers).sum(axis=1)
    return told


def split_rounds(num_rounds: int, num_segments: int) -> Iterator[int]:
    """Lengths of the segments of a run: equal, with a shorter one at the end where it does not divide.

    Args:
      num_rounds: rounds of the run.
      num_segments: segments wanted.

    Yields:
      Rounds of each segment.
    """
    length = max(1, num_rounds // max(1, num_segments))
    for start in range(0, num_rounds, length):
        yield min(length, num_rounds - start)
