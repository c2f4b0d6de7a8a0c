"""Data sets by name."""

import difflib
import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

from experiments.datasets.digits import digits
from experiments.datasets.federation import Federation
from experiments.datasets.images import mnist, omniglot
from experiments.datasets.sensors import beijing_air, wisdm
from experiments.datasets.synthetic import synthetic_iot
from experiments.datasets.tables import table

LOADERS: dict[str, Callable[..., Federation]] = {
    "digits": digits,
    "synthetic-iot": synthetic_iot,
    "wisdm": wisdm,
    "beijing-air": beijing_air,
    "omniglot": omniglot,
    "mnist": mnist,
    "redwine": functools.partial(table, "redwine"),
    "california": functools.partial(table, "california"),
    "bike": functools.partial(table, "bike"),
    "olscancer": functools.partial(table, "olscancer"),
}
EMBEDDED = ("digits", "synthetic-iot")


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    alpha: float | None = None,
    heterogeneity: str | None = None,
    size: str | None = None,
    max_per_client: int | None = None,
    num_shots: int | None = None,
    num_ways: int | None = None,
    num_stimuli: int | None = None,
    window: int | None = None,
) -> Federation:
    """Loads a data set by name; what is None takes the loader's default.

    Args:
      name: a key of `LOADERS`.
      data_dir: where the files are; not used by the embedded sets. Default: `$CEDARJAX_DATA`, else `shared/data` beside
        the repository.
      seed: of every draw; equal seeds give equal federations.
      alpha: concentration of the Dirichlet split (tabular sets, default 0.5; `mnist`, default PFLlib's split; `digits`,
        default tasks).
      heterogeneity: `"plain"`, `"rotation"` or `"labels"` (`wisdm`).
      size: `"small"`, `"medium"` or `"large"` (`synthetic-iot`).
      max_per_client: examples kept of a client (`beijing-air`, `mnist`).
      num_shots: labelled examples of a new client (per class in classification).
      num_ways: classes of a client (`digits`, `omniglot`).
      num_stimuli: unlabelled inputs of the server.
      window: hours in an input (`beijing-air`).

    Raises:
      ValueError: for an unknown name, or an option that this set does not have.
      DatasetNotFoundError: when the files are absent; it says where they were looked for and how to get them.
      DataError: when a file does not hold what it should.

    Example:
      >>> load("synthetic-iot", size="small").num_clients
      40
    """
    if name not in LOADERS:
        close = difflib.get_close_matches(name.lower(), LOADERS, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"name must be one of {', '.join(LOADERS)}, got {name!r}.{hint}")
    options: dict[str, Any] = {
        "alpha": alpha,
        "heterogeneity": heterogeneity,
        "size": size,
        "max_per_client": max_per_client,
        "num_shots": num_shots,
        "num_ways": num_ways,
        "num_stimuli": num_stimuli,
        "window": window,
    }
    options = {key: value for key, value in options.items() if value is not None}
    known = inspect.signature(LOADERS[name]).parameters
    for key, value in options.items():
        if key not in known:
            told = ", ".join(option for option in known if option not in ("name", "data_dir", "seed"))
            raise ValueError(f"{key} is not an option of data set {name!r} (got {value!r}); its options are {told}.")
    if num_stimuli is not None and num_stimuli < 2:
        raise ValueError(f"num_stimuli must be at least 2, got {num_stimuli}.")
    if "data_dir" in known:
        options["data_dir"] = data_dir
    return LOADERS[name](seed=seed, **options)
