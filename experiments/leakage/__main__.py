"""`python -m experiments.leakage`: see `experiments.leakage.command`."""

import sys

from experiments.leakage.command import main

sys.exit(main())
