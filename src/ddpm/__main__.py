"""`python -m ddpm` is the command `ddpm`."""

import sys

from ddpm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
