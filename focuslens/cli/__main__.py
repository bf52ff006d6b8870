"""``python -m focuslens.cli``: the command line."""

import sys

from focuslens.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
