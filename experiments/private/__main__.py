"""`python -m experiments.private`: see `experiments.private.command`."""

import sys

from experiments.private.command import main

sys.exit(main())
