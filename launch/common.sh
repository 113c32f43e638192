# shellcheck shell=bash
# What the launch scripts share; they source it. It goes to the root of the repository.
#
# A launch script takes options of its own, then `--`, then a command of `stacking-jax` with all its
# arguments, which reach the workers as they are. `--dry_run` prints every command on a line of its
# own, quoted so that it can be pasted into bash, and runs none.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

dry_run=false
# Commands that begin with all processes of a job together, by `--distributed auto`.
together=" train evaluate finetune generate diagnose select lag-study distill-cache "

# Ends with the code for what the user can put right, as the command line does.
fail() {
  echo "error: $*" >&2
  exit 2
}

# The value of an option: `name=$(value "$@")`.
value() {
  (($# > 1)) || fail "$1 needs a value"
  printf '%s' "$2"
}

# One line that bash reads as exactly these words.
quote() {
  local LC_ALL=C word line='' tick="'" escaped="'\\''"
  for word in "$@"; do
    case "$word" in
      *[[:cntrl:]]*)
        printf -v word '%q' "$word"
        # An interactive bash would look a `!` up in its history here.
        word=${word//!/\\x21}
        ;;
      '' | *[!A-Za-z0-9_@%+=:,./-]*)
        word=${word//$tick/$escaped}
        word="'$word'"
        ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s' "$line"
}

# Runs a command, or with --dry_run prints it.
run() {
  if "$dry_run"; then
    printf '%s\n' "$(quote "$@")"
  else
    "$@"
  fi
}

# The same with a text as standard input.
run_with_input() {
  local input="$1"
  shift
  if "$dry_run"; then
    printf '%s <<<%s\n' "$(quote "$@")" "$(quote "$input")"
  else
    "$@" <<<"$input"
  fi
}

# Puts into `command` what runs a command of stacking-jax with the Python $1 as one of a job.
stacking_jax() {
  local python="$1" verb="${2:-}"
  case "$verb" in
    '' | -*) fail "name a command of stacking-jax after --, such as: -- train --gin_file ..." ;;
  esac
  shift 2
  command=("$python" -m stacking_jax "$verb")
  # A user who says how the processes find each other is left alone.
  if [[ "$together" == *" $verb "* && " $* " != *" --distributed"* ]]; then
    command+=(--distributed auto)
  fi
  command+=("$@")
}

# Whether `stacking-jax` ended with the code $1 in a way that the same command goes on from:
# 143 preempted, everything saved; 134 a peer was lost; 137 killed; 75 stuck, and ended by its
# own watchdog, or other hosts were not there yet. See docs/surviving.md.
goes_on() {
  case "$1" in
    75 | 134 | 137 | 143) return 0 ;;
    *) return 1 ;;
  esac
}
