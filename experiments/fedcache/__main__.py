"""`python -m experiments.fedcache`: see `experiments.fedcache.command`."""

import sys

from experiments.fedcache.command import main

sys.exit(main())
