#!/usr/bin/env bash
# On a worker: installs what training on TPUs from a cache needs, pinned. No TensorFlow.
#
#   bash launch/setup_tpu.sh
#
# The images of TPU VMs come with Python 3.10, so that uv fetches 3.12 where no newer one is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(command -v python3.12 || command -v python3.11 || true)
if [[ -z "$python" ]]; then
  python3 -m pip install --quiet --user uv==0.13.9
  uv="$(python3 -m site --user-base)/bin/uv"
  "$uv" python install --quiet 3.12
  python=$("$uv" python find 3.12)
fi
PYTHON="$python" LISTS="train tpu_vm gcs" exec bash launch/setup.sh
