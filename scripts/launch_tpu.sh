#!/usr/bin/env bash
# One program on every host of a Cloud TPU slice, or of several: asks for the TPU, waits
# for it, copies the commit that is checked out here, installs it, runs. A run that was
# preempted is started again, on a new TPU if the old one was taken away, and continues.
# docs/pods.md has more.
#
#   bash scripts/launch_tpu.sh --name=dpo --project=PROJECT --zone=us-east5-a \
#     --accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --spot -- \
#     python -m experiments.quickstart --root gs://BUCKET/runs
#   bash scripts/launch_tpu.sh --name=dpo --project=PROJECT --zone=us-east5-a --delete
#
#   --name, --project, --zone   the queued resource, and where it is
#   --accelerator-type          such as v5litepod-16; or in its place
#   --type, --topology          such as v5p and 2x2x4
#   --runtime-version           the image of the hosts
#   --num-slices N              several slices; default 1
#   --spot                      cheaper, and may be taken away
#   --git URL                   fetch the commit from there in place of copying it
#   --restarts K                how often to start again at most; default 20
#   --delete                    give the TPU back, and nothing else
#   --dry-run                   print the commands and run none
#
# An option takes its value after a space or `=`. What is not named here, written with
# `=`, goes to `gcloud compute tpus queued-resources create`: --reserved, --network=...
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

preempted=75 # what a run exits with that saved itself and wants to go on
poll=${LAUNCH_TPU_POLL:-30} # seconds between looks at the state of the TPU
settle=${LAUNCH_TPU_SETTLE:-60} # seconds until a TPU that lost its hosts says so

# show WORD...: prints a command so that a shell reads it back.
show() {
  local line
  printf -v line ' %q' "$@"
  printf '%s\n' "${line# }"
}

# call WORD...: runs a command, or shows it.
call() {
  if [ -n "$dry_run" ]; then
    show "$@"
  else
    "$@"
  fi
}

# On a host, in the copy that was made there.

# install_on_host: a Python if the image has none that is new enough, and the .venv.
install_on_host() {
  if ! venv_works && ! find_python 'import venv, ensurepip' >/dev/null; then
    say "The image has no Python 3.11 or newer: getting one with uv."
    python3 -m pip install --quiet --user uv
    python3 -m uv python install --quiet 3.12
    PYTHON=$(python3 -m uv python find --managed-python 3.12)
  fi
  prepare_environment tpu
}

# run_on_host COMMAND...: the program, which joins those of the other hosts.
run_on_host() {
  export PREF_JAX_MULTIHOST=1 TRANSFORMERS_NO_ADVISORY_WARNINGS=1
  export PATH=$venv/bin:$PATH PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
  cd "$root"
  exec "$@"
}

# On the machine that launches.

# tpu VERB WORD...: gcloud about the queued resource.
tpu() {
  local verb=$1
  shift
  call gcloud compute tpus queued-resources "$verb" "$@" "${place[@]}"
}

create_tpu() { tpu create "$name" "${shape[@]}"; }

delete_tpu() { tpu delete "$name" --force --quiet; }

# on_hosts ssh COMMAND, on_hosts scp FILE: with all hosts of all slices at once. The
# result is that of the first slice that failed. (gcloud's own commands for a queued
# resource take 64 hosts at a time, and the first would wait for the others for ever.)
on_hosts() {
  local slice job words jobs=() status=0 code
  for slice in "${all_slices[@]}"; do
    case $1 in
      ssh) words=("$slice" "--command=$2") ;;
      scp) words=("$2" "$slice:") ;;
    esac
    words=(gcloud compute tpus tpu-vm "$1" "${words[@]}" --worker=all "${place[@]}")
    if [ -n "$dry_run" ]; then
      show "${words[@]}"
    else
      "${words[@]}" &
      jobs+=("$!")
    fi
  done
  for job in ${jobs[@]+"${jobs[@]}"}; do
    code=0
    wait "$job" || code=$?
    if [ "$status" -eq 0 ]; then status=$code; fi
  done
  return "$status"
}

# tpu_state: prints the state, or `none` if there is no such queued resource.
tpu_state() {
  local answer
  if answer=$(tpu describe "$name" '--format=value(state.state)' 2>&1); then
    printf '%s\n' "${answer##*$'\n'}"
  else
    case $answer in
      *NOT_FOUND*) printf 'none\n' ;;
      *) fail "$answer" ;;
    esac
  fi
}

# hold_tpu: returns once the TPU is there, asking for it if need be.
hold_tpu() {
  local state said=''
  while true; do
    state=$(tpu_state)
    if [ "$state" != "$said" ]; then
      say "TPU $name: $state"
      said=$state
    fi
    case $state in
      ACTIVE) return ;;
      none) create_tpu ;;
      FAILED | SUSPENDED)
        restart_or_fail "The TPU is $state."
        delete_tpu
        ;;
      *) sleep "$poll" ;; # in the queue, being made, or being taken away
    esac
  done
}

# restart_or_fail WHY [CODE]: counts a restart, or ends when there were enough.
restart_or_fail() {
  if [ "$restarts" -le 0 ]; then
    say "$1 All restarts are used up; the same command continues."
    exit "${2:-1}"
  fi
  say "$1 Starting again; $restarts restarts are left."
  restarts=$((restarts - 1))
}

# copy_and_install: the commit that is checked out here, on every host.
copy_and_install() {
  local source=../pref_jax.bundle
  # `|| return`: bash goes on after an error in a function whose result is looked at.
  if [ -n "$git_url" ]; then
    printf -v source %q "$git_url"
  else
    call git "--git-dir=$root/.git" bundle create --quiet pref_jax.bundle HEAD || return
    on_hosts scp pref_jax.bundle || return
  fi
  on_hosts ssh "mkdir -p pref_jax && cd pref_jax && git init --quiet && \
git fetch --quiet $source $commit && git checkout --quiet --detach $commit && \
bash scripts/launch_tpu.sh --on-host install"
}

case "${1:-} ${2:-}" in
  '--on-host install') install_on_host && exit ;;
  '--on-host run') run_on_host "${@:3}" ;;
esac

name='' project='' zone='' accelerator='' type='' topology='' runtime='' slices=1
restarts=20 git_url='' spot='' delete='' dry_run=''
others=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  option=${1%%=*} value=${1#*=}
  case $option in
    --name | --project | --zone | --accelerator-type | --type | --topology | \
      --runtime-version | --num-slices | --restarts | --git)
      if [ "$1" = "$option" ]; then
        value=${2:-} && shift
      fi
      [ -n "$value" ] || fail "$option needs a value."
      ;;
  esac
  case $option in
    --name) name=$value ;;
    --project) project=$value ;;
    --zone) zone=$value ;;
    --accelerator-type) accelerator=$value ;;
    --type) type=$value ;;
    --topology) topology=$value ;;
    --runtime-version) runtime=$value ;;
    --num-slices) slices=$value ;;
    --restarts) restarts=$value ;;
    --git) git_url=$value ;;
    --spot) spot=$1 ;;
    --delete) delete=1 ;;
    --dry-run) dry_run=1 ;;
    --*) others+=("$1") ;;
    *) fail "\`$1\` is no option; the program goes after \`--\`." ;;
  esac
  shift
done
if [ $# -gt 0 ]; then shift; fi

[ -n "$name" ] || fail "Needs --name, of the queued resource to make or to go on with."
[ -n "$project" ] || fail "Needs --project, of Google Cloud."
[ -n "$zone" ] || fail "Needs --zone, one that has the TPU, such as us-east5-a."
place=("--project=$project" "--zone=$zone")
if [ -n "$delete" ]; then
  delete_tpu
  exit
fi
[ $# -gt 0 ] || fail "Needs a command after \`--\`, as in:
  bash scripts/launch_tpu.sh ... -- python -m experiments.quickstart --root gs://..."
[ -n "$runtime" ] || fail "Needs --runtime-version, the image of the hosts, such as
v2-alpha-tpuv6e; Google's page \"TPU software versions\" lists them."
if [ -n "$accelerator" ] && [ -z "$type$topology" ]; then
  shape=("--accelerator-type=$accelerator")
elif [ -z "$accelerator" ] && [ -n "$type" ] && [ -n "$topology" ]; then
  shape=("--type=$type" "--topology=$topology")
else
  fail "Needs either --accelerator-type, such as v5litepod-16, or --type and --topology,
such as v5p and 2x2x4."
fi
case $slices in
  *[!0-9]* | 0*) fail "--num-slices needs a number, 1 or more; got \`$slices\`." ;;
  1)
    shape+=("--node-id=$name")
    all_slices=("$name")
    ;;
  *)
    shape+=("--node-count=$slices" "--node-prefix=$name")
    all_slices=()
    for ((i = 0; i < slices; i++)); do all_slices+=("$name-$i"); done
    ;;
esac
case $restarts in
  *[!0-9]*) fail "--restarts needs a number; got \`$restarts\`." ;;
esac
shape+=("--runtime-version=$runtime" ${spot:+"$spot"} ${others[@]+"${others[@]}"})
commit=$(git -C "$root" rev-parse HEAD) || fail "$root has to be a clone of git: hosts get
the commit that is checked out here."
if [ -n "$(git -C "$root" status --porcelain --untracked-files=no)" ]; then
  say "Changes that are not committed stay here: hosts get commit ${commit:0:12}."
fi
printf -v program ' %q' "$@"

if [ -n "$dry_run" ]; then
  create_tpu
  tpu describe "$name" '--format=value(state.state)'
  copy_and_install
  on_hosts ssh "bash pref_jax/scripts/launch_tpu.sh --on-host run$program"
  exit
fi

command -v gcloud >/dev/null || fail "There is no gcloud here: install the Google Cloud
CLI, or see what would be run with --dry-run."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# What runs in the background hears no Ctrl-C.
trap 'kill $(jobs -p) 2>/dev/null; exit 130' INT
trap 'kill $(jobs -p) 2>/dev/null; exit 143' TERM
cd "$folder"
while true; do
  hold_tpu
  status=0
  copy_and_install || status=$?
  if [ "$status" -eq 0 ]; then
    on_hosts ssh "bash pref_jax/scripts/launch_tpu.sh --on-host run$program" || status=$?
    [ "$status" -ne 0 ] || exit 0
  fi
  if [ "$status" -eq "$preempted" ]; then
    restart_or_fail "The run was preempted and saved itself." "$status"
    continue
  fi
  sleep "$settle"
  state=$(tpu_state)
  if [ "$state" = ACTIVE ]; then
    say "The command failed with exit code $status, and the TPU is still there. It costs
money until \`--delete\`."
    exit "$status"
  fi
  restart_or_fail "The TPU is gone (state $state)." "$status"
done
