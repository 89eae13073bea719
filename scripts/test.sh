#!/usr/bin/env bash
# The tests, in the .venv that quickstart.sh makes and uses too: CPU, no network.
#
#   bash scripts/test.sh                      the default suite
#   bash scripts/test.sh --all                also the slow tests and those against TRL, MuJoCo ...
#   bash scripts/test.sh tests/data -k rows   what else pytest takes; paths from the root
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

extras='test'
selection=(-m 'not slow')
fast=yes # compiling takes most of the time: the default suite leaves much of it out
arguments=(-n logical --maxprocesses 4 --dist loadfile --durations=15)
for argument in "$@"; do
  if [ "$argument" = --all ]; then
    extras='test parity envs'
    fast=no
    selection=(-m 'slow or not slow')
  else
    arguments+=("$argument")
  fi
done

# shellcheck disable=SC2086 # the extras are words
prepare_environment $extras ${EXTRAS:+${EXTRAS//,/ }}
cd "$root"
if [ "$fast" = yes ]; then
  export JAX_DISABLE_MOST_OPTIMIZATIONS=1
  use_xla_flag --xla_cpu_use_fusion_emitters=false
fi
exec "$venv/bin/python" -m pytest "${selection[@]}" "${arguments[@]}"
