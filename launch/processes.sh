#!/usr/bin/env bash
# Several processes on this machine that work as one job, as hosts of a pod do: a rehearsal.
#
#   bash launch/processes.sh --processes 2 --devices 4 -- train --gin_file ... --run_dir runs/mine
#
# Each process has as many CPU devices as --devices says. More: --port P, --dry_run.
# With -m, Ctrl-C reaches what runs here once, by `hand_on`, and not from the terminal as well.
set -euo pipefail -m
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

processes=2 devices=4 port=12321
while (($#)); do
  case "$1" in
    --processes) processes=$(value "$@"); shift ;;
    --devices) devices=$(value "$@"); shift ;;
    --port) port=$(value "$@"); shift ;;
    --dry_run) dry_run=true ;;
    --) shift && break ;;
    *) fail "unknown option $1; options of stacking-jax come after --" ;;
  esac
  shift
done
[[ $# -gt 0 && "$1" != -* ]] || fail "name a command of stacking-jax after --, such as: -- train ..."
verb="$1" && shift

pids=()
# shellcheck disable=SC2317,SC2329  # the traps call it
hand_on() {
  kill -s "$1" "${pids[@]}" 2>/dev/null || true
}
trap 'hand_on TERM' TERM
trap 'hand_on INT' INT

for ((process = 0; process < processes; process++)); do
  command=(env JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices"
    "${VIRTUAL_ENV:-.venv}/bin/python" -m stacking_jax "$verb" --coordinator "127.0.0.1:$port"
    --num_processes "$processes" --process_id "$process" "$@")
  if "$dry_run"; then
    echo "$(quote "${command[@]}") &"
  else
    "${command[@]}" &
    pids+=($!)
  fi
done
if "$dry_run"; then
  echo wait
  exit
fi

# The exit code of the first process, in order, that did not end well.
result=0
for pid in "${pids[@]}"; do
  while :; do
    code=0
    wait "$pid" || code=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  ((result != 0)) || result=$code
done
exit "$result"
