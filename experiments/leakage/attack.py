"""The attacks on one row of the table, and how well they did."""

import functools
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cedarjax.attacks import inversion
from experiments.leakage.contenders import DistanceName, Row, Sent
from experiments.leakage.pictures import Scores, pack_pictures, picture_space, score
from experiments.leakage.problem import Problem, Victims, Work, after_cedar
from experiments.seeds import OverSeeds

SMOOTHNESS = (1e-3, 1e-1)
"""Weights of the total variation: for clear uploads, and for blurred ones."""
PLAINNESS = (1e-3, 1e-1)
"""Weights of the squared length of a picture among the public ones, in standard deviations."""
ATTACKERS = (*(f"smooth {weight:g}" for weight in SMOOTHNESS), *(f"public {weight:g}" for weight in PLAINNESS))


class Red(NamedTuple):
    """One seed, as the attacks' programs take it."""

    victims: Victims
    """The victims."""
    sent: Sent
    """Leaves `[V, ...]`."""


def uploaded(
    p: Problem, work: Work, cedar: dict[str, Any] | None, one: Victims, _: Any = None
) -> tuple[Victims, Any, Any]:
    """What the victims of a seed would send without protection.

    Args:
      p: the problem.
      work: what is uploaded.
      cedar: options of Cedar's filter, or None.
      one: the seed.

    Returns:
      The victims with the model that the server broadcast, uploads `[V, ...]`, and Cedar's masks, or None.
    """
    masks = None
    if cedar is not None:
        params, masks = after_cedar(p, one, cedar)
        one = one._replace(params=params)
    return one, p.uploads(one, work), masks


def sent_by(row: Row, one: Victims, uploads: Any, masks: Any) -> Red:
    """What is observed of every victim of a seed.

    Args:
      row: of the table.
      one: the seed.
      uploads: leaves `[V, ...]`.
      masks: of Cedar's filter, or None.
    """
    norms = jax.vmap(lambda u: jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(u))))(uploads)
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(one.keys)
    sent = jax.vmap(lambda u, k: row.protect(u, k, jnp.median(norms)))(uploads, keys)
    if masks is not None:
        mask = jax.tree.map(
            lambda m, x: jnp.broadcast_to(m.reshape(-1, *[1] * (x.ndim - 1)) > 0, x.shape), masks, uploads
        )
        sent = Sent(jax.tree.map(lambda m, x: jnp.where(m, x, 0), mask, uploads), mask)
    return Red(one, sent)


def read_labels(p: Problem, one: Victims, observed: Any, work: Work) -> jax.Array:
    """`[B]`, off the last bias."""
    bias = observed["head"]["bias"]
    if work.num_rows == 1:
        return inversion.label_of_gradient(bias=bias).label[None]
    mean = jax.nn.softmax(p.model.apply(one.params, one.public)).mean(axis=0)
    counts = inversion.label_counts(bias / work.num_steps, work.num_rows, mean_probabilities=mean)
    return inversion.labels_from_counts(counts, work.num_rows)


def attack(
    p: Problem, work: Work, distance: DistanceName, has_head: bool, num_steps: int, red: Red, _: Any = None
) -> Scores:
    """All victims of a seed, attacked in every way; leaves `[len(ATTACKERS), V]`.

    Args:
      p: the problem.
      work: what was uploaded.
      distance: what is compared.
      has_head: whether labels are read off the last layer; else they are guessed along.
      num_steps: steps of every search.
      red: the seed.
    """
    one, sent = red
    shape = (work.num_rows, *one.public.shape[1:])
    space = picture_space(one.public)

    def one_victim(sent: Sent, truth: Any, key: jax.Array) -> Scores:
        simulate = p.simulate(one.params, work)
        labels = read_labels(p, one, sent.observed, work) if has_head else None
        distance_fn = inversion.sign_distance if distance == "signs" else inversion.cosine_distance
        options = {"num_steps": num_steps, "mask": sent.mask, "distance_fn": distance_fn}
        search_key = jax.random.fold_in(key, 2)

        def without_pictures(smoothness: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = inversion.inverting_gradients(
                lambda batch, _: simulate(batch, key),
                sent.observed,
                shape,
                search_key,
                labels=labels,
                num_classes=p.num_classes,
                tv_weight=smoothness,
                **options,
            )
            return found.x, found.y

        def with_pictures(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
            def start(start_key: jax.Array) -> dict[str, jax.Array]:
                size = (work.num_rows, space.components.shape[0])
                guess = {"z": 0.1 * jax.random.normal(start_key, size)}
                return guess if has_head else {**guess, "y": jnp.zeros((work.num_rows, p.num_classes))}

            def batch_of(guess: dict[str, jax.Array]) -> dict[str, jax.Array]:
                y = jax.nn.softmax(guess["y"]) if labels is None else labels
                return {"x": space.pictures(guess["z"]), "y": y}

            guess, _ = inversion.match(
                lambda guess, _: simulate(batch_of(guess), key),
                sent.observed,
                start,
                optax.adam(optax.cosine_decay_schedule(0.1, num_steps)),
                search_key,
                prior_fn=lambda guess: weight * jnp.square(guess["z"]).mean(),
                **options,
            )
            found = batch_of(guess)
            return found["x"], found["y"] if has_head else found["y"].argmax(axis=1).astype(jnp.int32)

        found = [jax.vmap(without_pictures)(jnp.asarray(SMOOTHNESS)), jax.vmap(with_pictures)(jnp.asarray(PLAINNESS))]
        x, y = jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)
        return jax.vmap(lambda x, y: score(x, y, truth, one.public))(x, y)

    scores = jax.vmap(one_victim)(sent, p.rows(one, work), one.keys)
    return jax.tree.map(lambda z: z.swapaxes(0, 1), scores)


def read_off(p: Problem, red: Red, _: Any = None) -> Scores:
    """All victims of a seed by the quotient of the first layer's gradients, which is exact; leaves `[V]`."""
    one, sent = red

    def one_victim(observed: Any, truth: Any) -> Scores:
        found = inversion.linear_input(**observed["block1"])
        label = inversion.label_of_gradient(bias=observed["head"]["bias"]).label
        return score(jnp.clip(found.x, 0, 1).reshape(truth["x"].shape), label[None], truth, one.public)

    return jax.vmap(one_victim)(sent.observed, p.rows(one, Work()))


def or_read_off(searched: Mapping[str, Scores], read: Scores, is_there: np.ndarray) -> dict[str, Scores]:
    """Attackers who read the picture off the first layer where it was sent, and search elsewhere.

    Args:
      searched: leaves `[S, V, ...]` of those who only search.
      read: leaves `[S, V, ...]`, what is read off, right or not.
      is_there: `[S, V]`, whether the first layer was sent.
    """
    if is_there.all():
        return {"read off": read}
    if not is_there.any():
        return {}

    def choose(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.where(is_there.reshape(*is_there.shape, *[1] * (a.ndim - 2)), a, b)

    return {f"{name}, or read off": jax.tree.map(choose, read, scores) for name, scores in searched.items()}


class Attacks:
    """Attacks rows of the table; programs are compiled once for all rows that share them.

    Args:
      problem: who is attacked.
      num_steps: steps of every search.
    """

    def __init__(self, problem: Problem, num_steps: int):
        """Remembers the parts; nothing is compiled yet."""
        self.problem, self.num_steps = problem, num_steps
        self.num_seeds = problem.victims.x.shape[0]
        self._programs: dict[Any, OverSeeds] = {}
        self._uploads: dict[Work, Any] = {}

    def _program(self, work: Work, distance: DistanceName, has_head: bool) -> OverSeeds:
        name = (work, distance, has_head)
        if name not in self._programs:
            fun = functools.partial(attack, self.problem, work, distance, has_head, self.num_steps)
            self._programs[name] = OverSeeds(fun, self.num_seeds)
        return self._programs[name]

    def _observed(self, row: Row) -> Red:
        """All seeds; uploads that rows share are found once."""
        uploads = self._uploads.get(row.work) if row.cedar is None else None
        if uploads is None:
            program = OverSeeds(functools.partial(uploaded, self.problem, row.work, row.cedar), self.num_seeds)
            uploads = program(self.problem.victims)
            if row.cedar is None:
                self._uploads[row.work] = uploads
        return jax.jit(jax.vmap(functools.partial(sent_by, row)))(*uploads)

    def run(self, name: str, row: Row) -> dict[str, Any]:
        """Attacks one row.

        Args:
          name: its key.
          row: the row.

        Returns:
          The record, see `experiments.leakage.summary`.
        """
        started = time.perf_counter()
        red = self._observed(row)
        found = {}
        for distance in row.distances:
            scores = jax.device_get(self._program(row.work, distance, row.has_head)(red))
            for number, attacker in enumerate(ATTACKERS):
                found[f"{attacker}, {distance}"] = jax.tree.map(lambda z, n=number: z[:, n], scores)
        if self.problem.starts_linear and row.work.num_rows == 1:
            program = OverSeeds(functools.partial(read_off, self.problem), self.num_seeds)
            is_there = np.any(red.sent.mask["block1"]["kernel"], axis=(-2, -1))
            found |= or_read_off(found, jax.device_get(program(red)), is_there)
        sent = [np.asarray(leaf, np.float64).mean() * leaf[0, 0].size for leaf in jax.tree.leaves(red.sent.mask)]
        size = sum(leaf[0, 0].size for leaf in jax.tree.leaves(red.sent.mask))
        return {
            "name": row.label,
            "key": name,
            "group": row.group,
            "pictures": row.work.num_rows,
            "attackers": [_told(attacker, scores) for attacker, scores in found.items()],
            "sent": sum(sent) / size,
            "left_out": _left_out(red.sent.mask) if row.cedar is not None else {},
            "seconds": round(time.perf_counter() - started, 1),
        }


def blind(p: Problem) -> dict[str, Any]:
    """An attacker who sees no upload: the mean of the public pictures, and their most frequent label."""

    def guess(one: Victims) -> Scores:
        x = one.public.mean(axis=0)[None]
        y = jnp.bincount(one.public_y, length=p.num_classes).argmax()[None]
        return jax.vmap(lambda truth: score(x, y, truth, one.public))(p.rows(one, Work()))

    scores = jax.device_get(jax.vmap(guess)(p.victims))
    return {
        "name": "nothing, a blind guess",
        "key": "blind",
        "group": "",
        "pictures": 1,
        "attackers": [_told("mean picture", scores)],
        "sent": 0.0,
        "left_out": {},
        "seconds": 0.0,
    }


def originals(p: Problem) -> str:
    """The true pictures of the victims that are shown."""
    return pack_pictures(np.asarray(p.victims.x[:, :, 0, ..., 0]))


def _told(name: str, scores: Scores) -> dict[str, Any]:
    numbers = {
        field: np.asarray(value, np.float64).tolist() for field, value in scores._asdict().items() if field != "picture"
    }
    return {"attacker": name, **numbers, "shown": pack_pictures(np.asarray(scores.picture))}


def _left_out(mask: Any) -> dict[str, float]:
    """Share of the uploads in which a layer stayed away, for those that ever do."""
    layers = {name: jax.tree.leaves(part) for name, part in mask.items()}
    shares = {name: 1 - float(np.mean([np.asarray(leaf).mean() for leaf in leaves])) for name, leaves in layers.items()}
    return {name: share for name, share in shares.items() if share > 0}
