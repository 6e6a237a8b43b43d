#!/usr/bin/env bash
# Checks everything from a clean clone on: set-up, linters, types, tests, and rehearsals of the demo and the speedrun.
#
#   bash tests/run.sh [--no-demo] [pytest arguments …]
#
#   --no-demo   leave the rehearsals (train/demo.sh --quick, tests/rehearsal.py) out
#
# Tests that need a GPU, a TPU or torch, or many minutes, are left out; `-m gpu`, `-m slow` and the like choose them.
# Those of the page need a Chromium, which root gets from apt; with CI=true they fail without one.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
demo=true
pytest_args=()
for argument in "$@"; do
  case $argument in
    --no-demo) demo=false ;;
    -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit ;;
    *) pytest_args+=("$argument") ;;
  esac
done

bash train/setup.sh --dev || exit
bash train/setup.sh --preflight || echo "without libtpu: the tests that compile for TPUs are skipped" >&2
python=.venv/bin/python

if [[ -z $(type -P chromium chromium-browser google-chrome) ]]; then
  if [[ $(id -u) == 0 ]] && type -P apt-get >/dev/null; then
    echo "installing chromium, for the tests of the page"
    apt-get update -qq && apt-get install -qq --yes --no-install-recommends chromium >/dev/null
  fi
  type -P chromium >/dev/null || echo "There is no chromium on the PATH. Unless playwright has one of \
its own, the tests of the page are left out: apt-get install chromium, or $python -m playwright install chromium" >&2
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu)
workers=$((cores < 8 ? cores : 8))
summary=""
failures=0

# Runs a command, goes on if it fails, and remembers how it went.
check() {
  local name=$1 start=$SECONDS verdict=passed
  shift
  printf '\n=== %s\n' "$name"
  "$@" || { verdict="FAILED ($?)"; failures=$((failures + 1)); }
  summary+=$(printf '  %-12s %5d s  %s' "$name" $((SECONDS - start)) "$verdict")$'\n'
}

check shellcheck .venv/bin/shellcheck train/*.sh tests/*.sh .ci/run
check ruff "$python" -m ruff check
check format "$python" -m ruff format --check
check mypy "$python" -m mypy
check docs env NO_MKDOCS_2_WARNING=1 "$python" -m mkdocs build --strict -q -f .ci/mkdocs.yml -d "$scratch/site"
check pytest "$python" -m pytest -n "$workers" -m "not gpu and not tpu and not torch and not slow" ${pytest_args[@]+"${pytest_args[@]}"}
if $demo; then check demo bash train/demo.sh --quick --out "$scratch"; fi
if $demo; then check speedrun "$python" -m tests.rehearsal "$scratch/speedrun"; fi

printf '\n=== summary\n%s' "$summary"
if ((failures > 0)); then
  echo "$failures of the checks above failed"
  exit 1
fi
echo "everything passed in $SECONDS s"
