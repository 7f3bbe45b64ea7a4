"""`python -m circuits`: the command line."""

import sys

from qwen_circuits import main

sys.exit(main())
