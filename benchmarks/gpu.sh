#!/usr/bin/env bash
# Measures a GPU within a budget of seconds:  benchmarks/gpu.sh 540 [--data=CIFAR10.xz] [--folder=FOLDER] [--tiny]
# gpu.py says more. PYTHON names the interpreter (python3).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# Candidates in several processes share the GPU, so none may allocate most of its memory at the start.
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=.92
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} TF_CPP_MIN_LOG_LEVEL=3
exec "${PYTHON:-python3}" "$root/benchmarks/gpu.py" "$@"
