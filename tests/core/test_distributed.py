import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

SCRIPT = Path(__file__).with_name("two_processes.py")
TIMEOUT = 180


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_together(count, folder):
    """Starts the script `count` times and waits; nobody outlives the test."""
    address, env = f"127.0.0.1:{free_port()}", dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[2]), env.get("PYTHONPATH", "")])
    files = [folder / f"{i}.npz" for i in range(count)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), address, str(i), str(count), str(file)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i, file in enumerate(files)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    return [dict(np.load(file)) for file in files]


def test_two_processes_run_the_round_of_one(tmp_path):
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    cohort = jax.tree.map(jnp.asarray, script.make_cohort())
    alone = {name: np.asarray(script.run(algorithm, cohort)) for name, algorithm in script.algorithms(None).items()}
    assert np.isfinite(alone["collected"]).all() and np.abs(alone["collected"] - [0.5, -1.0, 0.2]).max() > 0.01
    for together in run_together(2, tmp_path):
        assert together.keys() == alone.keys()
        for name, params in together.items():
            np.testing.assert_allclose(params, alone[name], rtol=1e-5, err_msg=name)
            np.testing.assert_allclose(params, alone["collected"], rtol=1e-5, err_msg=name)
