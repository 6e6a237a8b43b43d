# shellcheck shell=bash
# Sourced by demo.sh and speedrun.sh: runs stages one after the other, and says how to go on where one stops.
# The script that sources it sets: again (its own command line), total (seconds planned), stages (how many).

clock() {
  if (($1 >= 3600)); then printf '%d:%02d:%02d' $(($1 / 3600)) $(($1 / 60 % 60)) $(($1 % 60)); else printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); fi
}

# Says why the script ends early, and that nothing is lost.
stop() {
  # shellcheck disable=SC2154
  printf '\n%s\nWhat is done is kept. To go on from here:\n  %s\n' "$1" "$again" >&2
  exit "$2"
}

number=0
timings="" # a file, to which each finished stage adds its name and its seconds
# Runs a command as the next stage: its name, budget in seconds, what it does, the command.
stage() {
  local title=$1 budget=$2 does=$3 start=$SECONDS left status=0
  shift 3
  number=$((number + 1))
  # shellcheck disable=SC2154
  left="$(clock $((total - SECONDS))) of $(clock "$total") left"
  if ((SECONDS > total)); then left="$(clock $((SECONDS - total))) over the $(clock "$total") in all"; fi
  # shellcheck disable=SC2154
  printf '\n[%d/%d] %s: %s (budget %s; %s)\n' "$number" "$stages" "$title" "$does" "$(clock "$budget")" "$left"
  "$@" || status=$?
  if [[ -n $timings ]]; then printf '%s\t%d\n' "$title" $((SECONDS - start)) >>"$timings"; fi
  if ((status != 0)); then
    stop "Stage $number of $stages, $title, failed with exit status $status: its message is above." "$status"
  fi
  printf '[%d/%d] %s took %s\n' "$number" "$stages" "$title" "$(clock $((SECONDS - start)))"
}

# bash runs these once the stage at work has saved and ended; without them it would go on to the next stage.
trap 'stop "Interrupted." 130' INT
trap 'stop "Terminated." 143' TERM
