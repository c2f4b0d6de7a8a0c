"""Many things, each beside its own peers: everybody has a turn, and the table says who was faster and who agrees."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import bench
from bench import __main__ as program
from bench import duels, floor, machine
from bench.measure import Case, Duel, Workload
from bench.workloads import cedar

X = np.arange(4, dtype=np.float32)


class Unavailable(Exception):
    """Stands in for `bench.peers.PeerUnavailable`."""


class Running:
    """A peer that takes one second and returns what its task says; of another, it cannot be started."""

    versions, compile_seconds = {"twice": "1.0"}, 0.5

    def __init__(self, task):
        self.task = task

    def run(self):
        return 1.0

    def result(self):
        return {"w": self.task}

    def peak_bytes(self):
        return 2**20

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class Peers:
    """Stands in for the module `bench.peers`."""

    PeerUnavailable = Unavailable

    def start(self, name, task, tell):
        if task is None:
            raise Unavailable("no wheel for this Python")
        assert name == "twice"
        return Running(task)


@pytest.fixture(autouse=True)
def peers(monkeypatch):
    monkeypatch.setattr(bench, "peers", Peers(), raising=False)


def duel(name, *tasks, is_compared=True):
    cases = [
        Case(layout, name, lambda x: (2 * x,), (jnp.asarray(X),), 1, floor.Work(1.0, 1.0), count)
        for layout, count in (("one device", 1), ("mesh of 2", 2))
    ]
    named = {f"twice {index}": ("twice", lambda task=task: task) for index, task in enumerate(tasks)}
    return Duel(name, 3, 4, cases, named, lambda output: {"w": np.asarray(output[0])}, is_compared)


def workload(*found):
    return Workload("rules", "call", (3,), lambda count, dtype: [], duels=lambda count, dtype: found)


def test_everybody_has_a_turn_and_is_compared():
    told = []
    rules = workload(
        duel("right", 2 * X, 2 * X), duel("wrong", 2.1 * X), duel("random", 3 * X, is_compared=False), duel("alone")
    )
    right, wrong, random, alone = duels.fight(rules, 3, repeats=5, tell=told.append)
    assert [m.layout for m in right.versus.ours] == ["one device", "mesh of 2"]
    assert [p.peer for p in right.versus.peers] == ["twice 0", "twice 1"] and right.versus.peers[0].ms == 1000.0
    assert right.agrees and right.versus.peers[0].difference == 0.0
    assert right.ratio == pytest.approx(1000.0 / min(m.ms for m in right.versus.ours))
    assert not wrong.agrees and wrong.versus.peers[0].difference == pytest.approx(0.1 / 2.1, rel=1e-5)
    assert random.agrees and random.versus.peers[0].difference is None and random.ratio > 0
    assert alone.ratio is None and len(alone.versus.ours[0].seconds) == 5
    assert "right: starting twice 1" in told and "compiling alone" in told


def test_the_geometric_mean_leaves_out_what_nobody_else_does():
    found = duels.fight(workload(duel("a", 2 * X), duel("b", 2 * X), duel("c"), duel("d", None)), 3, repeats=5)
    assert found[3].ratio is None and found[3].versus.peers[0].unavailable == "no wheel for this Python"
    assert duels.geometric_mean(found) == pytest.approx((found[0].ratio * found[1].ratio) ** 0.5)
    assert duels.geometric_mean(found[2:]) is None


def test_what_does_not_fit_into_memory_is_a_row(monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda: 0)
    (found,) = duels.fight(workload(duel("large", 2 * X)), 3, repeats=5)
    assert found.ratio is None and found.versus.ours[0].skipped and found.versus.peers[0].difference is None


def run(monkeypatch, *found, **options):
    out = io.StringIO()
    monkeypatch.setattr(cedar, "WORKLOAD", workload(*found))
    monkeypatch.setattr(program, "measure_ceilings", lambda dtype: floor.Ceilings(1e9, 1e9))
    options = program.Options(workload="cedar", repeats=5, peers=True, **options)
    monkeypatch.setattr(program.tyro, "cli", lambda *args, **kwargs: options)
    monkeypatch.setattr(program, "Console", lambda **kwargs: Console(file=out, width=120))
    monkeypatch.setattr(program.jax.config, "update", lambda *args: None)
    return program.main(), out.getvalue()


def test_the_table_and_the_file(monkeypatch, tmp_path):
    path = tmp_path / "numbers.json"
    found = [duel("right", 2 * X, 2 * X), duel("random", X, is_compared=False), duel("alone"), duel("absent", None)]
    status, text = run(monkeypatch, *found, json=path)
    assert status == 0
    assert "temp/args" in text and "not compared" in text and "1000.00" in text
    assert "absent in twice 0: no wheel for this Python" in text
    assert "times as fast as the faster of twice 0 and twice 1, geometric mean over 2 of 4" in text
    (record,) = json.loads(path.read_text())["results"]
    right, _, alone, absent = record["duels"]
    assert record["geometric_mean"] > 0 and right["ratio"] > 0 and alone["ratio"] is None
    assert [peer["peer"] for peer in right["peers"]] == ["twice 0", "twice 1"]
    assert {"temp_share", "seconds"} <= right["ours"][0].keys() and right["ms"] > 0
    assert absent["peers"][0]["ms"] is None
    assert len(record["layouts"]) == 8


def test_a_different_result_is_told_by_the_exit_status(monkeypatch):
    status, text = run(monkeypatch, duel("wrong", 2.1 * X))
    assert status == 1 and "5e-02, not the same" in text
