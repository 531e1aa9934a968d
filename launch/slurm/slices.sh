#!/usr/bin/env bash
# Splits one job over N machines as an array, then merges the results:  launch/slurm/slices.sh N JOB ARGUMENTS...
#
#   launch/slurm/slices.sh 64 prepare --workdir=runs/web32 --config.source='tar:shards/*.tar' --config.image_size=32
#   launch/slurm/slices.sh 5 evaluate --workdir=runs/curve --config.checkpoints='runs/igpt_l/checkpoints/*' --config.probe=True
#
# Each slice is one process on one machine. In prepare it reads its share of the images, in evaluate its share of the
# checkpoints, in scaling its share of the runs. Rerunning resumes: finished work is not repeated. SBATCH="sbatch --partition=cpu" sets options of sbatch.
set -euo pipefail

if [[ $# -lt 3 || ! $1 =~ ^[1-9][0-9]*$ || $3 != --workdir=?* ]]; then
  echo "usage: $0 N prepare|evaluate|scaling --workdir=DIR ARGUMENTS..." >&2
  exit 2
fi
count=$1 job=$2 workdir=${3#--workdir=}
shift 3
read -ra sbatch <<< "${SBATCH:-sbatch}"
gpus=$([[ $job == prepare ]] && echo 0 || echo 1)
submit=("${sbatch[0]}" --parsable --nodes=1 --ntasks-per-node=1 --gpus-per-node="$gpus" --job-name="igpt-$job"
  "${sbatch[@]:1}")
file=$(dirname "$0")/job.sbatch

set -x
array=$("${submit[@]}" --array="0-$((count - 1))" "$file" "$job" --workdir="$workdir/slice-{i}" \
  --config.shard="{i}/$count" "$@")
"${submit[@]}" --dependency="afterok:$array" --kill-on-invalid-dep=yes "$file" "$job" \
  --workdir="$workdir" --config.shard=merge "$@"
