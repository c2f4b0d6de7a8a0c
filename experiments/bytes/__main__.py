"""`python -m experiments.bytes`: see `experiments.bytes.command`."""

import sys

from experiments.bytes.command import main

sys.exit(main())
