"""This side of the conversation: a peer in a process of its own."""

import contextlib
import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from bench.peers import task as tasks
from bench.peers.environment import ROOT, PeerUnavailable, gist, outside

READY_SECONDS = 900.0
ANSWER_SECONDS = 900.0
CLOSE_SECONDS = 5.0


class Running:
    """A peer that has its task, has run it once, and waits."""

    name: str
    """Of the peer."""
    versions: dict[str, str]
    """Of its packages, and what it chose for itself, for example `"threads"`."""
    compile_seconds: float
    """The first call: tracing, compiling, warming up."""

    def __init__(
        self,
        name: str,
        python: Path,
        module: str,
        task: tasks.AnyTask,
        *,
        path: Sequence[Path] = (),
        ready_seconds: float = READY_SECONDS,
        answer_seconds: float = ANSWER_SECONDS,
    ):
        """Starts the process and waits until it is ready.

        Args:
          name: of the peer.
          python: interpreter of its environment.
          module: to import there, see `bench.peers.serving.serve`.
          task: what it is to do.
          path: further folders to import from.
          ready_seconds: how long the first call may take.
          answer_seconds: how long any later one may take.

        Raises:
          PeerUnavailable: if the process ends, or takes too long.
        """
        self.name = name
        self._answer_seconds = answer_seconds
        self._folder = Path(tempfile.mkdtemp(prefix="bench-peer-"))
        self._process: subprocess.Popen[str] | None = None
        try:
            tasks.save(task, self._folder)
            with (self._folder / "stderr").open("wb") as stderr:
                # -P: a peer's module has the name of the package that it imports.
                self._process = subprocess.Popen(
                    [str(python), "-P", "-m", "bench.peers.serving", module, str(self._folder)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                    encoding="utf-8",
                    cwd=self._folder,
                    env={**outside(), "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path)))},
                )
            self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
            threading.Thread(target=_forward, args=(self._process.stdout, self._answers), daemon=True).start()
            ready = self._answer(ready_seconds)
            self.versions, self.compile_seconds = ready["versions"], ready["compile_seconds"]
            (self._folder / "task.npz").unlink()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise PeerUnavailable(f"{name} cannot be started: {error}") from error
            raise

    def run(self) -> float:
        """Does the whole task once; returns the seconds that it took in there."""
        return self._ask("run")["seconds"]

    def result(self) -> dict[str, np.ndarray]:
        """What the latest call came to, by name, as the kind of task says."""
        return tasks.load_arrays(self._folder / self._ask("result")["result"])

    def peak_bytes(self) -> int | None:
        """The most memory that the process has held, all of it: interpreter, packages, data and temporaries."""
        return self._ask("peak")["peak_bytes"]

    def close(self) -> None:
        """Ends the process and removes its files."""
        if self._process is not None:
            if self._process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.close()
            try:
                self._process.wait(CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, request: str) -> dict[str, Any]:
        if self._process is None or self._process.stdin is None:
            raise PeerUnavailable(f"{self.name} is closed")
        with contextlib.suppress(BrokenPipeError):  # then the answers have ended too
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer(self._answer_seconds)

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._process is not None
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            self._process.kill()
            raise PeerUnavailable(f"{self.name} did not answer within {seconds:g} seconds") from None
        if line is None:
            self._answers.put(None)  # whoever asks again hears the same
            status = self._process.wait()
            said = gist((self._folder / "stderr").read_text(encoding="utf-8", errors="replace"))
            ended = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
            raise PeerUnavailable(f"{self.name} ended ({ended}): {said or 'without a word'}")
        return json.loads(line)


def _forward(stream: IO[str], answers: "queue.SimpleQueue[str | None]") -> None:
    """Puts line after line into the queue, None at the end."""
    with stream:
        for line in stream:
            answers.put(line)
    answers.put(None)
