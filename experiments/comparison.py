"""A comparison: trains and scores every variant, with progress on screen, a log on disk, and checkpoints in between."""

import dataclasses
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cedarjax import metrics
from experiments import checkpoints, files, page, plots
from experiments.evaluation import OPTIMISERS, Adaptation, Evaluator, chosen_steps, metric_name
from experiments.setting import Preset, Setting
from experiments.training import Segment, Trainer, judged_layers, split_rounds
from experiments.variants import Variant

CURVE_STEPS = 5


class Interrupted(Exception):
    """The run was stopped by Ctrl-C after its state was saved."""


@contextmanager
def polite_interrupts() -> Iterator[list[int]]:
    """Collects Ctrl-C so that a segment can end first; a second one raises at once.

    Yields:
      A list that is not empty once Ctrl-C was pressed.
    """
    pressed: list[int] = []

    def on_signal(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


@dataclasses.dataclass
class Plan:
    """What a comparison needs beside the setting."""

    title: str
    """Headline of the report."""
    variants: Sequence[Variant]
    """Rows of the table."""
    preset: Preset
    """Hyper-parameters."""
    rounds: int
    """Rounds of training."""
    steps: int
    """Adaptation steps on new clients."""
    learning_rate: float | None
    """Overrides the preset's rates."""
    segments: int = 10
    """Pieces of a run; after each the progress is shown and an interrupt is heard."""
    checkpoint_seconds: float = 20.0
    """Least time between two checkpoints of one variant."""
    dataset: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Summary of the data for the report."""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the run was asked for."""
    notes: tuple[str, ...] = ()
    """Sentences for the report."""


def slug(variant: Variant) -> str:
    """Folder name of a variant.

    Args:
      variant: the variant.

    Returns:
      Lower case letters, digits and dashes.
    """
    return "-".join("".join(c if c.isalnum() else " " for c in variant.name.lower()).split())


def default_adaptation(preset: Preset, variant: Variant, learning_rate: float | None) -> Adaptation:
    """How an algorithm adapts before anything is chosen: as it trained.

    Args:
      preset: hyper-parameters.
      variant: the variant.
      learning_rate: overrides the preset's.

    Returns:
      The client's own optimiser.
    """
    if variant.algorithm in ("maml", "fomaml"):
        return Adaptation("sgd", preset.inner_rate)
    rate = preset.learning_rate.get(variant.algorithm, 3e-3) if learning_rate is None else learning_rate
    return Adaptation("adam", rate)


class Comparison:
    """Runs a plan in a run directory; calling `run` again on the same directory goes on where it stopped.

    Args:
      setting: data, model, seeds.
      plan: what to do.
      places: the run directory.
      console: where progress is shown.
    """

    def __init__(self, setting: Setting, plan: Plan, places: files.RunDir, console: Console):
        """Remembers the parts; nothing runs yet."""
        self.setting, self.plan, self.places, self.console = setting, plan, places, console
        self.evaluator = Evaluator(setting)
        self.metric = metric_name(setting)

    def run(self) -> dict[str, Any]:
        """Trains and scores what is not done yet, then writes results, plots and reports.

        Returns:
          The results, see `experiments.report`.

        Raises:
          Interrupted: after Ctrl-C; the state is saved.
        """
        started = time.perf_counter()
        columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        columns += [TimeElapsedColumn(), TextColumn("{task.fields[told]}")]
        with (
            polite_interrupts() as pressed,
            Progress(*columns, console=self.console) as progress,
            self._compile_ahead(),
        ):
            width = max(len(v.name) for v in self.plan.variants)
            runs = []
            for variant in self.plan.variants:
                task = progress.add_task(variant.name.ljust(width), total=self.plan.rounds, told="")
                runs.append(self._variant(variant, progress, task, pressed))
        results = self._results(runs)
        results["seconds"] = round(time.perf_counter() - started, 1)
        files.write_json(self.places.results, results)
        page.write_reports(results, self.places.root)
        return results

    @contextmanager
    def _compile_ahead(self) -> Iterator[None]:
        """Compiles in a thread of its own, in the order of use, while what is compiled already runs."""
        plan, setting = self.plan, self.setting
        todo = [v for v in plan.variants if not self._file(v).exists()]
        self._trainers = {
            v.name: Trainer(setting, plan.preset, v, plan.learning_rate) for v in todo if v.algorithm != "scratch"
        }
        pool = ThreadPoolExecutor(max_workers=1)
        self._states = {
            name: pool.submit(self._prepare, trainer, first)
            for first, (name, trainer) in enumerate(self._trainers.items())
        }
        try:
            yield
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, trainer: Trainer, place: int) -> Any:
        state = trainer.init()
        trainer.compile(state, next(split_rounds(self.plan.rounds, self.plan.segments)))
        if place == 0:
            for optimiser in OPTIMISERS:
                adaptation, new, told = Adaptation(optimiser, 0.0), self.setting.new, chosen_steps(self.plan.steps)
                self.evaluator.compile(self.setting.validation, adaptation, CURVE_STEPS, (0, CURVE_STEPS))
                self.evaluator.compile(self.setting.validation, adaptation, self.plan.steps, told)
                self.evaluator.compile(new, adaptation, self.plan.steps)
        return state

    def _file(self, variant: Variant) -> Path:
        return self.places.root / "variants" / f"{slug(variant)}.json"

    def _variant(self, variant: Variant, progress: Progress, task: Any, pressed: list[int]) -> dict[str, Any]:
        done = self._file(variant)
        if done.exists():
            run = files.read_json(done)
            progress.update(task, completed=self.plan.rounds, told=self._told(run))
            return run
        started = time.perf_counter()
        params: Any = self.setting.params
        records: list[dict[str, Any]] = []
        if variant.algorithm != "scratch":
            params, records = self._train(variant, progress, task, pressed)
        progress.update(task, completed=self.plan.rounds, told="adapting")
        run = self._score(variant, params, records)
        run["seconds"] = round(time.perf_counter() - started, 1)
        files.write_json(done, run)
        progress.update(task, told=self._told(run))
        return run

    def _told(self, run: dict[str, Any]) -> str:
        scores = np.mean(run["scores"], axis=0)
        return f"{self.metric} {scores[0]:.3f} -> {scores[-1]:.3f}"

    def _train(self, variant: Variant, progress: Progress, task: Any, pressed: list[int]) -> tuple[Any, list[dict]]:
        plan, folder = self.plan, self.places.checkpoints / slug(variant)
        progress.update(task, told="compiling")
        trainer, state = self._trainers[variant.name], self._states[variant.name].result()
        rounds, state = checkpoints.restore(folder, state)
        files.rewind_jsonl(self.places.metrics, lambda r: r["variant"] != variant.name or r["round"] <= rounds)
        adaptation = default_adaptation(plan.preset, variant, plan.learning_rate)
        saved_at = time.perf_counter()
        bounds = np.cumsum([0, *split_rounds(plan.rounds, plan.segments)])
        progress.update(task, completed=rounds, told="")
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            if end <= rounds:
                continue
            state, segment = trainer.segment(state, int(end - max(start, rounds)))
            rounds = int(end)
            record = self._record(variant, rounds, segment, state, adaptation)
            files.append_jsonl(self.places.metrics, record)
            told = np.mean(record["after"])
            progress.update(
                task, completed=rounds, told=f"loss {np.mean(record['loss']):.3f}  {self.metric} {told:.3f}"
            )
            last = rounds == plan.rounds
            if pressed or last or time.perf_counter() - saved_at > plan.checkpoint_seconds:
                checkpoints.save(folder, rounds, state)
                saved_at = time.perf_counter()
            if pressed:
                raise Interrupted(f"stopped after {rounds} of {plan.rounds} rounds of {variant.name}")
        records = [r for r in files.read_jsonl(self.places.metrics) if r["variant"] == variant.name]
        return state.server.params, records

    def _record(
        self, variant: Variant, rounds: int, segment: Segment, state: Any, adaptation: Adaptation
    ) -> dict[str, Any]:
        """One line of the log: a segment boiled down, and the score of the validation clients."""
        curve = self.evaluator.curve(
            state.server.params, self.setting.validation, adaptation, CURVE_STEPS, (0, CURVE_STEPS)
        )
        record = {
            "variant": variant.name,
            "round": rounds,
            "rounds": len(segment.loss),
            "loss": segment.loss.mean(axis=0).tolist(),
            "before": curve.pooled[self.metric][:, 0].tolist(),
            "after": curve.pooled[self.metric][:, -1].tolist(),
            "uploaded": segment.uploaded_bytes.sum(axis=0).tolist(),
            "full": segment.full_bytes.sum(axis=0).tolist(),
            "attackers": int(segment.attackers.sum()),
            "seats": segment.cohort * segment.loss.size,
        }
        if segment.upload_rate is not None:
            record["upload_rate"] = segment.upload_rate.mean(axis=1).tolist()
        if segment.caught is not None and segment.wronged is not None:
            record |= {"caught": int(segment.caught.sum()), "wronged": int(segment.wronged.sum())}
        return record

    def _score(self, variant: Variant, params: Any, records: list[dict[str, Any]]) -> dict[str, Any]:
        """Chooses how to adapt on the validation clients and scores the new ones."""
        plan = self.plan
        own = default_adaptation(plan.preset, variant, plan.learning_rate)
        chosen, _ = self.evaluator.choose(params, plan.steps, (own,))
        curve = self.evaluator.curve(params, self.setting.new, chosen, plan.steps)
        last = {name: values[:, -1] for name, values in curve.pooled.items()}
        worst = np.mean([float(metrics.fairness(clients[:, -1]).worst_decile) for clients in curve.per_client])
        shown = ("mcc", "f1") if self.setting.task == "classification" else ("mse", "mae")
        details = {name.upper(): f"{last[name].mean():.3f}" for name in shown}
        run: dict[str, Any] = {
            "name": variant.name,
            "scores": curve.pooled[self.metric][:, told_steps(plan.steps)].tolist(),
            "curve": curve.pooled[self.metric].tolist(),
            "last": {name: values.tolist() for name, values in last.items()},
            "clients": curve.per_client[:, :, [0, -1]].tolist(),
            "adaptation": str(chosen),
            "details": details | {"worst 10 %": f"{worst:.3f}", "adapts by": str(chosen)},
            "uploaded_bytes": None,
            "downloaded_bytes": None,
            "saved_bytes": None,
            "poisoned_caught": None,
            "honest_dropped": None,
        }
        if records:
            uploaded, full = (np.sum([r[key] for r in records], axis=0) for key in ("uploaded", "full"))
            run["uploaded_bytes"] = int(round(float(uploaded.mean())))
            run["downloaded_bytes"] = int(round(float(full.mean())))
            run["saved_bytes"] = int(round(float((full - uploaded).mean()))) if variant.filters else None
        if records and "caught" in records[0]:
            attackers, seats = (sum(r[key] for r in records) for key in ("attackers", "seats"))
            run["poisoned_caught"] = [sum(r["caught"] for r in records), attackers] if attackers else None
            run["honest_dropped"] = [sum(r["wronged"] for r in records), seats - attackers]
        return run

    def _results(self, runs: list[dict[str, Any]]) -> dict[str, Any]:
        plan = self.plan
        results = {
            "title": plan.title,
            "metric": self.metric,
            "steps": told_steps(plan.steps),
            "runs": runs,
            "dataset": plan.dataset,
            "config": plan.config,
            "notes": [*plan.notes, self._constant()],
            "plots": {},
        }
        results["plots"] = self._plots(runs)
        return results

    def _constant(self) -> str:
        """What a constant prediction would score on the query rows of the new clients."""
        scores = []
        for seed in range(self.setting.num_seeds):
            offsets, support = (np.asarray(x[seed]) for x in (self.setting.new.offsets, self.setting.new.num_support))
            labels = np.asarray(self.setting.new.examples["y"][seed])
            query = np.concatenate(
                [labels[a + s : b] for a, b, s in zip(offsets[:-1], offsets[1:], support, strict=True)]
            )
            if self.setting.task == "regression":
                return "A constant prediction scores an R2 of 0."
            scores.append(np.bincount(query).max() / len(query))
        return f"The best constant prediction for the new clients scores {np.mean(scores):.3f}."

    def _plots(self, runs: list[dict[str, Any]]) -> dict[str, str]:
        names = [run["name"] for run in runs]
        log = files.read_jsonl(self.places.metrics)
        records = {name: [r for r in log if r["variant"] == name] for name in names}
        trained = {name: rows for name, rows in records.items() if rows}
        shared = {"metric": self.metric, "order": names}
        adaptation = {run["name"]: np.asarray(run["curve"]) for run in runs}
        learning = {name: np.array([r["after"] for r in rows]).T for name, rows in trained.items()}
        rounds = {name: [r["round"] for r in rows] for name, rows in trained.items()}
        sent = {
            name: (np.cumsum([r["uploaded"] for r in rows], axis=0).T, learning[name]) for name, rows in trained.items()
        }
        filtered = next((name for name in reversed(names) if records[name] and "upload_rate" in records[name][0]), None)
        drawn: dict[str, str] = {}

        def draw(caption: str, name: str, function: Any, *args: Any, **kwargs: Any) -> None:
            function(self.places.plots / name, *args, **kwargs)
            drawn[caption] = f"plots/{name}"

        steps = np.arange(self.plan.steps + 1)
        after = f"validation {self.metric} after {CURVE_STEPS} steps"
        if trained:
            draw("Learning curves", "learning.png", plots.plot_learning, rounds, learning, metric=after, order=names)
        draw("New clients as they adapt", "adaptation.png", plots.plot_adaptation, steps, adaptation, **shared)
        spread = {run["name"]: tuple(np.asarray(run["clients"])[..., k].ravel() for k in (0, 1)) for run in runs}
        draw("Each new client before and after", "clients.png", plots.plot_spread, spread, **shared)
        if sent:
            draw("Bytes against score", "bytes.png", plots.plot_bytes, sent, metric=after, order=names)
        if filtered is not None:
            rows = records[filtered]
            rate = np.concatenate([r["upload_rate"] for r in rows]).T
            uploads = (np.arange(1, rate.shape[1] + 1), judged_layers(self.setting), rate)
            draw(f"Layers uploaded by {filtered}", "uploads.png", plots.plot_uploads, *uploads)
            draw(
                "Overview",
                "overview.png",
                plots.overview,
                learning=(rounds, learning),
                adaptation=(steps, adaptation),
                uploads=uploads,
                sent=sent,
                title=self.plan.title,
                **shared,
            )
        return drawn


def told_steps(num_steps: int) -> list[int]:
    """Adaptation steps at which tables tell a score.

    Args:
      num_steps: the last one.

    Returns:
      0, 1, 5 and the last, as far as they are there.
    """
    return sorted({step for step in (0, 1, 5, num_steps) if step <= num_steps})


def latest_run(parent: Path) -> Path | None:
    """The run directory that was changed last.

    Args:
      parent: folder of runs.

    Returns:
      Its path, or None.
    """
    runs = [path for path in parent.glob("*/config.json")]
    return max(runs, key=lambda path: path.stat().st_mtime).parent if runs else None
