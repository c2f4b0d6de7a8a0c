"""The demonstration: digits as tasks, Cedar beside its baselines, with a byte budget and with poisoned clients."""

import sys

from experiments.cedar import main

if __name__ == "__main__":
    sys.exit(main(["--dataset", "digits", "--suite", "demo", *sys.argv[1:]]))
