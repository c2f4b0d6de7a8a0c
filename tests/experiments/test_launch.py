import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import launch, scale
from experiments.files import read_json

ROOT = Path(__file__).parents[2]
TIMEOUT = 180


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    """Processes find the packages of the repository wherever the tests were started."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def script(tmp_path):
    """Writes a program, which first tells its process id by a file of that name."""

    def write(body):
        file = tmp_path / "script.py"
        file.write_text(
            "import os, pathlib, signal, sys, time\n"
            "number = int(os.environ['JAX_PROCESS_ID'])\n"
            "pathlib.Path(__file__).with_name(f'{os.getpid()}.pid').touch()\n" + body
        )
        return str(file)

    return write


def process_ids(folder):
    return [int(path.stem) for path in folder.glob("*.pid")]


def is_alive(process_id):
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


ROUND = "--clients 60 --block 20 --chunk 5".split()


@pytest.mark.slow
def test_two_processes_run_the_round_of_one(tmp_path, capfd):
    def written(name):
        return ["--json", str(tmp_path / f"{name}.json"), "--params", str(tmp_path / f"{name}.npz")]

    assert scale.main([*ROUND, "--devices", "1", *written("one")]) == 0
    capfd.readouterr()
    assert launch.main(["--processes", "2", "--", "experiments.scale", *ROUND, *written("two")]) == 0
    one, two = (read_json(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert (one["processes"], one["devices"], two["processes"], two["devices"]) == (1, 1, 2, 2)
    assert one["clients"] == two["clients"] == 60 and one["block"] == two["block"] == 20
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    with np.load(tmp_path / "one.npz") as want, np.load(tmp_path / "two.npz") as got:
        assert sorted(want) == sorted(got) and len(got) == 4
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-6, err_msg=name)
    lines = capfd.readouterr().out.splitlines()
    told = [line for line in lines if "mean loss" in line]
    assert len(told) == 1 and told[0].startswith("[0] 60 clients in")
    assert all(line.startswith(("[0] ", "[1] ")) for line in lines)


def test_each_process_knows_the_others_and_its_devices(script, capfd):
    file = script(
        "print(sys.argv[1:], sorted(v for k, v in os.environ.items() if k in sys.argv), flush=True)\n"
        "print('an error', file=sys.stderr)\n"
        "sys.stdout.write('no newline at the end')\n"
    )
    names = [launch.NUM_PROCESSES, launch.NUM_CPU_DEVICES, launch.LOCAL_DEVICE_IDS]
    arguments = ["--processes", "3", "--devices-per-process", "2", "--", file, *names]
    assert launch.main(arguments) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 9
    for number in range(3):
        own = [line.removeprefix(f"[{number}] ") for line in lines if line.startswith(f"[{number}] ")]
        devices = f"{2 * number},{2 * number + 1}"
        assert own[0] == f"{names} {sorted(['3', '2', devices])}"
        assert own[1:] == ["an error", "no newline at the end"]


@pytest.mark.parametrize(
    ("ends", "status"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), signal.SIGKILL)", 128 + 9), ("1 / 0", 1)]
)
def test_the_first_that_fails_ends_the_others(ends, status, script, tmp_path, capfd):
    wait = "while len(list(pathlib.Path(__file__).parent.glob('*.pid'))) < 3: time.sleep(0.01)\n"
    file = script(f"{wait}if number == 1:\n    print('this one', flush=True)\n    {ends}\ntime.sleep({TIMEOUT})\n")
    start = time.monotonic()
    assert launch.main(["--processes", "3", "--", file]) == status
    assert time.monotonic() - start < TIMEOUT
    assert len(process_ids(tmp_path)) == 3 and not any(map(is_alive, process_ids(tmp_path)))
    assert "[1] this one" in capfd.readouterr().out


def test_one_that_does_not_want_to_end_is_ended(script, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE", 0.2)
    file = script(
        "deaf = pathlib.Path(__file__).with_name('deaf')\n"
        "if number == 0:\n"
        "    while not deaf.exists(): time.sleep(0.01)\n"
        "    sys.exit(5)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"deaf.touch(); time.sleep({TIMEOUT})\n"
    )
    assert launch.main(["--processes", "2", "--", file]) == 5
    assert len(process_ids(tmp_path)) == 2 and not any(map(is_alive, process_ids(tmp_path)))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_it_ends_all(sent, script, tmp_path):
    file = script(f"time.sleep({TIMEOUT})\n")
    command = [sys.executable, "-m", "experiments.launch", "--processes", "2", "--", file]
    # A child inherits an ignored signal, and a shell's job in the background ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    launcher = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    signal.signal(signal.SIGINT, before)
    try:
        deadline = time.monotonic() + TIMEOUT
        while len(process_ids(tmp_path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        launcher.send_signal(sent)
        assert launcher.wait(TIMEOUT) == 130
        assert len(process_ids(tmp_path)) == 2 and not any(map(is_alive, process_ids(tmp_path)))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()


def test_a_process_that_fails_does_not_wait_for_the_others(script, capfd):
    """The others wait for it, so that leaving together would take minutes."""
    file = script(
        "from experiments.launch import joined\n"
        "import jax\n"
        "with joined():\n"
        "    if jax.process_index() == 1:\n"
        "        raise RuntimeError(f'broken, one of {jax.process_count()}')\n"
        f"    time.sleep({TIMEOUT})\n"
    )
    start = time.monotonic()
    assert launch.main(["--", file]) == 1
    assert time.monotonic() - start < TIMEOUT
    assert "[1] RuntimeError: broken, one of 2" in capfd.readouterr().out


def free_slurm_job():
    """Number of a job whose port, which follows from it, is free."""
    for job in range(os.getpid() % 4096, 4096):
        with launch.socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", 61440 + job))
            return job
    return 0


def test_processes_of_slurm_find_each_other(tmp_path):
    """What `srun --ntasks=2` sets on one node."""
    file = tmp_path / "script.py"
    file.write_text(
        "from experiments.launch import joined\n"
        "import jax\n"
        "with joined('auto'):\n"
        "    print(jax.process_index(), jax.process_count(), len(jax.devices()), len(jax.local_devices()))\n"
    )
    job = {"SLURM_JOB_ID": str(free_slurm_job()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(file)],
            env={**os.environ, **job, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "JAX_NUM_CPU_DEVICES": "3"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        told = [process.communicate(timeout=TIMEOUT)[0].splitlines() for process in processes]
    finally:
        launch.stop(processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert [lines[-1] for lines in told] == ["0 2 6 3", "1 2 6 3"]


def test_alone_nothing_is_joined(monkeypatch):
    monkeypatch.setattr(launch.jax.distributed, "initialize", None)
    monkeypatch.delenv(launch.NUM_PROCESSES, raising=False)
    with launch.joined():
        pass
    monkeypatch.setenv(launch.NUM_PROCESSES, "2")
    with launch.joined("off"):
        pass


def test_where_jax_finds_nobody_the_error_says_what_it_looked_for(monkeypatch):
    def initialize():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(launch.jax.distributed, "initialize", initialize)
    with (
        pytest.raises(ValueError, match="--distributed auto needs Slurm, Kubernetes, Open MPI or Cloud TPU"),
        launch.joined("auto"),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "2"], "must follow after --"),
        (["--processes", "2", "--"], "must follow after --"),
        (["--processes", "0", "--", "x"], "--processes must be at least 1, got 0"),
        (["--devices-per-process", "-1", "--", "x"], "--devices-per-process must be at least 1, got -1"),
    ],
)
def test_mistakes_are_told(arguments, message, capsys):
    assert launch.main(arguments) == 2
    assert message in capsys.readouterr().err
