"""Does named pieces of work one after another, each stored in a file of its own, with progress and polite Ctrl-C."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from experiments import files
from experiments.comparison import Interrupted, polite_interrupts

Record = dict[str, Any]


def one_by_one(
    labels: Mapping[str, str],
    work: Callable[[str], Record],
    folder: Path,
    console: Console,
    *,
    told: Callable[[Record], str] = lambda record: "",
) -> list[Record]:
    """Does what is missing.

    Args:
      labels: name of each piece, which is that of its file, to how it is shown.
      work: `name -> record`, which is stored as JSON.
      folder: where the files are, in a run directory.
      console: where progress is shown.
      told: what the progress says of the last record.

    Returns:
      The records in the order of the names, as they are stored.

    Raises:
      Interrupted: after Ctrl-C, when the piece that was being done has been stored and the user has been told how to go
        on.
    """
    records: list[Record] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    last = TextColumn("{task.fields[told]}")
    names: Sequence[str] = tuple(labels)
    with polite_interrupts() as pressed, Progress(*columns, TimeElapsedColumn(), last, console=console) as progress:
        task = progress.add_task("", total=len(names), told="")
        for name in names:
            path = folder / f"{name}.json"
            progress.update(task, description=labels[name])
            if not path.exists():
                files.write_json(path, work(name))
            records.append(files.read_json(path))
            progress.update(task, advance=1, told=told(records[-1]))
            if pressed and name != names[-1]:
                break
    if len(records) < len(names):
        stopped = f"stopped after {labels[names[len(records) - 1]]}"
        console.print(f"\nInterrupted, {stopped}. The same command goes on with {folder.parent}.", soft_wrap=True)
        raise Interrupted(stopped)
    return records
