"""Files of a run: atomic writes, a log of JSON lines that survives a torn end, and run directories.

A file written here is either the old one or the new one, never half of one: the bytes go to a temporary file in the
same folder, are synced, and take the place of the old file by `os.replace`. The log is only ever appended to; a crash
can tear its last line alone, which reading skips and the next append cuts off.
"""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np


class RunDir(NamedTuple):
    """The places of a run."""

    root: Path
    """The folder itself."""
    config: Path
    """`config.json`: what the run was asked for."""
    metrics: Path
    """`metrics.jsonl`: one record a line, appended while the run goes on."""
    results: Path
    """`results.json`: the final numbers, see `experiments.report`."""
    checkpoints: Path
    """Folder of checkpoints."""
    plots: Path
    """Folder of PNG files."""


class RunDirError(ValueError):
    """A run directory cannot be used as asked."""


@contextlib.contextmanager
def atomic_open(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a temporary file that replaces `path` when the block ends without an exception.

    Args:
      path: the file to write; missing parent folders are made.
      mode: `"wb"`, or `"w"` for UTF-8 text.

    Yields:
      The open temporary file, in the same folder as `path`.

    Raises:
      ValueError: for any other mode.

    Guarantee: after an exception `path` is what it was before, and no temporary file stays behind.

    Example:
      >>> import pathlib, tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> with atomic_open(folder / "a.txt", "w") as f:
      ...     _ = f.write("whole")
      >>> (folder / "a.txt").read_text()
      'whole'
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"mode must be 'wb' or 'w', got {mode!r}.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, mode, encoding="utf-8" if mode == "w" else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _default_permissions())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_open(path, "w") as file:
        file.write(text)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes bytes atomically."""
    with atomic_open(path) as file:
        file.write(content)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value as indented JSON, atomically; see `plain` for what may be in it."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file; a broken one gives a ValueError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def write_npz(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Writes named arrays as a compressed `.npz`, atomically; objects that would need pickling are refused."""
    ready: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    for name, value in ready.items():
        if value.dtype.hasobject:
            raise TypeError(f"arrays[{name!r}] must be numbers, booleans or text, got dtype {value.dtype}.")
    with atomic_open(path) as file:
        np.savez_compressed(file, **ready)


def plain(value: Any) -> Any:
    """Turns NumPy and JAX values, tuples and paths into what JSON knows; NaN and infinities become `null`.

    Example:
      >>> plain({"a": np.float32(0.5), "b": np.arange(3), "c": float("nan"), 4: (True, None)})
      {'a': 0.5, 'b': [0, 1, 2], 'c': None, '4': [True, None]}
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return plain(value.item())
    if hasattr(value, "__array__"):
        return plain(np.asarray(value).tolist())
    raise TypeError(f"value must be made of numbers, text, arrays, sequences and mappings, got {type(value).__name__}.")


def append_jsonl(path: str | os.PathLike[str], record: Mapping[str, Any], *, sync: bool = False) -> None:
    """Appends one record as one line; a torn end that a crash left is cut off first.

    Args:
      path: the log; made when absent.
      record: a mapping, see `plain`.
      sync: wait until the line is on the disk.

    Raises:
      TypeError: when `record` is not a mapping or holds what JSON cannot say; nothing is written then.
    """
    if not isinstance(record, Mapping):
        raise TypeError(f"record must be a mapping, got {type(record).__name__}.")
    line = (json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n").encode()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    repair_jsonl(path)
    with open(path, "ab") as file:
        file.write(line)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads all whole records of a log; an absent file is an empty log, a torn last line is left out.

    Raises:
      ValueError: naming file and line when any line but the last is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    last = max((number for number, line in enumerate(lines) if line.strip()), default=-1)
    records = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        record = _parse(line)
        if record is None and number != last:
            raise ValueError(f"{path}, line {number + 1} must be a JSON object, got {line[:60]!r}.")
        if record is not None:
            records.append(record)
    return records


def repair_jsonl(path: str | os.PathLike[str]) -> int:
    """Makes a log end with a whole line: cuts off a torn last line, ends a whole one that lacks its newline.

    Returns:
      The number of bytes cut off.
    """
    path = Path(path)
    if not path.exists() or path.stat().st_size == 0:
        return 0
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return 0
        size = file.tell()
        start = _last_line_start(file, size)
        file.seek(start)
        tail = file.read()
        if _parse(tail) is not None:
            file.write(b"\n")
            return 0
        file.truncate(start)
        return size - start


def rewind_jsonl(path: str | os.PathLike[str], keep_fn: Callable[[dict[str, Any]], bool]) -> int:
    """Keeps the records for which `keep_fn` is true, for example those up to the round of the checkpoint resumed from.

    Returns:
      The number of whole records removed.
    """
    records = read_jsonl(path)
    kept = [record for record in records if keep_fn(record)]
    write_jsonl(path, kept)
    return len(records) - len(kept)


def write_jsonl(path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]) -> None:
    """Writes a whole log at once, atomically."""
    lines = [json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records]
    write_text(path, "".join(lines))


def run_dir(root: str | os.PathLike[str]) -> RunDir:
    """The places of the run that lives in `root`; touches nothing."""
    root = Path(root)
    names = ("config.json", "metrics.jsonl", "results.json", "checkpoints", "plots")
    return RunDir(root, *(root / name for name in names))


def number_run_dir(parent: str | os.PathLike[str], label: str) -> Path:
    """Makes and returns the next folder of `parent/label-001`, `-002`, ...; safe when several runs start at once."""
    if label in ("", ".", "..") or Path(label).name != label:
        raise ValueError(f"label must be a plain folder name, got {label!r}.")
    parent = Path(parent)
    parent.mkdir(parents=True, exist_ok=True)
    taken = [_number(entry.name, label) for entry in parent.iterdir()]
    number = max(taken, default=0) + 1
    while True:
        path = parent / f"{label}-{number:03d}"
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def start_run(root: str | os.PathLike[str], config: Mapping[str, Any]) -> RunDir:
    """Makes the folders of a new run and stores its configuration.

    Raises:
      RunDirError: when `root` already holds a run; nothing there is touched.
    """
    places = run_dir(root)
    if places.root.exists() and not places.root.is_dir():
        raise RunDirError(f"{places.root} must be a folder, it is a file.")
    if places.config.exists() or places.metrics.exists() or places.checkpoints.exists():
        raise RunDirError(f"{places.root} already holds a run; resume it, or name another folder.")
    for folder in (places.root, places.checkpoints, places.plots):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(places.config, config)
    return places


def resume_run(root: str | os.PathLike[str], config: Mapping[str, Any], *, may_differ: Iterable[str] = ()) -> RunDir:
    """Opens the run in `root` again and checks that it was asked for the same thing.

    Args:
      root: folder of the run.
      config: configuration asked for now.
      may_differ: top-level keys whose values may have changed, for example the number of rounds.

    Raises:
      RunDirError: when `root` holds no run, or when the two configurations differ; the message names each difference.
    """
    places = run_dir(root)
    if not places.config.exists():
        raise RunDirError(f"{places.root} holds no run to resume: {places.config.name} is absent.")
    old, new, free = read_json(places.config), plain(config), set(may_differ)
    if not isinstance(old, dict):
        raise RunDirError(f"{places.config} must hold a JSON object, got {type(old).__name__}.")
    differing = [key for key in sorted(old.keys() | new.keys()) if key not in free and old.get(key) != new.get(key)]
    if differing:
        changes = "; ".join(f"{key}: {old.get(key)!r} then, {new.get(key)!r} now" for key in differing)
        raise RunDirError(f"{places.root} was started with another configuration ({changes}).")
    for folder in (places.checkpoints, places.plots):
        folder.mkdir(parents=True, exist_ok=True)
    repair_jsonl(places.metrics)
    return places


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return record if isinstance(record, dict) else None


def _last_line_start(file: IO[bytes], size: int, block: int = 4096) -> int:
    position = size
    while position > 0:
        step = min(block, position)
        position -= step
        file.seek(position)
        found = file.read(step).rfind(b"\n")
        if found >= 0:
            return position + found + 1
    return 0


def _number(name: str, label: str) -> int:
    suffix = name.removeprefix(f"{label}-")
    return int(suffix) if suffix != name and suffix.isdecimal() else 0


def _default_permissions() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
