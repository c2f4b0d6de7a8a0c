"""What the command lines share."""

import dataclasses
import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import files
from experiments.checkpoints import CheckpointError
from experiments.comparison import Interrupted
from experiments.datasets import DataError, DatasetNotFoundError


def check_names(option: str, names: Sequence[str], known: Collection[str]) -> None:
    """Checks that names are there, known and different.

    Args:
      option: where they were given, for the message.
      names: the names.
      known: those that are allowed.

    Raises:
      ValueError: naming the first that is not, and what may have been meant.
    """
    if not names:
        raise ValueError(f"{option} must name at least one of {', '.join(known)}.")
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{option} must be among {', '.join(known)}, got {name!r}.{hint}")
    if len(set(names)) < len(names):
        raise ValueError(f"{option} must differ from each other, got {', '.join(names)}.")


def asked_for(config: Any) -> dict[str, Any]:
    """What makes a run what it is, as it is stored: all options but where files are.

    Args:
      config: dataclass of options, among them `out` and `data_dir`.
    """
    asked = dataclasses.asdict(config)
    asked.pop("out")
    return files.plain({**asked, "data_dir": None})


def open_run(folder: Path, config: Mapping[str, Any], *, may_differ: Iterable[str]) -> files.RunDir:
    """Starts a run in a folder, or goes on with the one that is there.

    Args:
      folder: the run directory.
      config: what is asked for.
      may_differ: names in which what is asked for may differ from what is there.

    Returns:
      The places of the run.

    Raises:
      files.RunDirError: if the run there differs in anything else.
    """
    if not files.run_dir(folder).config.exists():
        return files.start_run(folder, config)
    places = files.resume_run(folder, config, may_differ=may_differ)
    files.write_json(places.config, config)
    return places


def exit_status(work: Callable[[], Any]) -> int:
    """Does the work of a command.

    Args:
      work: what is to be done; an error in what was asked for is told in one line.

    Returns:
      0, 2 after such an error, 130 after Ctrl-C.
    """
    try:
        work()
    except Interrupted:
        return 130
    except (ValueError, DataError, DatasetNotFoundError, CheckpointError, files.RunDirError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False)
        return 2
    return 0
