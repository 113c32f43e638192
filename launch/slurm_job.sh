#!/usr/bin/env bash
# What SLURM runs on the first node of a job: see slurm.sh.
#
#   sbatch ... launch/slurm_job.sh LIMIT COMMAND...
set -euo pipefail
# SLURM runs a copy of this file, in the folder from which the job was submitted.
# shellcheck source=launch/common.sh
source launch/common.sh

limit="$1" code=0
shift
# Every task sees all GPUs of its node, and JAX gives it the one with its local number. Tasks that
# are still saving when another has ended are left to it.
srun --kill-on-bad-exit=0 --gpu-bind=none "$@" || code=$?
if goes_on "$code" && ((${SLURM_RESTART_COUNT:-0} < limit)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
