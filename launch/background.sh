#!/usr/bin/env bash
# A run on this machine that outlives the connection by which it was started. One at a time; its
# log, process id and exit code lie in build/launch.
#
#   bash launch/background.sh start stacking-jax train ...   # again where it goes on: see again.sh
#   bash launch/background.sh follow     # prints the log to the end of the run; its exit code, or
#                                        # 3: not started, or the machine itself was
#   bash launch/background.sh stop       # SIGTERM: the run saves and ends
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

log=build/launch/log pid=build/launch/pid code=build/launch/code
alive() {
  [[ -s "$pid" ]] && kill -0 "$(<"$pid")" 2>/dev/null
}

case "${1:-}" in
  start)
    shift
    ! alive || fail "a run is under way here; stop it first: bash launch/background.sh stop"
    mkdir -p build/launch
    rm -f "$pid" "$code"
    # shellcheck disable=SC2016  # it is the inner bash that reads these
    setsid nohup bash -c 'bash launch/again.sh "$@" & echo $! >build/launch/pid
      result=0; wait $! || result=$?; echo $result >build/launch/code' - "$@" \
      >>"$log" 2>&1 </dev/null &
    until [[ -s "$pid" ]]; do sleep 0.1; done
    ;;
  follow)
    if [[ ! -s "$pid" ]]; then
      echo "nothing was started here" >&2
      exit 3
    fi
    tail -n +1 --pid="$(<"$pid")" -F "$log" 2>/dev/null
    # The code comes right after the end, and never if the machine was restarted meanwhile.
    for _ in {1..50}; do
      [[ ! -s "$code" ]] || exit "$(<"$code")"
      sleep 0.1
    done
    exit 3
    ;;
  stop)
    ! alive || kill "$(<"$pid")"
    ;;
  *) fail "start, follow or stop" ;;
esac
