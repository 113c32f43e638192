#!/usr/bin/env bash
# A run on GPUs under SLURM: one task per GPU, and the job queued again where it can go on.
#
#   bash launch/slurm.sh --nodes 4 --gpus_per_node 8 --time 24:00:00 -- train --gin_file ... --run_dir ...
#
# More: --name N, --partition P, --account A, --limit N (times that it is queued again), --dry_run.
# The checkout and the run directory must lie where all nodes see them.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name=stacking_jax nodes=1 gpus=8 time=24:00:00 limit=20 more=()
while (($#)); do
  case "$1" in
    --name) name=$(value "$@"); shift ;;
    --nodes) nodes=$(value "$@"); shift ;;
    --gpus_per_node) gpus=$(value "$@"); shift ;;
    --time) time=$(value "$@"); shift ;;
    --partition | --account) more+=("$1=$(value "$@")"); shift ;;
    --limit) limit=$(value "$@"); shift ;;
    --dry_run) dry_run=true ;;
    --) shift && break ;;
    *) fail "unknown option $1; options of stacking-jax come after --" ;;
  esac
  shift
done
stacking_jax "${VIRTUAL_ENV:-.venv}/bin/python" "$@"

run mkdir -p build/launch
# Three minutes before its time is up the tasks get SIGTERM: they save, and the job is queued again.
run sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" \
  --time="$time" ${more[@]+"${more[@]}"} --signal=TERM@180 --requeue --open-mode=append \
  --output=build/launch/%x-%j.log launch/slurm_job.sh "$limit" "${command[@]}"
