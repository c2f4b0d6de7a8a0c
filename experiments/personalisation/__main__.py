"""`python -m experiments.personalisation`: see `experiments.personalisation.command`."""

import sys

from experiments.personalisation.command import main

sys.exit(main())
