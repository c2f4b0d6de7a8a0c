"""The peer's side of the conversation: `python -m bench.peers.serving MODULE FOLDER`.

Reads the task from the folder, lets the module prepare it, then answers one line of JSON for each line on standard
input until that ends. Standard output belongs to the conversation; what the peer prints goes to standard error.
"""

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.peers import task as tasks


def peak_bytes() -> int | None:
    """The most memory that this process has held; None where the system does not say."""
    with contextlib.suppress(OSError, StopIteration):
        # Not ru_maxrss: on Linux that begins with what the parent held when it started this process.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def serve(module_name: str, folder: Path, say: Callable[[dict[str, Any]], None]) -> None:
    """Prepares the task, runs it once, and answers requests.

    Args:
      module_name: a module with `PACKAGES`, distributions whose versions count, and `prepare(task) -> Program`.
      folder: where the task is, and where results go.
      say: sends an answer.
    """
    module = importlib.import_module(module_name)
    program = module.prepare(tasks.load(folder))
    program.refresh()
    start = time.perf_counter()
    latest = program.run()
    compile_seconds = time.perf_counter() - start
    versions = {name: metadata.version(name) for name in module.PACKAGES}
    say({"versions": {**versions, **program.settings}, "compile_seconds": compile_seconds})
    for line in sys.stdin:
        match json.loads(line):
            case "run":
                del latest
                program.refresh()
                start = time.perf_counter()
                latest = program.run()
                say({"seconds": time.perf_counter() - start})
            case "result":
                tasks.save_arrays(folder / "result.npz", program.to_numpy(latest))
                say({"result": "result.npz"})
            case "peak":
                say({"peak_bytes": peak_bytes()})
            case request:
                raise ValueError(f"A request must be run, result or peak, got {request!r}.")


def main() -> None:
    """Keeps standard output to itself and serves."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    module_name, folder = sys.argv[1:]
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        serve(module_name, Path(folder), say)


if __name__ == "__main__":
    main()
