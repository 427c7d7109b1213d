"""`python -m lapkit` is the command `lapkit`."""

import sys

from lapkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
