#!/usr/bin/env bash
# The paper's learning-rate search (Section 3.4): trains at each rate and compares the held-out losses:
#
#   launch/slurm/sweep.sh RUN --config=configs/igpt_s.py --config.data.store=STORE --config.steps=20000
#
# RATES (0.01 0.003 0.001 0.0003) lists the rates. Each trains in RUN/lr-RATE. When all have ended, RUN/sweep.json and
# sweep.md name the best rate. SBATCH="sbatch --nodes=1" sets options of sbatch.
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
  echo "usage: $0 RUN PRETRAIN'S ARGUMENTS..." >&2
  exit 2
fi
run=$1
shift
read -ra sbatch <<< "${SBATCH:-sbatch}"
read -ra rates <<< "${RATES:-0.01 0.003 0.001 0.0003}"
folder=$(dirname "$0")

set -x
export VALUES="${rates[*]}"
array=$("${sbatch[@]}" --parsable --job-name=igpt-sweep --array="0-$((${#rates[@]} - 1))" "$folder/job.sbatch" pretrain \
  --workdir="$run/lr-{value}" "$@" --config.optimizer.learning_rate="{value}")
"${sbatch[@]}" --parsable --nodes=1 --ntasks=1 --job-name=igpt-sweep-table --output=%x-%j.log --dependency="afterany:$array" \
  --wrap="$(printf '%q ' "${PYTHON:-python}" "$folder/../sweep.py" "$run")"
