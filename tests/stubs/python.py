"""A Python 3.12 that notes the arguments of stacking_jax in `argv` beside itself and runs nothing.

It ends with the code that the file `codes` there holds in its first line, which is then taken off.
"""

import json
import os
import shutil
import sys
from pathlib import Path

words = sys.argv[1:]
if words[:2] == ["-m", "venv"]:
    venv = Path(words[-1])
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").touch()
    shutil.copy(sys.argv[0], venv / "bin" / "python")
elif words[:2] == ["-m", "stacking_jax"]:
    here = Path(sys.argv[0]).parent
    known = {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
    with open(here / "argv", "a", encoding="utf-8") as notes:
        notes.write(json.dumps([words[2:], known]) + "\n")
    codes = here / "codes"
    if codes.exists():
        first, *rest = codes.read_text().split() or ["0"]
        codes.write_text("\n".join(rest))
        sys.exit(int(first))
elif "pip" in words and "-r" in words:
    print("pip:", *words)
elif words[:1] == ["-c"]:
    print("3.12")
