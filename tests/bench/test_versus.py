"""Peers take their turns beside us, and what they find is compared; no peer is lost."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import bench
from bench import __main__ as program
from bench import floor, versus
from bench.measure import Case, PeerTask, Workload
from bench.workloads import cedar


class Unavailable(Exception):
    """Stands in for `bench.peers.PeerUnavailable`."""


class Running:
    """A peer that multiplies by two, or by something else."""

    versions = {"twice": "1.0"}
    compile_seconds = 0.5

    def __init__(self, task, factor=2.0, fails_at=None):
        self.task, self.factor, self.fails_at = task, factor, fails_at
        self.calls, self.closed = 0, False

    def run(self):
        self.calls += 1
        if self.calls == self.fails_at:
            raise Unavailable("killed")
        return 4.0

    def result(self):
        return {"w": np.asarray(self.task.params["w"]) * self.factor}

    def peak_bytes(self):
        return 2**20

    def close(self):
        self.closed = True

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


class Task:
    """Stands in for `bench.peers.Task`."""

    kind, model = "fedavg", "mlp"
    params = {"w": np.arange(4, dtype=np.float32)}


class Peers:
    """Stands in for the module `bench.peers`."""

    PeerUnavailable = Unavailable

    def __init__(self, makers):
        self.PEERS = (*makers, "elsewhere")
        self.makers, self.running = makers, {}

    def supports(self, name, kind, model):
        return name != "elsewhere" and (kind, model) == ("fedavg", "mlp")

    def start(self, name, task, tell=lambda text: None):
        tell(f"installing {name}")
        self.running[name] = self.makers[name](task)
        return self.running[name]


def refuse(task):
    raise Unavailable("no wheel for this Python")


@pytest.fixture
def peers(monkeypatch):
    """Sets the peers."""

    def use(**makers):
        found = Peers(makers)
        monkeypatch.setattr(bench, "peers", found, raising=False)
        return found

    return use


def cases(num_clients, dtype):
    x = jnp.arange(4, dtype=dtype)
    return [
        Case(name, "round", lambda x: {"w": 2 * x}, (x,), num_clients, floor.Work(1.0, 1.0), count)
        for name, count in (("loop", 1), ("vmap", 1), ("mesh of 2, loop", 2))
    ]


WORKLOAD = Workload(
    "doubling",
    "client",
    (3,),
    cases,
    peers=PeerTask(lambda count: Task(), lambda count, output: jax.device_get(output)),
)


def test_everybody_has_a_turn_and_is_compared(peers):
    found = peers(right=Running, wrong=lambda task: Running(task, factor=2.1), absent=refuse)
    told = []
    result = versus.compare(WORKLOAD, 3, ["loop", "mesh of 2, loop"], repeats=5, tell=told.append)
    assert [measurement.layout for measurement in result.ours] == ["loop", "mesh of 2, loop"]
    right, wrong, absent = result.peers
    assert [peer.peer for peer in result.peers] == ["right", "wrong", "absent"]
    assert right.seconds == [4.0] * 5 and right.units == 3 and right.ms == pytest.approx(4000 / 3)
    assert (right.versions, right.compile_seconds, right.peak_bytes) == ({"twice": "1.0"}, 0.5, 2**20)
    assert right.difference == 0.0 and right.agrees
    assert wrong.difference == pytest.approx(0.1, rel=1e-6) and not wrong.agrees
    assert absent.unavailable == "no wheel for this Python" and absent.seconds == [] and absent.agrees
    assert result.ratio(right) == pytest.approx(right.ms / min(ours.ms for ours in result.ours))
    assert found.running["right"].calls == 12 and found.running["right"].closed
    assert "starting right" in told and "installing right" in told and told[-1] == "turn 5 of 5"


def test_a_peer_that_fails_leaves_the_others_going(peers):
    peers(brittle=lambda task: Running(task, fails_at=4), right=Running)
    brittle, right = versus.compare(WORKLOAD, 3, ["loop"], repeats=5).peers
    assert brittle.unavailable == "killed" and brittle.seconds == [] and brittle.difference is None
    assert len(right.seconds) == 5 and right.difference == 0.0


def test_peers_are_closed_when_the_run_breaks_off(peers):
    found = peers(right=Running, broken=lambda task: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        versus.compare(WORKLOAD, 3, ["loop"], repeats=5)
    assert found.running["right"].closed


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        ({"a": np.float32([1.0, 2.0]), "b": np.float32([3.0])}, 0.0),
        ({"a": np.float32([1.0, 2.5]), "b": np.float32([3.0])}, 0.25),  # of the largest change, 3 - 1
        ({"a": np.float32([1.0, np.nan]), "b": np.float32([3.0])}, np.inf),
        ({"a": np.float32([1.0, 2.0])}, np.inf),
        ({"a": np.float32([1.0, 2.0]), "b": np.float32([[3.0]])}, np.inf),
    ],
)
def test_a_difference_is_relative_to_the_largest_change(theirs, expected):
    ours = {"a": np.float32([1.0, 2.0]), "b": np.float32([3.0])}
    start = {"a": np.float32([0.5, 1.0]), "b": np.float32([1.0])}
    assert versus.difference(ours, theirs, start) == expected


def test_two_results_without_a_change_agree_if_they_are_equal():
    zero = {"a": np.zeros(2, np.float32)}
    assert versus.difference(zero, zero, zero) == 0.0
    assert versus.difference(zero, {"a": np.float32([0.0, 1e-9])}, zero) > versus.TOLERANCE


@pytest.mark.parametrize(("factor", "status"), [(2.0, 0), (2.1, 1)])
def test_a_different_result_is_told_by_the_exit_status(peers, monkeypatch, tmp_path, factor, status):
    peers(right=lambda task: Running(task, factor=factor), absent=refuse)
    monkeypatch.setattr(cedar, "WORKLOAD", WORKLOAD)
    monkeypatch.setattr(program, "measure_ceilings", lambda dtype: floor.Ceilings(1e9, 1e9))
    path, out = tmp_path / "numbers.json", io.StringIO()
    options = program.Options(workload="cedar", repeats=5, json=path, peers=True)
    monkeypatch.setattr(program.tyro, "cli", lambda *args, **kwargs: options)
    monkeypatch.setattr(program, "Console", lambda **kwargs: Console(file=out, width=120))
    monkeypatch.setattr(program.jax.config, "update", lambda *args: None)
    assert program.main() == status
    text = out.getvalue()
    assert "absent: no wheel for this Python" in text and "twice 1.0" in text
    assert ("not the same" in text) == bool(status)
    (record,) = json.loads(path.read_text())["results"]
    right, absent = record["versus"]["peers"]
    assert right["agrees"] is (status == 0) and right["ratio"] > 0 and len(right["seconds"]) == 5
    assert absent["ms"] is None and absent["ratio"] is None and absent["unavailable"]
    assert {ours["num_devices"] for ours in record["versus"]["ours"]} == {1, 2}
