"""`python -m qwen_circuits`: the command line, whatever has become of the name `circuits`."""

import sys

from qwen_circuits import main

sys.exit(main())
