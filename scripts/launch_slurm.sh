#!/usr/bin/env bash
# One program on all nodes of a Slurm job, joined by jax.distributed. Two minutes before
# its time is over, or when it has to make room, the run saves, the job goes back to the
# queue, and the same command continues. docs/pods.md has more.
#
#   bash scripts/launch_slurm.sh --nodes=4 --gpus-per-node=8 --time=12:00:00 -- \
#     python -m experiments.quickstart --root /shared/runs
#
# Options before `--` are those of sbatch (with `=`), but for these:
#
#   --per gpu|node    a process for each GPU, or one a node; default: gpu where
#                     --gpus-per-node is given
#   --requeues K      how often the job goes back to the queue at most; default 100
#   --dry-run         print the commands and start nothing
#
# The repository, its .venv (EXTRAS=cuda bash scripts/quickstart.sh makes it) and the run
# folder have to be on a disk that all nodes see.
set -euo pipefail

preempted=75 # what a run exits with that saved itself and wants to go on

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "$@"
  exit 1
}

# show WORD...: prints a command so that a shell reads it back.
show() {
  local line
  printf -v line ' %q' "$@"
  printf '%s\n' "${line# }"
}

# run_command PER GPUS COMMAND...: the srun of the job, as words of the array `srun`. The
# step has to outlive its first process: the others may still be writing.
run_command() {
  local per=$1 gpus=$2 ids=0 i
  shift 2
  srun=(srun --kill-on-bad-exit=0 --wait=60 env PREF_JAX_MULTIHOST=1)
  if [ "$per" = node ] && [ "$gpus" -gt 0 ]; then
    # Under Slurm jax takes one GPU a process, unless it is told which.
    for ((i = 1; i < gpus; i++)); do ids=$ids,$i; done
    srun+=("JAX_LOCAL_DEVICE_IDS=$ids")
  fi
  srun+=("$@")
}

# job ROOT PER GPUS REQUEUES COMMAND...: what the first node of the job runs.
job() {
  local root=$1 requeues=$4 status=0
  run_command "$2" "$3" "${@:5}"
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} TRANSFORMERS_NO_ADVISORY_WARNINGS=1
  if [ -x "$root/.venv/bin/python" ]; then
    export PATH=$root/.venv/bin:$PATH
  fi
  # srun does not take this from sbatch by itself.
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-}
  [ -n "$SRUN_CPUS_PER_TASK" ] || unset SRUN_CPUS_PER_TASK
  # The signal is for the run. This script has to see the run's end.
  trap 'say "stopping: the run saves itself."' TERM
  "${srun[@]}" || status=$?
  if [ "$status" -ne "$preempted" ]; then
    exit "$status"
  fi
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$requeues" ]; then
    say "The job was requeued $requeues times and is not done; the same command continues."
    exit "$status"
  fi
  say "The run was preempted and saved itself: back to the queue."
  scontrol requeue "$SLURM_JOB_ID"
}

# The copy of this script that sbatch made.
if [ "${1:-}" = --job ]; then
  job "${@:2}"
  exit
fi

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
per='' gpus=0 requeues=100 dry_run=''
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --per) per=${2:-} && shift ;;
    --per=*) per=${1#*=} ;;
    --requeues) requeues=${2:-} && shift ;;
    --requeues=*) requeues=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    --gpus-per-node=*)
      gpus=${1##*[=:]} # a number, or TYPE:NUMBER
      options+=("$1")
      ;;
    --ntasks* | --gpus-per-task* | -n | -n[0-9]*)
      fail "$1: the number of processes follows from --nodes, --gpus-per-node and --per." ;;
    *) options+=("$1") ;;
  esac
  shift
done
if [ $# -lt 2 ]; then
  fail "Needs a command after \`--\`, as in:
  bash scripts/launch_slurm.sh --nodes=2 -- python -m experiments.quickstart"
fi
shift

case $gpus in
  '' | *[!0-9]*) fail "--gpus-per-node needs NUMBER or TYPE:NUMBER; got \`$gpus\`." ;;
esac
case $requeues in
  '' | *[!0-9]*) fail "--requeues needs a number; got \`$requeues\`." ;;
esac
if [ -z "$per" ]; then
  per=node
  if [ "$gpus" -gt 0 ]; then per=gpu; fi
fi
case $per in
  node) tasks=1 ;;
  gpu)
    [ "$gpus" -gt 0 ] || fail "--per gpu needs --gpus-per-node=NUMBER."
    tasks=$gpus
    ;;
  *) fail "--per needs gpu or node; got \`$per\`." ;;
esac

# The log of an earlier start is kept. Options of the caller come last and win.
sbatch=(sbatch --requeue --open-mode=append --signal=TERM@120
  "--ntasks-per-node=$tasks" ${options[@]+"${options[@]}"}
  "$root/scripts/launch_slurm.sh" --job "$root" "$per" "$gpus" "$requeues" "$@")
if [ -n "$dry_run" ]; then
  show "${sbatch[@]}"
  run_command "$per" "$gpus" "$@"
  show "${srun[@]}"
  exit
fi
command -v sbatch >/dev/null || fail "There is no sbatch here: run this where Slurm is,
or see what it would do with --dry-run."
exec "${sbatch[@]}"
