"""Servers that wait beside servers that do not, in small."""

import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import datasets
from experiments.asynchrony import command, contenders, problem, summary

pytestmark = pytest.mark.standard_promotion


def config(*algorithms, **options):
    given = dict(seeds=1, jobs=16, points=2, active=4, hidden=(8,))
    return command.Config(**{**given, **options}, algorithms=algorithms or None)


@pytest.fixture(scope="module")
def small():
    return problem.make_problem(
        lambda seed: datasets.load("digits", alpha=0.5, seed=seed),
        1,
        (8,),
        heterogeneity=1.0,
        spread=0.0,
        num_active=4,
        num_parts=2,
        jobs_a_part=8,
        batch_size=10,
        rate=0.1,
    )


def test_a_round_lasts_as_long_as_its_slowest(small):
    fleet = jax.tree.map(lambda x: x[0], small.fleets)
    told = contenders.CONTENDERS["sync"].run(small, fleet)
    seconds, clock = np.asarray(fleet.mean_seconds), 0.0
    for number in range(4):
        key = jax.random.split(jax.random.fold_in(fleet.key, number), 3)[0]
        cohort = problem.cj.core.sample_cohort(key, fleet.train, 4)
        clock += seconds[np.asarray(cohort.client_id)].max()
        if number % 2:
            np.testing.assert_allclose(told.time[number // 2], clock, rtol=1e-5)
    assert told.staleness.tolist()[:2] == [16, 0] and told.messages.tolist() == [32, 0]


def test_patience_is_time(small):
    fleet = jax.tree.map(lambda x: x[0], small.fleets)
    waits, goes_on = (contenders.CONTENDERS[name].run(small, fleet) for name in ("sync", "deadline"))
    assert (np.asarray(goes_on.time) < np.asarray(waits.time)).all()


def test_edges_meet_in_the_cloud(small):
    fleet = jax.tree.map(lambda x: x[0], small.fleets)
    told = contenders.CONTENDERS["hierarchical"].run(small, fleet)
    sync = contenders.CONTENDERS["sync"].run(small, fleet)
    assert (np.asarray(told.time) <= np.asarray(sync.time) + 1e-4).all()
    assert told.messages.tolist() == [32, 2 * 2 * contenders.NUM_EDGES]


@pytest.mark.slow
def test_a_run_is_told_and_resumed(tmp_path, monkeypatch):
    console = Console(file=io.StringIO(), width=200)
    results = command.run(config("sync", "fedasync", "fedbuff", out=tmp_path / "run", target=0.05), console)
    printed = console.file.getvalue()
    assert all(contenders.CONTENDERS[name].label in printed for name in ("sync", "fedasync", "fedbuff"))
    assert json.loads((tmp_path / "run/results.json").read_text()) == results
    for name in ("report.md", "plots/clock.png"):
        assert (tmp_path / "run" / name).stat().st_size > 300
    by_key = {record["key"]: record for record in results["runs"]}
    assert all(np.sum(record["staleness"]) == 16 for record in results["runs"])
    assert summary.mean_staleness(by_key["sync"]) == 0 < summary.mean_staleness(by_key["fedasync"])
    size = 4 * (64 * 8 + 8 + 8 * 10 + 10)
    assert by_key["fedasync"]["device_bytes"] == [32 * size] and by_key["fedasync"]["cloud_bytes"] == [0]

    def refuse(*args):
        raise AssertionError("what is done is not done again")

    monkeypatch.setattr(command, "contend", refuse)
    again = command.run(config("fedbuff", out=tmp_path / "run"), console)
    assert again["runs"] == [by_key["fedbuff"]]
    with pytest.raises(Exception, match="jobs"):
        command.run(config("fedbuff", jobs=32, out=tmp_path / "run"), console)


def test_time_to_target():
    record = {"time": [[1.0, 2.0, 3.0], [1.0, 4.0, 9.0]], "accuracy": [[0.2, 0.6, 0.5], [0.1, 0.2, 0.3]]}
    assert summary.time_to_target(record, 0.5).tolist() == [2.0, np.inf]
    held = summary.held(record, np.array([0.5, 1.0, 2.5, 3.5]))
    np.testing.assert_array_equal(held, [[np.nan, 0.2, 0.6, np.nan], [np.nan, 0.1, 0.1, 0.1]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jobs": 15}, r"jobs must be divisible by active \* points = 8, got 15"),
        ({"spread": -1.0}, "spread must be at least 0, got -1.0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"target": 1.5}, "target must be above 0 and below 1, got 1.5"),
        ({"active": 0}, "active must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options).check()


def test_more_at_once_than_there_are_is_refused(tmp_path):
    with pytest.raises(ValueError, match="active must be at most 40"):
        command.run(config(active=50, jobs=100, out=tmp_path / "run"), Console(file=io.StringIO()))
