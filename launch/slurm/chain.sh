#!/usr/bin/env bash
# Submits the jobs of a whole experiment. Each starts after the previous one has succeeded:
#
#   launch/slurm/chain.sh RUN --config=configs/igpt_s.py --config.data.store=STORE ...       (pretrain's arguments)
#
# RUN: a folder or bucket; each job gets RUN/JOB as its workdir. STAGES chooses the jobs (default: pretrain probe
# finetune evaluate report). PROBE, FINETUNE, EVALUATE and REPORT hold further arguments of those jobs:
# PROBE='--config.batch_size=512'. SBATCH="sbatch --nodes=4" sets options of sbatch.
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
  echo "usage: $0 RUN PRETRAIN'S ARGUMENTS..." >&2
  exit 2
fi
run=$1
shift
read -ra sbatch <<< "${SBATCH:-sbatch}"

before=""
for stage in ${STAGES:-pretrain probe finetune evaluate report}; do
  more=${stage^^} place=()
  read -ra arguments <<< "${!more:-}"
  case $stage in
    pretrain) arguments=("$@") ;;
    evaluate) arguments+=("--config.checkpoints=$run/pretrain/checkpoints/*") ;;
    report)
      arguments+=("--config.workdirs=$run/*")
      place=(--nodes=1 --ntasks-per-node=1 --gpus-per-node=0)
      ;;
    *) arguments+=("--config.checkpoint=$run/pretrain") ;;
  esac
  command=("${sbatch[@]}" --parsable --job-name="igpt-$stage" ${before:+"--dependency=afterok:$before"}
    --kill-on-invalid-dep=yes "${place[@]}" "$(dirname "$0")/job.sbatch" "$stage" --workdir="$run/$stage" "${arguments[@]}")
  echo "+ ${command[*]}"
  before=$("${command[@]}")
  echo "$before"
done
