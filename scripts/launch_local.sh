#!/usr/bin/env bash
# Several processes of one program on this machine, joined by jax.distributed: one GPU
# each where there are enough, otherwise one CPU device each. docs/pods.md has more.
#
#   bash scripts/launch_local.sh 2 python -m experiments.quickstart --preset smoke
#   bash scripts/launch_local.sh --restart 3 2 python -m experiments.quickstart
#   bash scripts/launch_local.sh --help
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

# The .venv of quickstart.sh, if there is one, is also the `python` of the command.
if venv_works; then
  PATH=$venv/bin:$PATH
fi
python=$(find_python pass) || python=$(choose_python)
export PATH PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export TRANSFORMERS_NO_ADVISORY_WARNINGS=1
exec "$python" -P "$root/scripts/launch_local.py" "$@"
