#!/usr/bin/env bash
# Installs everything, pinned, into .venv at the root of the repository, or into the virtual
# environment that is active. Run again, it does nothing unless the requirements have changed.
#
#   bash launch/setup.sh
#   PYTHON=/path/to/python3.12 bash launch/setup.sh     # a Python of your choice for a new .venv
#   LISTS="train cuda" bash launch/setup.sh             # these lists of requirements/ alone
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "error: $*" >&2
  exit 1
}

# The version of a Python that runs and that we support ("3.12"); else nothing and a failure.
supported_version() {
  "$1" -c 'import sys
v = sys.version_info[:2]
print(*v, sep=".") if (3, 11) <= v <= (3, 13) else sys.exit(1)' 2>/dev/null
}

# 3.13 comes last: seqio needs editdistance, which has no ready-made build for it.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.12 python3.11 python3.13 python3 python; do
    # A name on the path need not run: pyenv's shims fail for versions that are not selected.
    if supported_version "$candidate" >/dev/null; then
      echo "$candidate"
      return
    fi
    [[ "$candidate" != "${PYTHON:-}" ]] || return 1
  done
  return 1
}

venv="${VIRTUAL_ENV:-$PWD/.venv}"
python="$venv/bin/python"
if [[ -n "${VIRTUAL_ENV:-}" ]]; then
  supported_version "$python" >/dev/null ||
    fail "the active environment $venv has no Python 3.11, 3.12 or 3.13; deactivate it first"
elif ! supported_version "$python" >/dev/null; then
  base=$(find_python) || {
    [[ -z "${PYTHON:-}" ]] || fail "PYTHON=$PYTHON does not run or is not Python 3.11, 3.12 or 3.13"
    fail "no Python 3.11, 3.12 or 3.13 found; install one, or name it: PYTHON=... bash launch/setup.sh"
  }
  [[ -e "$venv" && ! -e "$venv/pyvenv.cfg" ]] &&
    fail "$venv exists but is no virtual environment; move it away first"
  "$base" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$base cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"
  echo "Making $venv with $("$base" --version)"
  "$base" -m venv --clear "$venv" >/dev/null ||
    fail "$base -m venv $venv failed"
fi
"$python" -m pip --version >/dev/null 2>&1 || fail "$venv has no pip; run: $python -m ensurepip"

lists=()
for list in ${LISTS:-train data dev}; do
  lists+=("requirements/$list.txt")
done
# Done already? The stamp says for which lists, Python and checkout.
stamp="$venv/stacking_jax-setup"
state=$("$python" - "${lists[@]}" setup.py pyproject.toml launch/setup.sh <<'END'
import hashlib, os, sys
digest = hashlib.sha256(f"{sys.version} {os.getcwd()}".encode())
for name in sys.argv[1:]:
    digest.update(open(name, "rb").read())
print(digest.hexdigest())
END
)
if [[ -f "$stamp" && "$(<"$stamp")" == "$state" ]]; then
  exit 0
fi
rm -f "$stamp"

if [[ "$(supported_version "$python")" == 3.13 ]] && ! command -v "${CXX:-c++}" >/dev/null &&
  ! "$python" -c 'import editdistance' 2>/dev/null; then
  fail "on Python 3.13 the package editdistance needs a C++ compiler; install one, or Python 3.12"
fi

pip() {
  "$python" -m pip --disable-pip-version-check --quiet "$@"
}
# t5's own requirements, installed by someone else, would lie over the stable packages' files.
nightly=$("$python" - <<'END'
from importlib.metadata import distributions
names = {d.metadata["Name"].lower().replace("_", "-") for d in distributions()}
print(*sorted(names & {"seqio-nightly", "tfds-nightly"}))
END
)
if [[ -n "$nightly" ]]; then
  echo "Removing $nightly, which overwrites files of seqio and tensorflow-datasets"
  # shellcheck disable=SC2086  # one word per package
  pip uninstall --yes $nightly seqio tensorflow-datasets || fail "could not remove $nightly"
fi

echo "Installing the pinned packages into $venv (one to five minutes the first time)"
options=()
for list in "${lists[@]}"; do
  options+=(-r "$list")
done
pip install --no-deps --no-warn-script-location --progress-bar off "${options[@]}" ||
  fail "the packages could not be installed (see above); is there a network connection?"
# setuptools warns at length about editable installs of any kind.
PYTHONWARNINGS=ignore pip install --no-deps --no-build-isolation --editable . ||
  fail "stacking_jax itself could not be installed (see above)"
echo "$state" >"$stamp"
echo "Ready. To use it by hand: source $venv/bin/activate"
