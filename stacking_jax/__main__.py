"""`python -m stacking_jax` is the same as the command `stacking-jax`."""

from __future__ import annotations

import sys

from stacking_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
