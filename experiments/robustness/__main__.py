"""`python -m experiments.robustness`: see `experiments.robustness.command`."""

import sys

from experiments.robustness.command import main

sys.exit(main())
