"""The comparison of exchanged logits with exchanged parameters, in small."""

import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import datasets
from experiments.fedcache import command, contenders, problem, summary

pytestmark = pytest.mark.standard_promotion


def load(seed):
    return datasets.load("digits", alpha=0.5, seed=seed)


@pytest.fixture(scope="module")
def small():
    return problem.make_problem(load, 2, "heterogeneous", num_related=3, embedding_dim=8)


def config(*algorithms, **options):
    given = dict(dataset="digits", alpha=0.5, seeds=1, rounds=2, points=1, num_related=3, embedding_dim=8)
    return command.Config(**{**given, **options}, algorithms=algorithms)


def test_every_row_trains_or_tests():
    federation = load(1)
    train, test = problem.split_rows(federation, 1)
    assert train.num_clients == test.num_clients == federation.num_clients
    both = np.concatenate([train.examples["x"], test.examples["x"]])
    np.testing.assert_array_equal(np.sort(both, axis=0), np.sort(federation.x, axis=0))
    np.testing.assert_array_equal(train.examples["index"], np.arange(train.num_examples))
    share = np.asarray(test.counts) / np.asarray(train.counts + test.counts)
    assert share.min() > 0.15 and share.max() < 0.35


@pytest.mark.slow
def test_relations_stay_within_a_class_and_a_seed(small):
    labels = np.asarray(small.train.examples["y"])
    owned = np.asarray(small.train.offsets)[:, -1]
    for seed in range(2):
        index, mask = np.asarray(small.relations.index)[seed], np.asarray(small.relations.mask)[seed]
        rows, places = np.nonzero(mask)
        assert rows.max() < owned[seed] and index[rows, places].max() < owned[seed]
        np.testing.assert_array_equal(labels[seed][index[rows, places]], labels[seed][rows])
        assert (index[rows, places] != rows).all() and mask[: owned[seed]].any(axis=1).all()


def test_a_fleet_shares_its_clients_out(small):
    members = [small.members(name) for name in small.fleet]
    np.testing.assert_array_equal(np.sort(np.concatenate(members)), np.arange(small.num_clients))
    assert len({small.num_bytes(name) for name in small.fleet}) == 3


def test_accuracy_does_not_count_padding():
    data = problem.ClientData(
        {"x": np.eye(4, 2, dtype=np.float32), "y": np.array([0, 0, 0, 0])}, np.int32(2), np.int32(0)
    )
    assert float(problem.accuracy(lambda params, x: x, None, data)) == 0.5


@pytest.mark.parametrize(("shape", "names"), [((5,), 3), ((20, 3), 3), ((28, 28, 1), 3)])
def test_there_are_three_architectures_for_every_input(shape, names):
    models = problem.architectures(shape, 4)
    assert len(models) == names
    for model in models.values():
        logits = jax.eval_shape(lambda m=model: m.apply(m.init(jax.random.key(0)), np.zeros((2, *shape), np.float32)))
        assert logits.shape == (2, 4)


@pytest.mark.slow
def test_a_run_is_told_and_resumed(tmp_path, monkeypatch):
    console = Console(file=io.StringIO(), width=200)
    results = command.run(config("fedcache", "fd", "fedavg", out=tmp_path / "run"), console)
    printed = console.file.getvalue()
    assert all(contenders.CONTENDERS[name].label in printed for name in ("fedcache", "fd", "fedavg"))
    assert json.loads((tmp_path / "run/results.json").read_text()) == results
    for name in ("report.md", "plots/learning.png", "plots/bytes.png"):
        assert (tmp_path / "run" / name).stat().st_size > 300
    by_key = {record["key"]: record for record in results["runs"]}
    rows = int(problem.split_rows(load(0), 0)[0].num_examples)
    cached = by_key["fedcache"]["bytes"]
    assert cached == {"once": [rows * 8 * 4], "up": [rows * 40], "down": [rows * 40], "down_raw": [3 * rows * 40]}
    size = 4 * (64 * 256 + 256 + 256 * 128 + 128 + 128 * 10 + 10)
    assert by_key["fedavg"]["bytes"]["up"] == by_key["fedavg"]["bytes"]["down"] == [60 * size]
    ratio = 2 * 2 * 60 * size / (rows * 8 * 4 + 2 * 2 * rows * 40)
    told = {row[0]: row for row in summary.rows(results)}
    assert told["FedCache"][-1] == f"{ratio:.1f}" and told["FedAvg"][-1] == "1.0"
    assert all(0 < np.mean(record["curve"]) < 1 for record in results["runs"])

    def refuse(*args):
        raise AssertionError("what is done is not done again")

    with monkeypatch.context() as patch:
        patch.setattr(command, "contend", refuse)
        again = command.run(config("fd", out=tmp_path / "run"), console)
        assert again["runs"] == [by_key["fd"]]
    with pytest.raises(Exception, match="rounds"):
        command.run(config("fd", rounds=3, out=tmp_path / "run"), console)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"points": 3, "rounds": 10}, "points must divide rounds, got 3 and 10"),
        ({"algorithms": ("fedcash",)}, "Did you mean 'fedcache'"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        command.Config(**options).check()


def test_tasks_without_common_classes_are_refused():
    with pytest.raises(ValueError, match="dataset must have classes that all clients share, got digits"):
        problem.make_problem(
            lambda seed: datasets.load("digits", seed=seed), 1, "homogeneous", num_related=2, embedding_dim=4
        )
