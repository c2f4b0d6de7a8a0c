"""What the command lines share."""

import difflib
from collections.abc import Collection, Sequence


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
