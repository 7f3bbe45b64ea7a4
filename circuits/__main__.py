"""`python -m circuits`: the command line."""

import sys

from circuits.cli import main

sys.exit(main())
