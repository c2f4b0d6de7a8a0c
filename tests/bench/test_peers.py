"""Peers: the conversation with their processes, their environments, and that they compute what they are asked for."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from bench import peers
from bench.peers import environment, process, task

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
    return Program(run, lambda result: result, {{"threads": str(task.num_clients)}})
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


class Steps:
    """Stands in for `subprocess.run`: makes the folder of an environment, and ends as it is told."""

    def __init__(self, monkeypatch, status: int = 0, output: str = ""):
        self.commands: list[list[str]] = []
        self.status, self.output = status, output
        monkeypatch.setattr(environment.subprocess, "run", self)

    def __call__(self, command, **options):
        self.commands.append([str(part) for part in command])
        if "venv" in command:
            python = Path(command[-1]) / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
            python.parent.mkdir(parents=True)
            python.touch()
            return subprocess.CompletedProcess(command, 0, "", "")
        return subprocess.CompletedProcess(command, self.status, "", self.output)


@pytest.fixture
def requirements(tmp_path) -> Path:
    path = tmp_path / "peer.txt"
    path.write_text("something==1.0\n", encoding="utf-8")
    return path


def test_environment_is_built_once(tmp_path, monkeypatch, requirements):
    steps, told = Steps(monkeypatch), []
    python = environment.ensure("peer", requirements, cache=tmp_path / "cache", tell=told.append)
    assert python.exists()
    assert [command[1:3] for command in steps.commands] == [["-m", "venv"], ["-m", "pip"]]
    assert steps.commands[1][-2:] == ["-r", str(requirements)]
    assert "--system-site-packages" not in steps.commands[0]
    assert environment.ensure("peer", requirements, cache=tmp_path / "cache", tell=told.append) == python
    assert len(steps.commands) == 2
    assert told == ["installing peer"]


def test_same_requirements_share_an_environment_and_others_do_not(tmp_path, monkeypatch, requirements):
    Steps(monkeypatch)
    twin, other = tmp_path / "twin.txt", tmp_path / "other.txt"
    shutil.copy(requirements, twin)
    other.write_text("something==2.0\n", encoding="utf-8")
    pythons = [
        environment.ensure(path.stem, path, cache=tmp_path / "cache", tell=lambda text: None)
        for path in (requirements, twin, other)
    ]
    assert pythons[0] == pythons[1] != pythons[2]


@pytest.mark.parametrize("stamp", [None, "", "of something else"])
def test_interrupted_build_starts_over(tmp_path, monkeypatch, requirements, stamp):
    steps = Steps(monkeypatch)
    left = tmp_path / "cache" / environment.key(requirements)
    (left / "half").mkdir(parents=True)
    if stamp is not None:
        (left / "stamp").write_text(stamp, encoding="utf-8")
    python = environment.ensure("peer", requirements, cache=tmp_path / "cache", tell=lambda text: None)
    assert python.exists()
    assert not (left / "half").exists()
    assert len(steps.commands) == 2


def test_failed_installation_is_reported_and_leaves_no_stamp(tmp_path, monkeypatch, requirements):
    steps = Steps(
        monkeypatch, 1, "Collecting something\nERROR: No matching distribution\nnote: the error is not ours\n"
    )
    message = r"^cannot install peer: ERROR: No matching distribution$"
    for _ in range(2):  # the second time without another try
        with pytest.raises(peers.PeerUnavailable, match=message) as caught:
            environment.ensure("peer", requirements, cache=tmp_path / "cache", tell=lambda text: None)
        assert caught.value.reason == str(caught.value)
    assert len(steps.commands) == 2
    assert not list((tmp_path / "cache").rglob("stamp"))


def test_installation_that_really_fails(tmp_path):
    requirements = tmp_path / "peer.txt"
    requirements.write_text(f"{tmp_path}/nothing-here-1.0-py3-none-any.whl\n", encoding="utf-8")
    with pytest.raises(peers.PeerUnavailable, match="cannot install peer: .*nothing-here"):
        environment.ensure("peer", requirements, cache=tmp_path / "cache", tell=lambda text: None)


def test_gist_prefers_errors():
    assert environment.gist("a\n\nb\n c \n", most=2) == "b | c"
    assert environment.gist("ERROR: x\nb\nhint: error") == "ERROR: x"
    assert environment.gist("") == ""


def test_variables_of_this_environment_stay_here(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    monkeypatch.setenv("XLA_FLAGS", "kept")
    assert "PYTHONPATH" not in environment.outside()
    assert environment.outside()["XLA_FLAGS"] == "kept"


def test_every_peer_has_its_two_files():
    folder = Path(peers.__file__).parent
    assert {path.stem for path in folder.glob("*.txt")} == set(peers.PEERS)
    assert set(peers.PEERS) <= {path.stem for path in folder.glob("*.py")}
    assert all(peers.supports(name, "fedavg", "mlp") or peers.supports(name, "maml", "mlp") for name in peers.PEERS)


def test_what_a_peer_does_not_do():
    assert not peers.supports("fedjax", "maml", "mlp")
    assert not peers.supports("torch_loop", "fedavg", "transformer")
    with pytest.raises(ValueError, match="name must be one of fedjax, .*, got 'nobody'"):
        peers.supports("nobody", "fedavg", "mlp")
    with pytest.raises(peers.PeerUnavailable, match="torchopt does not do fedavg on mlp"):
        peers.start("torchopt", make_task("fedavg", "mlp"), tell=lambda text: None)


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
@pytest.mark.parametrize("name", peers.PEERS)
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
