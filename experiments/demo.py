"""The demonstration: digits as tasks, Cedar beside its baselines, with a byte budget and with poisoned clients."""

import sys
from pathlib import Path

from rich.console import Console

from experiments.cedar import Config, run
from experiments.comparison import Interrupted

TITLE = "Digits as tasks: 100 clients name 5 of 10 digits in a private order; new ones have one image per class"


def main() -> int:
    """Runs the `demo` suite on the digits; returns the exit status."""
    console = Console()
    try:
        run(Config(dataset="digits", suite="demo", out=Path("runs")), console, TITLE)
    except Interrupted:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
