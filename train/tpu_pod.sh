#!/usr/bin/env bash
# A run on Cloud TPU slices, from your own machine: get them, install, run on all workers, watch, give them back.
#
#   bash train/tpu_pod.sh [options] create            ask for the slices, and wait for them
#   bash train/tpu_pod.sh [options] install           copy this checkout (what git has committed) to all workers, set it up
#   bash train/tpu_pod.sh [options] run COMMAND …     start it on all workers, as in: run train.pretrain --data gs://…
#   bash train/tpu_pod.sh [options] logs              follow the first worker's output
#   bash train/tpu_pod.sh [options] status            state of the slices and of the run
#   bash train/tpu_pod.sh [options] stop              have the run save a checkpoint and end (end keep first: it would start it again)
#   bash train/tpu_pod.sh [options] keep COMMAND …    all of it: create, install, run; again after each preemption, to its end
#   bash train/tpu_pod.sh [options] delete            give the slices back: they cost money until then
#
#   --name NAME      of the slices; default nanochat
#   --type TYPE      accelerator, such as v5p-128 (train.preflight says which); needed by create and keep
#   --slices N       so many slices of this type; default 1
#   --spot           cheaper, and taken away at any time
#   --zone ZONE      default: that of gcloud
#   --project NAME   default: that of gcloud
#   --bucket gs://…  keeps compiled programs there, so that only a first start compiles
#   --dry-run        print the commands, run none
#
# COMMAND is a module with its flags. It should read and write in a bucket (--data gs://…, --run.out gs://…): a slice's
# disks go with it. Needs the Google Cloud CLI, logged in.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name=nanochat type="" slices=1 zone="" project="" bucket="" spot=false dry_run=false
poll_seconds=${POLL_SECONDS:-30}

say() { echo "tpu_pod: $*" >&2; }
fail() {
  say "$*"
  exit 2
}

# Runs a command, or prints it.
do_it() {
  if $dry_run; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# gcloud compute tpus …, in the right place.
tpus() {
  local where=()
  if [[ -n $zone ]]; then where+=("--zone=$zone"); fi
  if [[ -n $project ]]; then where+=("--project=$project"); fi
  do_it gcloud compute tpus "$@" "${where[@]}"
}

# Names of the slices.
nodes() {
  local i
  if ((slices == 1)); then
    echo "$name"
    return
  fi
  for ((i = 0; i < slices; i++)); do echo "$name-$i"; done
}

# Runs a command line on all workers of all slices; its parts are joined by spaces.
everywhere() {
  local node
  for node in $(nodes); do
    tpus tpu-vm ssh "$node" --worker=all --batch-size=all "--command=$*" || return
  done
}

# The image that each generation boots.
runtime_version() {
  case $type in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    "") fail "--type is needed, such as --type v5p-128" ;;
    *) fail "--type $type is not known; known are v4-N, v5litepod-N, v5p-N and v6e-N" ;;
  esac
}

# One of gcloud's states, such as ACTIVE; NONE where there is nothing of this name.
state() {
  if $dry_run; then
    tpus queued-resources describe "$name" "--format=value(state.state)" >&2
    echo ACTIVE
  else
    tpus queued-resources describe "$name" "--format=value(state.state)" 2>/dev/null || echo NONE
  fi
}

# Of each slice, such as READY or PREEMPTED.
node_states() {
  local node
  for node in $(nodes); do tpus tpu-vm describe "$node" "--format=value(state)" || true; done
}

create() {
  local version request=() now before=""
  version=$(runtime_version) || exit
  request=("$name" "--accelerator-type=$type" "--runtime-version=$version")
  if ((slices == 1)); then request+=("--node-id=$name"); else request+=("--node-count=$slices" "--node-prefix=$name"); fi
  if $spot; then request+=(--spot); fi
  tpus queued-resources create "${request[@]}" || return
  while :; do
    now=$(state)
    if [[ $now != "$before" ]]; then say "$name: $now"; fi
    before=$now
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | NONE)
        say "the request for $name came to nothing; look at: gcloud compute tpus queued-resources describe $name"
        return 1
        ;;
    esac
    sleep "$poll_seconds"
  done
}

install() {
  local folder node
  folder=$(mktemp -d)
  git -C "$root" archive --format=tar.gz --output="$folder/nanochat-jax.tar.gz" HEAD
  for node in $(nodes); do
    tpus tpu-vm scp "$folder/nanochat-jax.tar.gz" "$node:" --worker=all || return
  done
  rm -r "$folder"
  # The images have Python 3.10; uv brings a newer one, which setup.sh finds.
  everywhere 'mkdir -p nanochat-jax && tar -xzf nanochat-jax.tar.gz -C nanochat-jax && cd nanochat-jax &&' \
    '{ command -v python3.12 || ls ~/.local/share/uv/python/*3.12* ||' \
    '{ curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv python install 3.12; }; } >/dev/null 2>&1;' \
    'JAX_PLATFORM_EXTRA=tpu bash train/setup.sh'
}

run() {
  local command
  if (($# == 0)); then fail "run what? For example: run train.pretrain --data gs://… --run.out gs://…"; fi
  command="python -m$(printf ' %q' "$@")"
  if [[ -n $bucket ]]; then command="env JAX_COMPILATION_CACHE_DIR=$(printf '%q' "$bucket/xla") $command"; fi
  # The exit status is left in a file, for status and keep.
  # shellcheck disable=SC2016 # the worker is to expand these
  everywhere 'cd nanochat-jax && if [ -f run.pid ] && kill -0 $(cat run.pid) 2>/dev/null; then' \
    'echo "a run is under way; stop it first" >&2; exit 3; fi; rm -f run.exit; . .venv/bin/activate;' \
    "setsid nohup bash -c $(printf '%q' "$command; echo \$? >run.exit")" '>run.log 2>&1 </dev/null & echo $! >run.pid'
}

logs() { tpus tpu-vm ssh "$(nodes | sed -n 1p)" --worker=0 "--command=tail -n 100 -F nanochat-jax/run.log"; }

# On the first worker: how the run ended, or "running", or "none".
run_status() {
  # shellcheck disable=SC2016 # the worker is to expand these
  local question='cd nanochat-jax 2>/dev/null || { echo none; exit; }; if [ -f run.exit ]; then cat run.exit;'
  # shellcheck disable=SC2016
  question+=' elif [ -f run.pid ] && kill -0 $(cat run.pid); then echo running; else echo none; fi'
  tpus tpu-vm ssh "$(nodes | sed -n 1p)" --worker=0 "--command=$question"
}

# shellcheck disable=SC2016 # the worker is to expand these
stop() { everywhere 'pkill -TERM -s $(cat nanochat-jax/run.pid) -f "^python -m"'; }

delete() { tpus queued-resources delete "$name" --force --quiet; }

# Gets slices where there are none, or none any more, and a run where there is none; until the run has ended.
keep() {
  local now ended failures=0
  if (($# == 0)); then fail "keep what? For example: keep train.pretrain --data gs://… --run.out gs://…"; fi
  runtime_version >/dev/null || exit
  while :; do
    now=$(state)
    case $now in
      ACTIVE)
        if ! ended=$(run_status); then # preempted slices are said to be active for a while
          say "the first worker does not answer"
          if [[ $(node_states) == *PREEMPTED* ]]; then delete || true; else sleep "$poll_seconds"; fi
          continue
        fi
        if $dry_run; then
          printf '%s\n' "$ended"
          ended=none
        fi
        case $ended in
          running) sleep "$poll_seconds" ;;
          none)
            { install && run "$@"; } || say "could not start; trying again"
            if $dry_run; then return; fi
            ;;
          0)
            say "the run has ended well; bash train/tpu_pod.sh --name $name delete gives the slices back"
            return
            ;;
          143) # SIGTERM, as before maintenance: it has saved a checkpoint
            say "the run was told to end; once more"
            run "$@" || true
            ;;
          *)
            failures=$((failures + 1))
            if ((failures > 3)); then fail "the run has failed ${failures} times, last with status $ended; see: logs"; fi
            say "the run has ended with status $ended; once more"
            run "$@" || true
            ;;
        esac
        ;;
      NONE) create || sleep "$poll_seconds" ;;
      FAILED | SUSPENDED)
        say "$name is $now: asking anew"
        delete || true
        ;;
      *) sleep "$poll_seconds" ;;
    esac
  done
}

main() {
  while (($# > 0)); do
    case $1 in
      --name | --type | --slices | --zone | --project | --bucket)
        if (($# < 2)); then fail "$1 needs a value"; fi
        printf -v "${1#--}" '%s' "$2"
        shift
        ;;
      --spot) spot=true ;;
      --dry-run) dry_run=true ;;
      -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; return ;;
      -*) fail "unknown option $1; bash train/tpu_pod.sh --help lists them" ;;
      *) break ;;
    esac
    shift
  done
  if [[ ! $slices =~ ^[1-9][0-9]*$ ]]; then fail "--slices $slices must be a number from 1 on"; fi
  if [[ -n $bucket && $bucket != gs://* ]]; then fail "--bucket $bucket must begin with gs://"; fi
  case ${1:-} in
    create | install | run | logs | status | stop | keep | delete) ;;
    "") fail "what to do? bash train/tpu_pod.sh --help lists it" ;;
    *) fail "unknown command $1; bash train/tpu_pod.sh --help lists them" ;;
  esac
  $dry_run || command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
  if [[ $1 == status ]]; then
    state
    run_status
  else
    "$@"
  fi
}

main "$@"
