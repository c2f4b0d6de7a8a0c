"""Several processes that compute together, all on this machine, started by one command.

    python -m experiments.launch --processes 2 -- experiments.scale --clients 20000 --block 2000
    python -m experiments.launch --processes 2 --devices-per-process 4 -- mine.py

What is started, a module or a file, enters `joined` before its first computation. Where somebody else starts the
processes (Slurm, Kubernetes, Open MPI, Cloud TPU) this command is not needed: `joined("auto")` lets JAX find them.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import IO, Literal, NoReturn

import jax
import tyro

Distributed = Literal["launched", "auto", "off"]
"""Whom a process computes with: with those of `experiments.launch` if that started it; with those that JAX finds; or
alone."""

ADDRESS, BIND_ADDRESS = "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS"
NUM_PROCESSES, PROCESS_ID = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
NUM_CPU_DEVICES, LOCAL_DEVICE_IDS = "JAX_NUM_CPU_DEVICES", "JAX_LOCAL_DEVICE_IDS"
PATIENCE = 2.0  # seconds between asking a process to end and ending it; JAX takes the first for advice


@dataclasses.dataclass(frozen=True)
class Options:
    """Starts a module or a file in several processes that compute together: `... --processes 2 -- MODULE ARGUMENTS`."""

    processes: int = 2
    """How many."""
    devices_per_process: int = 1
    """Devices of each: cores of a CPU; of several GPUs, the next so many."""


@contextlib.contextmanager
def joined(how: Distributed = "launched") -> Iterator[None]:
    """Makes this process one of several for the length of a block.

    Inside, `jax.devices()` are those of all processes, and all of them have to run the same programs in the same order.
    The block is left together. A process that fails in it ends at once with its traceback: the others wait for its
    part of a computation, and leaving in good order would wait for them.

    Args:
      how: `"launched"`, with the processes that `experiments.launch` started, if it did; `"auto"`, with those that JAX
        finds by itself (Slurm, Kubernetes, Open MPI, Cloud TPU); `"off"`, alone.

    Yields:
      Nothing.

    Raises:
      ValueError: if `"auto"` finds nothing.
    """
    if how == "off" or (how == "launched" and NUM_PROCESSES not in os.environ):
        yield
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if how == "launched":
        count, number = int(os.environ[NUM_PROCESSES]), int(os.environ[PROCESS_ID])
        jax.distributed.initialize(os.environ[ADDRESS], count, number)
    else:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                f"--distributed auto needs Slurm, Kubernetes, Open MPI or Cloud TPU, and found none of them: {error}"
            ) from error
    try:
        yield
    except BaseException as error:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)
    jax.distributed.shutdown()


def start(command: Sequence[str], count: int, devices: int) -> list[subprocess.Popen[str]]:
    """Starts the processes; see `joined` for what they find in their environment.

    Args:
      command: a module or a file, and its arguments.
      count: how many processes.
      devices: devices of each.

    Returns:
      The processes, number 0 first; both their outputs come through `stdout`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    target = [command[0]] if command[0].endswith(".py") else ["-m", command[0]]
    started: list[subprocess.Popen[str]] = []
    try:
        for number in range(count):
            own = {
                ADDRESS: address,
                BIND_ADDRESS: address,  # of no use to other machines
                NUM_PROCESSES: str(count),
                PROCESS_ID: str(number),
                NUM_CPU_DEVICES: str(devices),
                LOCAL_DEVICE_IDS: ",".join(str(number * devices + i) for i in range(devices)),
                "PYTHONUNBUFFERED": "1",
            }
            started.append(
                subprocess.Popen(
                    [sys.executable, *target, *command[1:]],
                    env={**os.environ, **own},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                )
            )
    except BaseException:
        stop(started)
        raise
    return started


def stop(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Ends those that still run: asks, waits a little, and kills."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.wait()


def run(command: Sequence[str], count: int, devices: int) -> int:
    """Runs a command in several processes, and shows their lines with the number of the process in front.

    Args:
      command: a module or a file, and its arguments.
      count: how many processes.
      devices: devices of each.

    Returns:
      0 if all went well; otherwise the exit status of the first that did not (128 and the signal if one ended it), and
      the others were stopped.
    """
    processes, lock = start(command, count, devices), threading.Lock()

    def show(number: int, output: IO[str]) -> None:
        with output:
            for line in output:
                with lock:
                    sys.stdout.write(f"[{number}] {line.rstrip()}\n")
                    sys.stdout.flush()

    readers = [
        threading.Thread(target=show, args=(number, process.stdout), daemon=True)
        for number, process in enumerate(processes)
    ]
    try:
        for reader in readers:
            reader.start()
        while True:
            statuses = [process.poll() for process in processes]
            failed = next((status for status in statuses if status), 0)
            if failed or None not in statuses:
                return failed if failed >= 0 else 128 - failed
            time.sleep(0.05)
    finally:
        stop(processes)
        for reader in readers:
            reader.join(PATIENCE)  # a grandchild may hold the other end


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    split = given.index("--") if "--" in given else len(given)
    own, command = given[:split], given[split + 1 :]
    options = tyro.cli(Options, prog="python -m experiments.launch", args=own)
    for name in ("processes", "devices_per_process"):
        if getattr(options, name) < 1:
            print(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}.", file=sys.stderr)
            return 2
    if not command:
        print("What to start must follow after --, as in `--processes 2 -- experiments.scale`.", file=sys.stderr)
        return 2

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        return run(command, options.processes, options.devices_per_process)
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
