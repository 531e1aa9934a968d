#!/usr/bin/env bash
# The paper's search for a learning rate (Section 3.4) on this machine: the same training at each rate, one after another:
#
#   launch/sweep.sh RUN --config=configs/igpt_s.py --config.data.store=STORE --config.steps=20000
#
# RATES (0.01 0.003 0.001 0.0003) lists the rates. RUN/lr-RATE holds each training. RUN/sweep.json and sweep.md tell which
# rate is best by held-out loss. Rerunning resumes. On SLURM: launch/slurm/sweep.sh.
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
  echo "usage: $0 RUN PRETRAIN'S ARGUMENTS..." >&2
  exit 2
fi
run=$1
shift
python=${PYTHON:-python3}
read -ra rates <<< "${RATES:-0.01 0.003 0.001 0.0003}"
for rate in "${rates[@]}"; do
  code=0
  "$python" -m igpt_jax pretrain --workdir="$run/lr-$rate" "$@" --config.optimizer.learning_rate="$rate" || code=$?
  ((code == 0 || code == 77)) || exit "$code"  # 77: a rate at which training diverges is part of the answer
done
exec "$python" "$(dirname "$0")/sweep.py" "$run"
