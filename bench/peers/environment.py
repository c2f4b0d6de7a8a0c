"""The virtual environment of a peer, built on first use from its list of requirements.

Beside `<peer>.txt` there may be a `<peer>.nodeps.txt`: it is installed after the first, without its dependencies.
Environments lie in `.cache/bench-peers`, named by the hash of the requirements and of the Python that runs them: peers
with the same list share one, and a list that changes gets a new one. A stamp is written last, so that a build that was
interrupted starts over; a lock keeps a second process from building in the same place.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / ".cache" / "bench-peers"
INSTALL_SECONDS = 1800
_FAILED: dict[Path, str] = {}  # in this process: a second task need not wait for the same failure
PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input")


class PeerUnavailable(Exception):
    """A peer cannot do what it was asked for."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def ensure(name: str, requirements: Path, *, cache: Path = CACHE, tell: Callable[[str], None]) -> Path:
    """Builds the environment unless it is there.

    Args:
      name: of the peer, for messages.
      requirements: its list, as pip reads it, and perhaps a second one beside it, see above.
      cache: folder that holds the environments.
      tell: called with a line on what is going on.

    Returns:
      The environment's Python.

    Raises:
      PeerUnavailable: if it cannot be built.
    """
    digest = key(requirements)
    folder = cache / digest
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "stamp"
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{digest}.lock"):
        if python.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == digest:
            return python
        if folder in _FAILED:
            raise PeerUnavailable(_FAILED[folder])
        tell(f"installing {name}")
        shutil.rmtree(folder, ignore_errors=True)
        commands = [(sys.executable, "-m", "venv", str(folder)), (str(python), *PIP, "-r", str(requirements))]
        if (alone := without_dependencies(requirements)).exists():
            commands.append((str(python), *PIP, "--no-deps", "-r", str(alone)))
        for command in commands:
            if complaint := _complaint(command):
                _FAILED[folder] = f"cannot install {name}: {complaint}"
                raise PeerUnavailable(_FAILED[folder])
        stamp.write_text(digest, encoding="utf-8")
    return python


def without_dependencies(requirements: Path) -> Path:
    """Where the second list is, if there is one: of packages that want what they do not need here."""
    return requirements.with_suffix(".nodeps.txt")


def key(requirements: Path) -> str:
    """Name of the environment of a list of requirements, and of the second one beside it."""
    python = f"{sys.implementation.name} {sys.version_info[:2]} {sys.platform}\n"
    lists = [path.read_bytes() for path in (requirements, without_dependencies(requirements)) if path.exists()]
    return hashlib.sha256(python.encode() + b"\n--no-deps\n".join(lists)).hexdigest()[:16]


def outside() -> dict[str, str]:
    """The environment variables of this process, less those that would lead another Python to this one's packages."""
    mine = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    return {name: value for name, value in os.environ.items() if name not in mine}


def gist(text: str, most: int = 4) -> str:
    """The last lines of an output on one line; only those that speak of an error, if there are any."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() and not line.startswith(("note:", "hint:"))]
    return " | ".join(line[:200] for line in (errors or lines)[-most:])


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a file's lock, which the system drops with the process; nothing where there are no such locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _complaint(command: Sequence[str]) -> str:
    """Runs a step of the build; returns what went wrong, "" if nothing did."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=outside(), stdin=subprocess.DEVNULL, timeout=INSTALL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"not done after {INSTALL_SECONDS} seconds"
    return (gist(done.stdout + done.stderr) or f"exit status {done.returncode}") if done.returncode else ""
