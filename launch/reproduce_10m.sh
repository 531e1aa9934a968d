#!/usr/bin/env bash
# igpt_10m on CIFAR-10 at 32x32 on one GPU: 16 epochs from memory, its test loss, linear probes, samples and the report.
#   launch/reproduce_10m.sh [PYTHON [FOLDER]]
# Ends after SLICE_SECONDS (520). Pretraining is stopped REST_SECONDS (40) earlier, with a checkpoint that is still
# evaluated. If a job was stopped, the exit code is 75, and rerunning resumes.
# Where the images are (default: TFDS downloads them):
#   SOURCE=npz:cifar10_train.npz TEST_SOURCE=npz:cifar10_test.npz PALETTE=kmeans_centers.npy launch/reproduce_10m.sh
set -euo pipefail
if [[ ${1:-} == -* ]]; then
  echo "usage: $0 [PYTHON [FOLDER]]" >&2
  exit 2
fi
python=${1:-python3}
folder=${2:-runs/10m}
stopped=0
# job SECONDS JOB FOLDER ARGUMENTS...: stops the job SECONDS before the end.
job() {
  local left=$((${SLICE_SECONDS:-520} - SECONDS - $1)) code=0
  if ((left <= 0)); then exit 75; fi
  # In the foreground, where Ctrl-C reaches the job too. 143: SIGTERM came before it had started.
  timeout --foreground --preserve-status "$left" "$python" -m igpt_jax "$2" --workdir="$folder/$3" "${@:4}" || code=$?
  case $code in
    0) ;;
    75 | 143) [[ $2 == pretrain ]] && stopped=75 || exit 75 ;; # what pretraining has done is still evaluated
    *) exit "$code" ;;
  esac
}

job 0 prepare store --config.source="${SOURCE:-tfds:cifar10}" --config.test_source="${TEST_SOURCE:-tfds:cifar10@test}" \
  --config.image_size=32 --config.palette="${PALETTE:-fit:512}"
job "${REST_SECONDS:-40}" pretrain pretrain --config=configs/pretrain.py:model="${MODEL:-igpt_10m}" \
  --config.data.store="$folder/store" --config.data.reader=resident --config.steps="${STEPS:-5625}" \
  --config.batch_size="${BATCH:-128}" --config.optimizer.learning_rate=3e-3 \
  --config.optimizer.warmup_steps="${WARMUP:-350}" --config.checkpoint_every_steps=350 --config.eval_every_steps=1050
compgen -G "$folder/pretrain/checkpoints/*" >/dev/null || exit 75 # stopped before its first step
job 0 evaluate evaluate --config.checkpoints="$folder/pretrain" --config.data.split=test
if ((stopped)); then exit "$stopped"; fi
job 0 probe probe --config.checkpoint="$folder/pretrain" --config.precision=bfloat16 --config.baselines=False
job 0 sample sample --config.checkpoint="$folder/pretrain" --config.data.split=test
job 0 report report --config.workdirs="$folder/*"
exit "$stopped"
