"""``python -m reslora_kernels``: the same as the command ``reslora``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
