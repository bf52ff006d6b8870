"""Entry point of ``python -m focuslens``, which runs the ``focuslens`` command."""

import sys

from focuslens.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
