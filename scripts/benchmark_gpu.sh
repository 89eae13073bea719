#!/usr/bin/env bash
# DPO of a model of one billion parameters on one NVIDIA GPU, beside TRL: a JSON line.
# Ten minutes at most, installs not counted. docs/benchmarks.md says what is measured.
#
#   bash scripts/benchmark_gpu.sh
#   bash scripts/benchmark_gpu.sh --write docs/records   and `python scripts/tables.py`
#   bash scripts/benchmark_gpu.sh --smoke                a tiny shape, on any machine
#
# TRL gets an environment of its own, .venv_torch (5 GB). Without a GPU the line says
# that nothing was run, and nothing is installed.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

torch=$root/.venv_torch
smoke=''
for argument in "$@"; do
  if [ "$argument" = --smoke ]; then smoke=1; fi
done

# make_torch: an environment with TRL for CUDA, or the reason why there is none.
make_torch() {
  if [ -f "$torch/installed" ]; then return; fi
  say "Installing torch and TRL into $torch: 5000 MB, some minutes."
  rm -rf "$torch"
  if ! "$venv/bin/python" -m venv "$torch" >&2; then
    missing='python -m venv failed'
  elif ! "$torch/bin/python" -m pip install --disable-pip-version-check --quiet \
    torch==2.13.0 trl==1.16.0 >&2; then
    missing='pip could not install torch and TRL'
  elif ! "$torch/bin/python" -c 'import torch; assert torch.cuda.is_available()' >&2; then
    missing='the torch that pip installed sees no GPU'
  else
    touch "$torch/installed"
  fi
}

missing=''
if [ -n "$smoke" ]; then
  prepare_environment
  missing='not part of the smoke run'
elif nvidia-smi -L >/dev/null 2>&1; then
  prepare_environment cuda
  make_torch
else
  printf '%s\n' '{"name": "gpu_dpo", "status": "not run", "reason": "nvidia-smi finds no NVIDIA GPU"}'
  exit 0
fi
# Of two processes one after the other each may have nearly all of the GPU.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
arguments=("--torch-python=$torch/bin/python")
if [ -n "$missing" ]; then arguments=("--torch-missing=$missing"); fi
export TRANSFORMERS_NO_ADVISORY_WARNINGS=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$venv/bin/python" "$root/scripts/benchmark_gpu.py" "${arguments[@]}" "$@"
