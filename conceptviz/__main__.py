"""`python -m conceptviz` is the command line."""

import sys

from conceptviz.cli import main

sys.exit(main())
