# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: finds a Python, makes .venv in the repository,
# installs what it lacks. Runs on bash 3.2, the one of macOS.

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
stamp=$venv/installed # two lines: what the last install was made from; its extras
unfinished=$venv/unfinished # there while .venv is being made or filled

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "$@"
  exit 1
}

# runs PYTHON CODE: true if PYTHON works, is new enough and can run CODE. A shim of
# pyenv for a version that is not installed exists and does not work.
runs() {
  "$1" -c "import sys; assert sys.version_info >= (3, 11); $2" </dev/null >/dev/null 2>&1
}

# find_python CODE: prints the first Python on the PATH that can run CODE.
find_python() {
  local name python
  for name in python3.14 python3.13 python3.12 python3.11 python3 python; do
    while IFS= read -r python; do
      if runs "$python" "$1"; then
        printf '%s\n' "$python"
        return
      fi
    done < <(type -aP "$name")
  done
  return 1
}

# choose_python: prints the Python that .venv is made with, or says how to get one.
choose_python() {
  local python version
  case $(uname -s) in
    MINGW* | MSYS* | CYGWIN*) fail "On Windows, run this inside WSL." ;;
  esac
  if [ -n "${PYTHON:-}" ]; then
    runs "$PYTHON" 'import venv, ensurepip' ||
      fail "PYTHON=$PYTHON is not a working Python 3.11 or newer with its venv module."
    printf '%s\n' "$PYTHON"
  elif find_python 'import venv, ensurepip'; then
    :
  elif python=$(find_python 'pass'); then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    fail "$python lacks the venv module. On Debian and Ubuntu:
  sudo apt install python$version-venv
then run the same command again."
  else
    fail "No Python 3.11 or newer was found. One way to get it:
  Debian, Ubuntu   sudo apt install python3 python3-venv
  macOS            brew install python
  anywhere         https://www.python.org/downloads, conda or uv
then run the same command again. If it lies outside the PATH, name it:
  PYTHON=/path/to/python3 bash scripts/${0##*/}"
  fi
}

# megabytes EXTRA...: prints what pref_jax and these extras take on a disk, measured on
# Linux. Parity takes 1100 with the CPU build of torch.
megabytes() {
  local extra total=1400
  for extra in "$@"; do
    case $extra in
      test) total=$((total + 50)) ;;
      parity) total=$((total + 5000)) ;;
      cuda) total=$((total + 5000)) ;;
      tpu) total=$((total + 750)) ;;
      envs) total=$((total + 150)) ;;
      *) fail "EXTRAS: \`$extra\` is unknown; there are cuda, envs, tpu, test and parity." ;;
    esac
  done
  printf '%s\n' "$total"
}

venv_works() { [ ! -e "$unfinished" ] && runs "$venv/bin/python" 'pass'; }

# make_venv: leaves a .venv whose Python and pip work. One that an interrupted install
# left half-made, or whose Python is gone, is made again; pip keeps the downloads.
make_venv() {
  local python
  if venv_works; then
    # Made by a tool that leaves pip out, perhaps.
    runs "$venv/bin/python" 'import pip' || "$venv/bin/python" -m ensurepip >&2
    return
  fi
  python=$(choose_python)
  if [ -e "$venv" ]; then
    say "$venv is broken or was not finished: making it again."
    rm -rf "${venv:?}/bin" "$venv" # bin first: a .venv half removed must not look whole
  fi
  mkdir "$venv"
  touch "$unfinished"
  "$python" -m venv "$venv"
}

# install EXTRA...: fills .venv, with a line for each large package.
install() {
  local log=$venv/install.log line extras="$*"
  touch "$unfinished"
  if (cd "$root" && "$venv/bin/python" -m pip install --disable-pip-version-check \
    --progress-bar off -e ".${extras:+[${extras// /,}]}") 2>&1 | tee "$log" |
    while IFS= read -r line; do
      case $line in
        *Downloading*"("[0-9][0-9]*" MB)" | *"Using cached"*"("[0-9][0-9]*" MB)")
          say "  ${line#"${line%%[! ]*}"}" ;;
        "Installing collected packages"*) say "  Unpacking what was downloaded" ;;
      esac
    done; then
    rm -f "$unfinished"
  else
    rm -f "$unfinished" # pip ended by itself: the next run mends what it left
    tail -n 15 "$log" >&2
    fail "The install failed. All that pip said is in $log"
  fi
}

# prepare_environment EXTRA...: makes .venv ready with these extras and those that it
# has already.
prepare_environment() {
  local source extra wanted='' there='' made_from='' total more free
  source="$root $(cksum <"$root/setup.py")"
  if [ -f "$stamp" ]; then
    { read -r made_from && read -r there; } <"$stamp" || true
  fi
  wanted=$there
  for extra in "$@"; do
    case " $wanted " in
      *" $extra "*) ;;
      *) wanted="$wanted${wanted:+ }$extra" ;;
    esac
  done
  # shellcheck disable=SC2086 # the extras are words
  total=$(megabytes $wanted)
  if [ "$source" = "$made_from" ] && [ "$wanted" = "$there" ] && venv_works; then
    return
  fi

  more=$total
  if [ -d "$venv" ]; then
    more=$((total - $(du -sk "$venv" | awk '{print int($1 / 1024)}')))
  fi
  free=$(df -Pk "$root" | awk 'NR == 2 {print int($4 / 1024)}')
  [ "$free" -ge "$more" ] || fail "$venv needs $more MB more on this disk, and $free MB
are free. Make room and run the same command again."
  say "Installing pref_jax${wanted:+ with the extras $wanted} into $venv:
$total MB in all ($free MB are free), 1 to 5 minutes on a good connection."

  case "$(uname -s) $wanted" in
    Linux*parity*) say "4000 MB of it are CUDA libraries, unless pip is set up to find
a CPU build of torch." ;;
  esac

  # Without a trap bash would go on once pip has ended.
  trap 'say "Stopped. The same command continues."; exit 130' INT
  trap 'exit 143' TERM
  make_venv
  # shellcheck disable=SC2086 # the extras are words
  install $wanted
  printf '%s\n%s\n' "$source" "$wanted" >"$stamp"
  trap - INT TERM
}

# name_accelerator: names the extra for a GPU or TPU that jax is not yet installed for.
name_accelerator() {
  local extra='' what='' tpu=${TPU_NAME:-} device
  # Numbers only: /dev/accel/ holds other accelerators, /dev/vfio/vfio is everywhere.
  for device in /dev/accel[0-9]* /dev/vfio/[0-9]*; do
    if [ -e "$device" ]; then tpu=$device; fi
  done
  if [ -n "$tpu" ]; then
    extra=tpu what='a TPU'
  elif nvidia-smi -L >/dev/null 2>&1; then
    extra=cuda what='an NVIDIA GPU'
  else
    return 0
  fi
  case " $(sed -n 2p "$stamp") " in
    *" $extra "*) ;;
    *) say "This machine has $what. To use it: EXTRAS=$extra bash scripts/quickstart.sh" ;;
  esac
}

# use_xla_flag FLAG: exports XLA_FLAGS with it too, if the XLA in .venv knows it; at one
# that it does not know XLA ends the process.
use_xla_flag() {
  local flags="${XLA_FLAGS:+$XLA_FLAGS }$1"
  if JAX_PLATFORMS=cpu XLA_FLAGS=$flags runs "$venv/bin/python" "import jax; jax.devices()"; then
    export XLA_FLAGS=$flags
  fi
}
