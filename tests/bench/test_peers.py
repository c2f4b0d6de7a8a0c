"""Peers: the conversation with their processes, and that they compute what they are asked for."""

import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from bench import peers
from bench.peers import process, task, threads

PYTHON = Path(sys.executable)
SHAPES = {
    "mlp": {"w1": (784, 128), "b1": (128,), "w2": (128, 10), "b2": (10,)},
    "cnn": {"k1": (3, 3, 1, 16), "c1": (16,), "k2": (3, 3, 16, 32), "c2": (32,), "w": (1568, 10), "b": (10,)},
    "femnist": {
        **{"k1": (5, 5, 1, 32), "c1": (32,), "k2": (5, 5, 32, 64), "c2": (64,)},
        **{"w1": (3136, 512), "b1": (512,), "w2": (512, 62), "b2": (62,)},
    },
}
FAKE = """
import os, sys, time
from bench.peers.task import Program

PACKAGES = ("numpy",)

def prepare(task):
    print("chatter")
    calls = []
    def run():
        calls.append(1)
        {call}
        return {{name: value + len(calls) for name, value in task.params.items()}}
    refreshed = []
    def refresh():
        refreshed.append(1)
        assert len(refreshed) == len(calls) + 1
    return Program(run, lambda result: result, {{"threads": str(task.num_clients)}}, refresh)
"""


def make_task(kind: str, model: str, num_clients: int = 3, num_steps: int = 2, batch_size: int = 4) -> peers.Task:
    rng = np.random.default_rng(0)
    params = {}
    for name, shape in SHAPES[model].items():
        scale = 0.1 if len(shape) == 1 else np.prod(shape[:-1]) ** -0.5
        params[name] = (scale * rng.normal(size=shape)).astype(np.float32)
    rows = (num_clients, num_steps, batch_size)
    x = rng.uniform(size=(*rows, *((784,) if model == "mlp" else (28, 28, 1)))).astype(np.float32)
    return peers.Task(kind, model, params, x, rng.integers(0, 10, size=rows).astype(np.int32), 0.05)


def launch(folder: Path, call: str = "pass", **options: float) -> peers.Running:
    """Starts a peer that does nothing but `call`, which knows how often it was called."""
    (folder / "fake.py").write_text(FAKE.format(call=call), encoding="utf-8")
    return peers.Running("fake", PYTHON, "fake", make_task("fedavg", "mlp"), path=[folder], **options)


def test_task_round_trip(tmp_path):
    sent = make_task("maml", "cnn")
    task.save(sent, tmp_path)
    got = task.load(tmp_path)
    assert (got.kind, got.model, got.learning_rate) == ("maml", "cnn", 0.05)
    assert list(got.params) == list(sent.params)
    for a, b in zip([got.x, got.y, *got.params.values()], [sent.x, sent.y, *sent.params.values()], strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_rule_round_trip(tmp_path):
    updates = np.arange(6, dtype=np.float32).reshape(2, 3)
    sent = peers.RuleTask((("NNM", {"f": 1}), ("CenteredClipping", {"L": 1, "tau": 2.0})), "torch", updates)
    task.save(sent, tmp_path)
    got = task.load(tmp_path)
    assert isinstance(got, peers.RuleTask) and (got.kind, got.model) == ("rule", "matrix")
    assert got.steps == sent.steps and got.library == "torch"
    assert [type(value) for value in got.steps[1][1].values()] == [int, float]
    np.testing.assert_array_equal(got.updates, updates)


def test_first_clients():
    whole = make_task("fedavg", "mlp")
    part = whole.first(2)
    assert part.num_clients == 2
    np.testing.assert_array_equal(part.x, whole.x[:2])
    np.testing.assert_array_equal(part.y, whole.y[:2])


def test_conversation(tmp_path):
    with launch(tmp_path, "time.sleep(0.02)") as running:
        folder = running._folder
        assert running.name == "fake"
        assert running.versions == {"numpy": np.__version__, "threads": "3"}
        assert running.compile_seconds >= 0.02
        assert running.run() >= 0.02
        assert running.run() >= 0.02
        result = running.result()
        peak = running.peak_bytes()
    sent = make_task("fedavg", "mlp").params
    assert list(result) == list(sent)
    for name, value in sent.items():  # the first call warms up, two are timed
        np.testing.assert_array_equal(result[name], value + 3)
    assert peak is None or 2**20 < peak < 2**32
    assert not folder.exists()


def test_closed_peer_says_so(tmp_path):
    running = launch(tmp_path)
    running.close()
    running.close()
    with pytest.raises(peers.PeerUnavailable, match="fake is closed"):
        running.run()


def test_peer_that_cannot_be_imported(tmp_path):
    with pytest.raises(peers.PeerUnavailable, match=r"missing ended \(exit status 1\).*No module named 'missing'"):
        peers.Running("missing", PYTHON, "missing", make_task("fedavg", "mlp"))


def test_peer_that_raises_in_its_first_call(tmp_path):
    with pytest.raises(peers.PeerUnavailable, match="ValueError: no such luck"):
        launch(tmp_path, "raise ValueError('no such luck')")


def test_peer_that_dies_later(tmp_path):
    with launch(tmp_path, "len(calls) > 1 and os._exit(7)") as running:
        with pytest.raises(peers.PeerUnavailable, match=r"exit status 7\): chatter"):
            running.run()
        with pytest.raises(peers.PeerUnavailable, match="exit status 7"):
            running.result()


@pytest.mark.skipif(os.name == "nt", reason="no signals")
def test_peer_that_is_killed(tmp_path):
    with launch(tmp_path, "len(calls) > 1 and os.kill(os.getpid(), 9)") as running:
        with pytest.raises(peers.PeerUnavailable, match="killed by signal 9"):
            running.run()


def test_peer_that_takes_too_long(tmp_path):
    with launch(tmp_path, "len(calls) > 1 and time.sleep(60)", answer_seconds=0.2) as running:
        with pytest.raises(peers.PeerUnavailable, match="did not answer within 0.2 seconds"):
            running.run()


def test_python_that_is_not_there(tmp_path):
    with pytest.raises(peers.PeerUnavailable, match="fake cannot be started"):
        process.Running("fake", tmp_path / "python", "fake", make_task("fedavg", "mlp"))


def test_every_peer_has_its_two_files():
    folder = Path(peers.__file__).parent
    assert {path.name.split(".")[0] for path in folder.glob("*.txt")} == set(peers.PEERS)
    assert all((folder / f"{name}.txt").exists() for name in peers.PEERS)
    assert set(peers.PEERS) <= {path.stem for path in folder.glob("*.py")}
    tasks = (("fedavg", "mlp"), ("maml", "mlp"), ("rule", "matrix"))
    assert all(any(peers.supports(name, *task) for task in tasks) for name in peers.PEERS)


def test_what_a_peer_does_not_do():
    assert not peers.supports("fedjax", "maml", "mlp")
    assert not peers.supports("torch_loop", "fedavg", "transformer")
    assert not peers.supports("byzfl", "fedavg", "mlp") and not peers.supports("fedjax", "rule", "matrix")
    with pytest.raises(ValueError, match="name must be one of fedjax, .*, got 'nobody'"):
        peers.supports("nobody", "fedavg", "mlp")
    with pytest.raises(peers.PeerUnavailable, match="torchopt does not do fedavg on mlp"):
        peers.start("torchopt", make_task("fedavg", "mlp"), tell=lambda text: None)


def test_the_faster_number_of_threads_is_taken(monkeypatch):
    """On a clock that only the program moves."""
    clock, chosen, refreshed = [0.0], [], []
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock[0])

    def program(seconds):
        def run():
            clock[0] += seconds[chosen[-1]]

        return task.Program(run, lambda result: {}, {}, lambda: refreshed.append(1))

    assert threads.choose_threads(program({1: 0.5, 3: 0.4}), chosen.append) == 3 == chosen[-1]
    assert len(refreshed) == 2 * 2 * threads.NUM_TRIALS
    refreshed.clear()
    assert threads.choose_threads(program({1: 4.0, 3: 5.0}), chosen.append) == 1 == chosen[-1]
    assert len(refreshed) == 2  # one call of each says enough


def logits(params, x):
    """The three models, from their description."""
    for kernel, bias in (("k1", "c1"), ("k2", "c2")):
        if kernel in params:
            numbers = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, params[kernel], (1, 1), "SAME", dimension_numbers=numbers)
            x = jax.nn.relu(x + params[bias][None, None, None])
            x = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, x.shape[3]).max((2, 4))
    x = x.reshape(len(x), -1)
    if "w" in params:
        return x @ params["w"] + params["b"][None]
    return jax.nn.relu(x @ params["w1"] + params["b1"][None]) @ params["w2"] + params["b2"][None]


@jax.jit
def loss(params, x, y):
    scores = jax.nn.log_softmax(logits(params, x))
    return -(scores * jax.nn.one_hot(y, scores.shape[1])).sum(1).mean()


def expected(work: peers.Task) -> dict[str, np.ndarray]:
    """What the task comes to, client after client, in double precision."""
    start = {name: value.astype(np.float64) for name, value in work.params.items()}

    def step(params, x, y):
        slope = jax.grad(loss)(params, x, y)
        return {name: params[name] - work.learning_rate * slope[name] for name in params}

    def one(x, y):
        if work.kind == "maml":
            return jax.jit(jax.grad(lambda params: loss(step(params, x[0], y[0]), x[1], y[1])))(start)
        params = start
        for batch in zip(x, y, strict=True):
            params = step(params, *batch)
        return params

    results = [one(x, y) for x, y in zip(work.x.astype(np.float64), work.y, strict=True)]
    return {name: np.mean([result[name] for result in results], axis=0) for name in start}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in peers.PEERS if name != "byzfl"])
def test_peers_agree_with_the_formula(name, x64):
    tried = 0
    for kind in ("fedavg", "maml"):
        for model in ("mlp", "cnn", "femnist"):
            if not peers.supports(name, kind, model) or (kind, model) == ("maml", "femnist"):
                continue  # femnist takes long, and has nothing for maml that the others have not
            work = make_task(kind, model, batch_size=2)
            try:
                running = peers.start(name, work, tell=lambda text: None)
            except peers.PeerUnavailable as unavailable:
                if not unavailable.reason.startswith("cannot install"):
                    raise
                pytest.skip(unavailable.reason)
            with running:
                assert running.run() > 0
                result = running.result()
            wanted = expected(work)
            assert set(result) == set(wanted)
            for leaf, value in wanted.items():
                moved = value - work.params[leaf] if kind == "fedavg" else value
                assert result[leaf].dtype == np.float32
                np.testing.assert_allclose(result[leaf], value, rtol=0, atol=1e-4 * np.abs(moved).max(), err_msg=leaf)
            tried += 1
    assert tried


def nearest_mean(x: np.ndarray, f: int) -> np.ndarray:
    """Each row becomes the mean of its `n - f` nearest; then their mean."""
    distances = np.linalg.norm(x[:, None] - x[None], axis=2)
    return x[np.argsort(distances, axis=1)[:, : len(x) - f]].mean((0, 1))


def clipped_mean(x: np.ndarray, most: float) -> np.ndarray:
    return (x * np.minimum(1.0, most / np.linalg.norm(x, axis=1, keepdims=True))).mean(0)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_byzfl_agrees_with_the_formula(library):
    updates = np.random.default_rng(0).normal(size=(11, 40)).astype(np.float32)
    x = updates.astype(np.float64)
    expected = {
        (("TrMean", (("f", 2),)),): np.sort(x, axis=0)[2:-2].mean(0),
        (("NNM", (("f", 2),)), ("Average", ())): nearest_mean(x, 2),
        (("Clipping", (("c", 5.0),)), ("Average", ())): clipped_mean(x, 5.0),
    }
    for steps, wanted in expected.items():
        work = peers.RuleTask(tuple((name, dict(arguments)) for name, arguments in steps), library, updates)
        try:
            running = peers.start("byzfl", work, tell=lambda text: None)
        except peers.PeerUnavailable as unavailable:
            if not unavailable.reason.startswith("cannot install"):
                raise
            pytest.skip(unavailable.reason)
        with running:
            assert running.run() > 0  # a second time on the same updates, though `Clipping` changes what it is given
            result = running.result()["update"]
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-6)
