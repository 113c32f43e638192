"""Notes what it was asked."""

import os
import sys
from pathlib import Path

with open(Path(os.environ["CLOUD"]) / "calls", "a", encoding="utf-8") as calls:
    calls.write("scontrol " + " ".join(sys.argv[1:]) + "\n")
