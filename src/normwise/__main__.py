"""``python -m normwise``."""

import sys

from normwise.cli import main

sys.exit(main())
