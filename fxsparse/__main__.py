"""``python -m fxsparse``: the same as the command ``fxsparse``."""

import sys

from fxsparse.cli import main

sys.exit(main())
