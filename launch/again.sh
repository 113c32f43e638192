#!/usr/bin/env bash
# Runs a command, and again while it ends in a way that the same command goes on from: preempted
# (143), a lost peer (134), killed (137), stuck (75). Ends with its exit code otherwise, and after a signal
# to this script itself, which is handed on.
#
#   bash launch/again.sh [--limit 100] [--pause 30] stacking-jax train --gin_file ... --run_dir ...
# With -m, Ctrl-C reaches what runs here once, by `hand_on`, and not from the terminal as well.
set -euo pipefail -m
here="$PWD"
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$here"

limit=100 pause=30
while (($#)); do
  case "$1" in
    --limit) limit=$(value "$@"); shift 2 ;;
    --pause) pause=$(value "$@"); shift 2 ;;
    *) break ;;
  esac
done
(($#)) || fail "name a command"

child='' stopped=false
hand_on() {
  stopped=true
  [[ -z "$child" ]] || kill -s "$1" "$child" 2>/dev/null || true
}
trap 'hand_on TERM' TERM
trap 'hand_on INT' INT

# Runs a command as `child`, and puts its exit code into `code`.
attend() {
  "$@" &
  child=$!
  # `wait` comes back early, with a code above 128, when a signal is handed on.
  while :; do
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  child=''
}

for ((try = 1; ; try++)); do
  attend "$@"
  result=$code
  if "$stopped" || ! goes_on "$result" || ((try > limit)); then
    exit "$result"
  fi
  echo "exit code $result; the same command again in $pause s (try $try of $limit)" >&2
  attend sleep "$pause"
  ! "$stopped" || exit "$result"
done
