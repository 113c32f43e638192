#!/usr/bin/env bash
# The main job, a few minutes on two CPU cores: pretrains a small byte-level decoder three times on
# the Python standard library's own source, and compares the runs.
#
#   bash launch/local.sh
#   RUNS=runs/mine bash launch/local.sh --gin.TEXT_DIR='"my/texts"'    # arguments go to all runs
#
# A run that was stopped goes on when this is started again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
python="${VIRTUAL_ENV:-$PWD/.venv}/bin/python"
runs="${RUNS:-runs/demo}"
midas=(--gin_file gin/experiments/demo.gin)
full_depth=("${midas[@]}" --gin_file gin/growth/baseline.gin)

# How long full depth may train for the FLOPs of the MIDAS run. It is a run of its own, with its
# own schedule decayed to its end: reading a longer one early would be an unfair opponent.
plan=$("$python" -m stacking_jax plan "${midas[@]}" "$@" --json)
equal_flops_steps=$("$python" -c '
import json, sys
plan = json.load(sys.stdin)
print(max(1, round(plan["total_steps"] / plan["speedup_model"])))' <<<"$plan")

"$python" -m stacking_jax plan "${midas[@]}" "$@"

echo "1/3  MIDAS, PROP-2"
"$python" -m stacking_jax train "${midas[@]}" "$@" --run_dir "$runs/midas_prop2"
echo "2/3  full depth, the same number of steps"
"$python" -m stacking_jax train "${full_depth[@]}" "$@" --run_dir "$runs/full_depth_same_steps"
echo "3/3  full depth, the FLOPs of the MIDAS run: $equal_flops_steps steps"
"$python" -m stacking_jax train "${full_depth[@]}" "$@" \
  "--gin.TRAIN_STEPS=$equal_flops_steps" --run_dir "$runs/full_depth_same_flops"

"$python" -m stacking_jax compare "$runs/midas_prop2" "$runs/full_depth_same_steps" \
  "$runs/full_depth_same_flops" --out "$runs/report.html"
