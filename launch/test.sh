#!/usr/bin/env bash
# Sets up and runs all tests on the CPU; arguments go to pytest.
#
#   bash launch/test.sh
#   bash launch/test.sh -m 'not slow' tests/growth
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
python="${VIRTUAL_ENV:-$PWD/.venv}/bin/python"

# One process per core, as compiling takes most of the time; few, as each holds JAX and perhaps
# TensorFlow in memory. A file stays in one process, so that what it compiled is used again; in
# which order they come tests/conftest.py says.
exec "$python" -m pytest -q -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
  --durations 10 --durations-min 2 "$@"
