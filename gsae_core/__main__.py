"""`python -m gsae_core`."""

import sys

from gsae_core.cli import main

sys.exit(main())
