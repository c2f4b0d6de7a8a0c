"""Who is attacked: pictures, models, and what a client does with them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cedarjax as cj
from cedarjax import nn
from cedarjax.attacks import inversion
from cedarjax.core import LossFn
from experiments import datasets
from experiments.leakage.model import ModelName, make_model

SIDE = 28
MOST_ROWS = 16
"""Pictures that a victim may stand together with, its own among them."""
NUM_PUBLIC = 400
"""Other pictures of the kind, which the attacker has."""
NUM_STIMULI = 20
CEDAR_ROUNDS = 3
"""Rounds of the small federation before the one that is attacked, so that Cedar's filter has something to compare."""


class Victims(NamedTuple):
    """One seed."""

    params: Any
    """The model that the server broadcast."""
    x: jax.Array
    """`[V, MOST_ROWS, H, W, 1]`: each victim's picture, then those that others add to a sum or it to a batch."""
    y: jax.Array
    """`[V, MOST_ROWS]` int32."""
    public: jax.Array
    """`[NUM_PUBLIC, H, W, 1]`."""
    public_y: jax.Array
    """`[NUM_PUBLIC]` int32."""
    keys: jax.Array
    """`[V]`."""


class Work(NamedTuple):
    """What is uploaded: the mean over clients of what each trains."""

    num_clients: int = 1
    num_images: int = 1
    """Of each client."""
    batch_size: int = 1
    """Of the one epoch that a client trains."""
    slowness: float = 1.0
    """What the rate of the clients' SGD is divided by."""

    @property
    def num_rows(self) -> int:
        """Pictures in all."""
        return self.num_clients * self.num_images

    @property
    def num_steps(self) -> int:
        """Local steps."""
        return self.num_images // self.batch_size


class Problem(NamedTuple):
    """What all rows of the table share."""

    model: nn.Model
    """The model."""
    loss_fn: LossFn
    """Cross entropy, of soft labels too."""
    victims: Victims
    """Leaves `[seeds, ...]`."""
    rate: float
    """Of the clients' SGD."""
    num_classes: int
    """Classes."""
    starts_linear: bool
    """Whether the first layer is fully connected."""

    def local(self, work: Work) -> cj.LocalUpdate:
        """One client's training."""
        return cj.local.sgd(self.loss_fn, optax.sgd(self.rate / work.slowness), batch_size=work.batch_size)

    def simulate(self, params: Any, work: Work) -> inversion.SimulateFn:
        """`(batch of work.num_rows, key) -> delta / rate`, the sum of the steps' gradients.

        The attacker knows the order of the batches: `key` is the client's.
        """
        one = inversion.gradient_of(self.loss_fn, params)
        if work.num_steps > 1:
            trained = inversion.update_of(self.local(work), params)
            one = lambda batch, key: jax.tree.map(lambda d: d * work.slowness / self.rate, trained(batch, key))  # noqa: E731
        if work.num_clients == 1:
            return one

        def mean(batch: Any, key: jax.Array) -> Any:
            apart = jax.tree.map(lambda z: z.reshape(work.num_clients, work.num_images, *z.shape[1:]), batch)
            return jax.tree.map(lambda z: z.mean(axis=0), jax.vmap(lambda b: one(b, key))(apart))

        return mean

    def rows(self, one: Victims, work: Work) -> dict[str, jax.Array]:
        """`[V, rows, ...]`, the pictures behind each upload."""
        return {"x": one.x[:, : work.num_rows], "y": one.y[:, : work.num_rows]}

    def uploads(self, one: Victims, work: Work) -> Any:
        """Leaves `[V, ...]`, unprotected uploads."""
        simulate = self.simulate(one.params, work)
        return jax.vmap(lambda batch, key: simulate(batch, key))(self.rows(one, work), one.keys)


def load_images(name: str, data_dir: Any, seed: int) -> tuple[np.ndarray, np.ndarray, int, dict[str, Any]]:
    """Pictures `[n, 28, 28, 1]` in [0, 1], labels, the number of classes, and a summary of the data.

    Args:
      name: data set of classification with grey pictures, or vectors that are square pictures.
      data_dir: where the files are.
      seed: of the federation's draws.

    Raises:
      ValueError: if the data are of another kind.
    """
    federation = datasets.load(name, data_dir=data_dir, seed=seed, alpha=1.0 if name == "digits" else None)
    x = federation.x
    side = int(round(x.shape[1] ** 0.5)) if x.ndim == 2 else x.shape[1]
    is_square = x.size == len(x) * side * side
    if federation.task != "classification" or federation.class_names is None or not is_square or side < 8:
        raise ValueError(f"dataset must hold square grey pictures with shared classes, such as digits, got {name!r}.")
    x = x.reshape(-1, side, side, 1)
    if side != SIDE:
        x = np.asarray(jax.image.resize(jnp.asarray(x), (len(x), SIDE, SIDE, 1), "linear"))
    return np.clip(x, 0, 1), federation.y, federation.num_outputs, datasets.summary(federation)


def make_problem(
    name: str,
    data_dir: Any,
    model_name: ModelName,
    *,
    num_seeds: int,
    num_victims: int,
    rate: float,
    warm_up: int,
) -> tuple[Problem, dict[str, Any]]:
    """Draws pictures, models and victims of every seed.

    Args:
      name: data set.
      data_dir: where its files are.
      model_name: which model.
      num_seeds: seeds.
      num_victims: victims of each.
      rate: of the clients' SGD.
      warm_up: steps of training on public pictures before the upload that is attacked.

    Returns:
      The problem, and the summary of the data.
    """
    x, y, num_classes, told = load_images(name, data_dir, 0)
    need = num_victims * MOST_ROWS + NUM_PUBLIC
    if len(x) < need:
        raise ValueError(f"dataset must have at least {need} pictures for {num_victims} victims, got {len(x)}.")
    model = make_model(model_name, SIDE, num_classes)
    loss_fn = inversion.soft_cross_entropy(model.apply)
    train = _warm_up(loss_fn, warm_up)
    seeds = []
    for seed in range(num_seeds):
        chosen = np.random.default_rng(seed).permutation(len(x))[:need]
        own, public = np.split(chosen, [num_victims * MOST_ROWS])
        init_key, train_key, key = jax.random.split(jax.random.key(seed), 3)
        others = {"x": jnp.asarray(x[public]), "y": jnp.asarray(y[public])}
        seeds.append(
            Victims(
                params=train(model.init(init_key), others, train_key),
                x=jnp.asarray(x[own]).reshape(num_victims, MOST_ROWS, SIDE, SIDE, 1),
                y=jnp.asarray(y[own]).reshape(num_victims, MOST_ROWS),
                public=others["x"],
                public_y=others["y"],
                keys=jax.random.split(key, num_victims),
            )
        )
    victims = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    return Problem(model, loss_fn, victims, rate, num_classes, model_name == "mlp"), told


def _warm_up(loss_fn: LossFn, num_steps: int) -> Callable[[Any, Any, jax.Array], Any]:
    """Adam on batches of public pictures."""
    tx = optax.adam(1e-3)

    def train(params: Any, examples: Any, key: jax.Array) -> Any:
        def step(carry: Any, step_key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            rows = jax.random.randint(step_key, (32,), 0, NUM_PUBLIC)
            batch = jax.tree.map(lambda z: z[rows], examples)
            updates, state = tx.update(jax.grad(loss_fn)(params, batch, step_key), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, num_steps))[0][0]

    return jax.jit(train) if num_steps else lambda params, examples, key: params


def after_cedar(p: Problem, one: Victims, options: dict[str, Any]) -> tuple[Any, Any]:
    """A small federation of the victims under Cedar's filter, up to the upload that is attacked.

    Args:
      p: the problem.
      one: one seed.
      options: of `layers.upload_filter`.

    Returns:
      What the server broadcasts last, and the masks `[V, ...]` that the rule then chooses.
    """
    local = cj.layers.upload_filter(p.local(Work()), p.model.features, one.public[:NUM_STIMULI], **options)
    server = optax.chain(cj.robust.mean(), optax.sgd(1.0))
    algorithm = cj.federated_round(local, server)
    count = one.x.shape[0]
    data = cj.ClientData(p.rows(one, Work()), jnp.ones(count, jnp.int32), jnp.ones(count, jnp.int32))
    fresh = jax.tree.map(lambda z: jnp.stack([z] * count), algorithm.init_client(one.params))

    def one_round(carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], None]:
        state, clients = carry
        cohort = cj.Cohort(data, jnp.ones(count), jnp.arange(count, dtype=jnp.int32), clients)
        state, clients, _ = algorithm.step(state, cohort, key)
        return (state, clients), None

    keys = jax.random.split(jax.random.fold_in(one.keys[0], 3), CEDAR_ROUNDS)
    (state, clients), _ = jax.lax.scan(one_round, (algorithm.init(one.params), fresh), keys)
    update = lambda client, own, key: local.update(state.params, client, own, key)[0].mask  # noqa: E731
    return state.params, jax.vmap(update)(clients, data, one.keys)
