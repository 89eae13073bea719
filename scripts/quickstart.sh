#!/usr/bin/env bash
# From an empty machine to a first result: makes .venv, installs pref_jax into it and
# runs experiments/quickstart.py. After Ctrl-C the same command continues.
#
#   bash scripts/quickstart.sh                       the built-in task
#   bash scripts/quickstart.sh --data pairs.jsonl    your own pairs; --help lists all
#   EXTRAS=cuda bash scripts/quickstart.sh           with jax for NVIDIA GPUs (or tpu)
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

# shellcheck disable=SC2086 # the extras are words
prepare_environment ${EXTRAS:+${EXTRAS//,/ }}
name_accelerator

# transformers says at every start that it found no PyTorch; nothing here wants it.
export TRANSFORMERS_NO_ADVISORY_WARNINGS=1
# The caller's folder stays current, so that `--data pairs.jsonl` means the caller's
# file; -P keeps a folder `experiments` in it from being taken for ours.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$venv/bin/python" -P -m experiments.quickstart "$@"
