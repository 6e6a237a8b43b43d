#!/usr/bin/env bash
# The GPT-2-grade recipe, from a blank GPU node or TPU VM to a chat: 24 layers on ClimbMix, then SmolTalk, MMLU and GSM8K.
#
#   bash train/speedrun.sh [--plan] [--scale S] [--run NAME] [--out DIR] [option of train.speedrun …]
#
#   --plan       only print the stages with their tokens, hours and cost on this machine and on some known ones
#   --scale S    shrink every stage: 1 is the recipe, 0.00001 a rehearsal of minutes
#   --run NAME   name of the run (speedrun)
#   --out DIR    folder that holds the runs (runs)
#
# More options (--source, --mix, --tasks, --bundle, --depth, --dollars-per-hour …): python -m train.speedrun --help
# Run again, it goes on where it stopped and leaves alone what is done.
set -euo pipefail

again="bash$(printf ' %q' "${BASH_SOURCE[0]}" "$@")"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
plan=false
options=(--out "$PWD/runs") # what comes behind it wins
while (($# > 0)); do
  case $1 in
    --plan) plan=true ;;
    -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit ;;
    --out=* | --bundle=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
    --out | --bundle)
      if [[ -z ${2:-} ]]; then echo "$1 needs a value" >&2; exit 2; fi
      if [[ $2 != /* ]]; then set -- "$1" "$PWD/$2" "${@:3}"; fi # as seen from where the user stands, not from the root
      options+=("$1" "$2")
      shift ;;
    *) options+=("$1") ;;
  esac
  shift
done
cd "$root"
python=.venv/bin/python
total=120 stages=1
# shellcheck source=train/stages.sh
source train/stages.sh

if $plan; then
  if [[ ! -x $python ]]; then bash train/setup.sh; fi
  exec "$python" -m train.speedrun "${options[@]}"
fi
stage setup 120 "Python and the pinned requirements, in .venv" bash train/setup.sh
list=$("$python" -m train.speedrun "${options[@]}" --print-stages) || exit
mapfile -t lines <<<"$list"
read -r total stages run <<<"${lines[0]}"
mkdir -p "$run"
timings=$run/timings.tsv
for line in "${lines[@]:1}"; do
  IFS=$'\t' read -r name seconds does command <<<"$line"
  arguments=()
  eval "arguments=($command)" # quoted for a shell by train.speedrun
  stage "$name" "$seconds" "$does" "$python" -m "${arguments[@]}"
done
