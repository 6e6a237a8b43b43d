#!/usr/bin/env bash
# Makes .venv in the repository root and installs the pinned requirements. Run again, it takes a moment.
#
#   bash train/setup.sh [--dev] [--preflight] [--dry-run]
#
#   --dev         install what the tests need, too (requirements-dev.txt)
#   --preflight   install the compiler for TPUs, too (requirements-tpu.txt, 0.7 GB), for train.preflight
#   --dry-run     only say which Python and which jax would be used
#
#   PYTHON=python3.13            make .venv with this interpreter
#   JAX_PLATFORM_EXTRA=cuda12    install this jax (cpu, cuda12, cuda13 or tpu) instead of the one that fits the machine
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
# 3.12 first: everywhere the same version. grain 0.2.18 has no wheels for 3.15.
versions=(3.12 3.13 3.14)

# Prints the version and succeeds, or says why this interpreter will not do. Its arguments are the versions that fit.
# Must parse under any Python, 2.7 too.
probe='
import sys, sysconfig
version = "%d.%d.%d" % sys.version_info[:3]
if "%d.%d" % sys.version_info[:2] not in sys.argv[1:]:
    sys.exit(version + " is not one of " + ", ".join(sys.argv[1:]))
if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit(version + " is PyPy or free-threaded: jax has no wheels for it")
lacks = []
for module in ("ctypes", "ensurepip", "lzma", "ssl", "venv"):
    try:
        __import__(module)
    except ImportError:
        lacks.append(module)
if lacks:
    sys.exit(version + " lacks the modules: " + ", ".join(lacks))
print(version)'

say() { printf 'setup: %s\n' "$*"; }

fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

# Interpreters that may exist, one a line, best first. -a, because a real one may stand behind a broken pyenv shim.
candidates() {
  local version home=${HOME:-/nonexistent} base
  for version in "${versions[@]}"; do type -aP "python$version" || true; done
  type -aP python3 python || true
  for version in "${versions[@]}"; do
    ls -d "${PYENV_ROOT:-$home/.pyenv}/versions/$version"*/bin/python 2>/dev/null || true
    ls -d "$home/.local/share/uv/python/cpython-$version"*/bin/python3 2>/dev/null || true
  done
  if base=$(conda info --base 2>/dev/null); then echo "$base/bin/python"; fi
  ls -d "$home"/{miniconda3,miniforge3,anaconda3}/bin/python 2>/dev/null || true
}

# Sets python and python_version to the first interpreter that fits, or ends with the list of what was tried.
find_python() {
  local candidate answer tried=""
  while IFS= read -r candidate; do
    if [[ -z $candidate || $candidate == "$venv"/* || $tried == *"  $candidate: "* ]]; then continue; fi
    if answer=$("$candidate" -E -c "$probe" "${versions[@]}" 2>&1 </dev/null); then
      python=$candidate
      python_version=${answer##*$'\n'}
      return
    fi
    tried+="  $candidate: ${answer%%$'\n'*}"$'\n'
  done <<<"${PYTHON:-$(candidates)}"
  fail "no fitting Python: this needs CPython (one of ${versions[*]}) with venv and pip. Tried:
${tried:-  nothing: there is no python on the PATH, under pyenv, uv or conda
}Install one and run this again, or name one with PYTHON=/path/to/python3.12. For example:
  Debian, Ubuntu   apt-get install python3.12 python3.12-venv   (if only ensurepip is lacking, the second is enough)
  Fedora           dnf install python3.12
  macOS            brew install python@3.12
  anywhere         pyenv install 3.12, or uv python install 3.12, or conda create -n py312 python=3.12 and activate it"
}

# Prints cuda12 or cuda13, or fails where there is no NVIDIA GPU that jax can use.
detect_cuda() {
  local gpu driver capability
  gpu=$(nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null) ||
    gpu=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || return 1
  IFS=', ' read -r driver capability <<<"$gpu"
  driver=${driver%%.*}
  capability=${capability//[!0-9]/}
  if [[ ! $driver =~ ^[0-9]+$ ]]; then return 1; fi
  if ((driver < 525)); then
    say "the NVIDIA driver is $driver, and jax needs 525 or newer: the GPU will not be used" >&2
    return 1
  fi
  # CUDA 13 has dropped the GPUs before Turing (compute capability 7.5), which driver 580 still serves.
  if ((driver >= 580 && ${capability:-75} >= 75)); then echo cuda13; else echo cuda12; fi
}

# TPU chips are known by their PCI ids, as jax itself knows them; containers may have only the environment.
detect_tpu() {
  [[ ${PJRT_DEVICE:-} == TPU || -n ${TPU_ACCELERATOR_TYPE:-} || -n ${TPU_WORKER_HOSTNAMES:-} ]] ||
    grep -qsiE '^PCI_ID=1AE0:(0027|005E|006[23F]|0076|007C|0083)$' /sys/bus/pci/devices/*/uevent
}

# Prints jax's extra. Without an accelerator in sight, what .venv holds ($1) stays: jax for a GPU or TPU runs on
# a CPU as well, and a login node must not throw away what the compute nodes need.
choose_extra() {
  case ${JAX_PLATFORM_EXTRA:-} in
    cpu | cuda12 | cuda13 | tpu) echo "$JAX_PLATFORM_EXTRA" ;;
    "") detect_cuda || { if detect_tpu; then echo tpu; else echo "${1:-cpu}"; fi; } ;;
    *) fail "JAX_PLATFORM_EXTRA=$JAX_PLATFORM_EXTRA is not one of cpu, cuda12, cuda13, tpu" ;;
  esac
}

# Makes .venv unless there is a good one that fits $PYTHON and the extra. Sets version.
make_venv() {
  local reason=""
  if [[ ! -e $venv ]]; then
    reason="there is none yet"
  elif ! version=$("$venv/bin/python" -E -c "$probe"$'\nimport pip' "${versions[@]}" 2>/dev/null); then
    reason="the present one does not work"
  elif [[ -n ${PYTHON:-} ]] && find_python && [[ $python_version != "$version" ]]; then
    reason="the present one has Python $version"
  elif [[ $installed_extra != "$extra" && ${installed_extra:-cpu} != cpu ]]; then
    reason="the present one has jax for $installed_extra"
  fi
  if [[ -z $reason ]]; then return; fi
  find_python
  say "making .venv ($reason) with $python, Python $python_version"
  "$python" -m venv --clear "$venv" || fail "$python -m venv --clear $venv failed: its message is above"
  version=$python_version
}

# Installs a requirements file ($1), with more arguments for pip, unless its stamp says that this is done.
# Importing the modules ($2) proves the installation and compiles just the bytecode that a run needs.
install() {
  local file=$1 modules=$2 stamp=$venv/$1.installed start=$SECONDS state
  shift 2
  state="$extra $version $(cat "$file" constraints.txt | cksum)"
  if [[ -f $stamp && $(<"$stamp") == "$state" ]]; then return; fi
  rm -f "$stamp"
  say "installing $file for $extra: a minute or two on a fast connection"
  "$venv/bin/python" -m pip install -qq --no-input --disable-pip-version-check --no-compile --retries 2 --timeout 15 \
    -c constraints.txt -r "$file" "$@" || fail "pip could not install $file; its reason is above.
  \"from versions: none\" means that no package index was reached: check the network, a proxy (HTTPS_PROXY) or a mirror
  (PIP_INDEX_URL). The same command run again goes on from here."
  "$venv/bin/python" -E -c "import $modules" || fail "what $file installed cannot be imported; delete $venv and try again"
  echo "$state" >"$stamp"
  say "installed $file in $((SECONDS - start)) s"
}

main() {
  local dev=false preflight=false dry_run=false installed_extra="" extra version="" python="" python_version=""
  while (($# > 0)); do
    case $1 in
      --dev) dev=true ;;
      --preflight) preflight=true ;;
      --dry-run) dry_run=true ;;
      -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; return ;;
      *) fail "unknown argument $1; bash train/setup.sh --help lists them" ;;
    esac
    shift
  done
  cd "$root"
  if [[ -f $venv/requirements.txt.installed ]]; then read -r installed_extra _ <"$venv/requirements.txt.installed"; fi
  extra=$(choose_extra "$installed_extra")
  if $dry_run; then
    find_python
    say "would use $python, Python $python_version, and jax for $extra"
    return
  fi
  make_venv
  install requirements.txt \
    "jax, flax.linen, optax, orbax.checkpoint, grain, tensorflow_datasets, sentencepiece, pyarrow, matplotlib, tyro" \
    "jax[$extra]"
  if $dev; then install requirements-dev.txt "pytest, xdist, hypothesis"; fi
  # Beside the other packages, not among them: jax would look for a TPU at every start. On a TPU it has its own.
  if $preflight && [[ $extra != tpu ]]; then install requirements-tpu.txt sys --target "$venv/libtpu" --upgrade; fi
  say "ready: Python $version, jax for $extra, in $venv"
}

main "$@"
