"""`python -m experiments.asynchrony`: see `experiments.asynchrony.command`."""

import sys

from experiments.asynchrony.command import main

sys.exit(main())
