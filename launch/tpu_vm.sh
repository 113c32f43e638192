#!/usr/bin/env bash
# A run on Cloud TPU VMs, which queued resources bring: one slice, or several over DCN.
#
#   tpu="bash launch/tpu_vm.sh"   what="--name mine --zone us-east5-a --accelerator v5p-256"
#   $tpu create  $what [--slices 2] [--spot | --reserved]   # ask for the machines
#   $tpu wait    $what            # until they are there
#   $tpu copy    $what            # this checkout to all workers
#   $tpu install $what            # what it needs
#   $tpu run     $what -- train --gin_file ... --run_dir gs://BUCKET/runs/mine
#   $tpu logs    $what            # of the first worker, to the end of the run
#   $tpu stop    $what            # all save and end
#   $tpu resume  $what -- train ...   # all of this, and again after every preemption
#   $tpu delete  $what
#
# More options: --project P, --runtime VERSION, --pause SECONDS and --limit N (of `resume`),
# --dry_run. Who may do this is gcloud's business; nothing here reads a credential.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action="${1:-}"
(($# == 0)) || shift
name='' zone='' accelerator='' runtime='' slices=1 tier=() where=() pause=60 limit=20
while (($#)); do
  case "$1" in
    --name) name=$(value "$@"); shift ;;
    --zone) zone=$(value "$@"); shift ;;
    --project) where=(--project="$(value "$@")"); shift ;;
    --accelerator) accelerator=$(value "$@"); shift ;;
    --runtime) runtime=$(value "$@"); shift ;;
    --slices) slices=$(value "$@"); shift ;;
    --spot | --reserved) tier=("$1") ;;
    --pause) pause=$(value "$@"); shift ;;
    --limit) limit=$(value "$@"); shift ;;
    --dry_run) dry_run=true ;;
    --) shift && break ;;
    *) fail "unknown option $1; options of stacking-jax come after --" ;;
  esac
  shift
done
[[ -n "$name" && -n "$zone" ]] || fail "name the machines: --name NAME --zone ZONE"
where=(--zone="$zone" ${where[@]+"${where[@]}"})
nodes=("$name")
if ((slices > 1)); then
  nodes=()
  for ((slice = 0; slice < slices; slice++)); do nodes+=("$name-$slice"); done
fi

create() {
  [[ -n "$accelerator" ]] || fail "say which: --accelerator v5p-256, v6e-256, v5litepod-256 or v4-256"
  case "${runtime:-$accelerator}" in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v4-*) runtime=tpu-ubuntu2204-base ;;
    *) [[ -n "$runtime" ]] || fail "no runtime is known for $accelerator; name one: --runtime" ;;
  esac
  local count=(--node-id="$name")
  ((slices == 1)) || count=(--node-count="$slices" --node-prefix="$name")
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" "${count[@]}" \
    --accelerator-type="$accelerator" --runtime-version="$runtime" ${tier[@]+"${tier[@]}"}
}

# ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...
state() {
  run gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'
}

wait_for_machines() {
  local now
  while :; do
    if "$dry_run"; then
      state
      return
    fi
    now=$(state)
    case "$now" in
      ACTIVE) return ;;
      FAILED | SUSPEND* | DELETING) fail "$name is $now; delete it and create it again" ;;
    esac
    echo "$name: $now" >&2
    sleep "$pause"
  done
}

# A command line of the workers' shell, on all of them.
on_workers() {
  local node
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --command="$1"
  done
}

copy() {
  local node archive=build/launch/stacking_jax.tar.gz
  run mkdir -p build/launch
  run tar --exclude=./.git --exclude=./.venv --exclude=./build --exclude=./runs -czf "$archive" .
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm scp "$archive" "$node:" "${where[@]}" --worker=all
  done
  on_workers 'mkdir -p stacking_jax && tar -xzf stacking_jax.tar.gz -C stacking_jax'
}

install() {
  on_workers 'cd stacking_jax && bash launch/setup_tpu.sh'
}

start() {
  stacking_jax .venv/bin/python "$@"
  on_workers "cd stacking_jax && $(quote bash launch/background.sh start "${command[@]}")"
}

logs() {
  run gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${where[@]}" --worker=0 \
    --command='cd stacking_jax && bash launch/background.sh follow'
}

delete() {
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

begin() {
  create
  wait_for_machines
  copy
  install
  start "$@"
}

# Follows the run, and brings it up again on new machines when they have been taken away.
resume() {
  local try code now
  if "$dry_run"; then
    state
    delete
    begin "$@"
    logs
    return
  fi
  stacking_jax .venv/bin/python "$@"  # A mistake shows before anything is asked for.
  for ((try = 0; try <= limit; try++)); do
    now=$(state 2>/dev/null || echo absent)
    case "$now" in
      ACTIVE) ;;
      absent) begin "$@" ;;
      SUSPEND* | FAILED | DELETING)
        echo "$name is $now; asking for new machines" >&2
        delete
        begin "$@"
        ;;
      *)
        wait_for_machines
        copy
        install
        start "$@"
        ;;
    esac
    code=0
    logs || code=$?
    case "$code" in
      0 | 2 | 130) exit "$code" ;;
      # Workers on which it runs refuse.
      3) start "$@" || true ;;
    esac
    echo "the run, or the connection to it, ended with code $code; looking again in $pause s" >&2
    sleep "$pause"
  done
  fail "gave up after $limit tries; run the same command again to go on"
}

case "$action" in
  create | copy | install | logs | delete) "$action" ;;
  wait) wait_for_machines ;;
  run) start "$@" ;;
  stop) on_workers 'cd stacking_jax && bash launch/background.sh stop' ;;
  resume) resume "$@" ;;
  *) fail "name what to do: create, wait, copy, install, run, logs, stop, resume or delete" ;;
esac
