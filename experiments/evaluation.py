"""Phase three: clients that never trained adapt, with the optimiser that did best on validation clients."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cedarjax as cj
from cedarjax import nn
from cedarjax.core import ClientData, FederatedDataset
from experiments.seeds import OverSeeds, side_by_side
from experiments.setting import Setting

OPTIMISERS = {"adam": optax.adam, "sgd": optax.sgd}
RATES = {"adam": (1e-3, 3e-3, 1e-2), "sgd": (0.03, 0.1, 0.3)}


class Curve(NamedTuple):
    """Scores over adaptation steps, host arrays."""

    pooled: dict[str, np.ndarray]
    """Score name to `[seeds, steps + 1]`, over all query examples of all clients together."""
    per_client: np.ndarray
    """`[seeds, clients, steps + 1]` the metric of each client on its own."""


class Adaptation(NamedTuple):
    """How devices adapt; the same choice for every client."""

    optimiser: str
    """Key of `OPTIMISERS`."""
    learning_rate: float
    """Its rate."""

    def __str__(self) -> str:
        """For example `sgd 0.1`."""
        return f"{self.optimiser} {self.learning_rate:g}"


def metric_name(setting: Setting) -> str:
    """The metric that tables are sorted by; higher is better.

    Args:
      setting: the setting.

    Returns:
      `"accuracy"` or `"r2"`.
    """
    return "accuracy" if setting.task == "classification" else "r2"


def query_counts(setting: Setting, params: Any, data: ClientData) -> Any:
    """What the metrics are made of, on one client's query rows.

    Args:
      setting: the setting.
      params: a model.
      data: one client's.

    Returns:
      A `Confusion` or `Moments`.
    """
    outputs = setting.model.apply(params, data.examples["x"])
    rows = jnp.arange(outputs.shape[0])
    query = (rows >= data.num_support) & (rows < data.num_examples)
    if setting.task == "classification":
        return cj.metrics.confusion(outputs, data.examples["y"], query)
    return cj.metrics.moments(outputs[:, 0], data.examples["y"], query)


def share_right(model: nn.Model, params: Any, dataset: FederatedDataset) -> jax.Array:
    """Share of all clients' rows that a model names right.

    Args:
      model: of a classification.
      params: its parameters.
      dataset: clients whose rows together are the test.

    Returns:
      Scalar.
    """
    x, y = dataset.examples["x"], dataset.examples["y"]
    counted = jnp.arange(y.shape[0]) < dataset.offsets[-1]
    right = (model.apply(params, x).argmax(axis=1) == y) & counted
    return right.sum() / counted.sum()


class Evaluator:
    """Adapts every client of a federation and scores it after each step.

    It is compiled once per optimiser and number of steps.

    Args:
      setting: the setting.
    """

    def __init__(self, setting: Setting):
        """Remembers the setting; nothing is compiled yet."""
        self.setting = setting

    @functools.cache  # noqa: B019 - one evaluator a program
    def _program(
        self, optimiser: str, num_steps: int, max_support: int, eval_steps: tuple[int, ...] | None
    ) -> OverSeeds:
        def one_seed(one: tuple[Any, FederatedDataset, jax.Array], learning_rate: jax.Array) -> Any:
            params, dataset, key = one
            tx = OPTIMISERS[optimiser](learning_rate)
            run = cj.meta.adapt(
                self.setting.loss_fn,
                tx,
                num_steps,
                max_support=max_support,
                eval_fn=functools.partial(query_counts, self.setting),
                eval_steps=eval_steps,
            )
            clients = cj.core.take_clients(dataset, jnp.arange(dataset.num_clients)).data
            keys = jax.random.split(key, dataset.num_clients)
            map_fn = cj.cohort_map(side_by_side())
            counts = map_fn(lambda shared, *client: run(shared, *client)[1], params, clients, keys)
            pooled = jax.vmap(lambda c: c.pool().summarise(), in_axes=1)(counts)
            return pooled, jax.vmap(jax.vmap(lambda c: c.summarise()))(counts)

        return OverSeeds(one_seed, self.setting.num_seeds)

    def _prepared(
        self, dataset: FederatedDataset, adaptation: Adaptation, num_steps: int, eval_steps: tuple[int, ...] | None
    ) -> tuple[OverSeeds, jax.Array]:
        program = self._program(adaptation.optimiser, num_steps, int(dataset.num_support.max()), eval_steps)
        return program, jnp.float32(adaptation.learning_rate)

    def compile(
        self,
        dataset: FederatedDataset,
        adaptation: Adaptation,
        num_steps: int,
        eval_steps: tuple[int, ...] | None = None,
    ) -> None:
        """Compiles what `curve` will run with these arguments.

        Args:
          dataset: as in `curve`.
          adaptation: as in `curve`; only the optimiser counts.
          num_steps: as in `curve`.
          eval_steps: as in `curve`.
        """
        program, rate = self._prepared(dataset, adaptation, num_steps, eval_steps)
        program.compile((self.setting.params, dataset, self.setting.keys), rate)

    def curve(
        self,
        params: Any,
        dataset: FederatedDataset,
        adaptation: Adaptation,
        num_steps: int,
        eval_steps: tuple[int, ...] | None = None,
    ) -> Curve:
        """Adapts every client and scores it after each step.

        Args:
          params: `[seeds, ...]` initialisations.
          dataset: `[seeds, ...]` clients to adapt to.
          adaptation: optimiser and rate.
          num_steps: adaptation steps.
          eval_steps: steps after which clients are scored; default: all.

        Returns:
          The scores, in place of `steps + 1` so many as there are `eval_steps`.
        """
        program, rate = self._prepared(dataset, adaptation, num_steps, eval_steps)
        pooled, single = jax.device_get(program((params, dataset, self.setting.keys), rate))
        return Curve(pooled._asdict(), getattr(single, metric_name(self.setting)))

    def choose(self, params: Any, num_steps: int, extra: tuple[Adaptation, ...] = ()) -> tuple[Adaptation, float]:
        """The optimiser and rate with the best mean metric over adaptation steps on the validation clients.

        Steps 1, 5 and the last one count equally, so neither speed nor the end result decides alone. Every algorithm
        chooses from the same grid.

        Args:
          params: `[seeds, ...]` initialisations.
          num_steps: adaptation steps.
          extra: candidates beside `RATES`, such as the inner rate of a MAML.

        Returns:
          The best candidate, the same for all seeds, and its score.
        """
        name = metric_name(self.setting)
        told = chosen_steps(num_steps)
        grid = [Adaptation(optimiser, rate) for optimiser, rates in RATES.items() for rate in rates]
        scored = []
        for candidate in dict.fromkeys([*grid, *extra]):
            curve = self.curve(params, self.setting.validation, candidate, num_steps, told)
            scored.append((float(np.nan_to_num(curve.pooled[name], nan=-1e9).mean()), candidate))
        score, best = max(scored, key=lambda pair: pair[0])
        return best, score


def chosen_steps(num_steps: int) -> tuple[int, ...]:
    """Adaptation steps that count when an optimiser is chosen.

    Args:
      num_steps: the last one.

    Returns:
      1, 5 and the last, as far as they are there.
    """
    return tuple(sorted({min(1, num_steps), min(5, num_steps), num_steps}))
