#!/usr/bin/env bash
# igpt_10m on CIFAR-10 at 32x32 on one GPU: 16 epochs from memory, its test loss, samples and the report.
#   launch/reproduce_10m.sh [PYTHON [FOLDER]]
# Stops after SLICE_SECONDS (520) with a checkpoint and exit code 75; rerunning resumes. Where the images are (default: TFDS
# downloads them):
#   SOURCE=npz:cifar10_train.npz TEST_SOURCE=npz:cifar10_test.npz PALETTE=kmeans_centers.npy launch/reproduce_10m.sh
set -euo pipefail
python=${1:-python3}
folder=${2:-runs/10m}
job() {
  left=$((${SLICE_SECONDS:-520} - SECONDS))
  if ((left <= 0)); then exit 75; fi
  # In the foreground, where Ctrl-C reaches the job too. 143: SIGTERM came before it had started.
  timeout --foreground --preserve-status "$left" "$python" -m igpt_jax "$1" --workdir="$folder/$2" "${@:3}" ||
    { code=$?; exit $((code == 143 ? 75 : code)); }
}

job prepare store --config.source="${SOURCE:-tfds:cifar10}" --config.test_source="${TEST_SOURCE:-tfds:cifar10@test}" \
  --config.image_size=32 --config.palette="${PALETTE:-fit:512}"
job pretrain pretrain --config=configs/pretrain.py:model="${MODEL:-igpt_10m}" --config.data.store="$folder/store" \
  --config.data.reader=resident --config.steps="${STEPS:-5625}" --config.batch_size="${BATCH:-128}" \
  --config.optimizer.learning_rate=3e-3 --config.optimizer.warmup_steps="${WARMUP:-350}" \
  --config.checkpoint_every_steps=350 --config.eval_every_steps=1050
job evaluate evaluate --config.checkpoints="$folder/pretrain" --config.data.split=test
job sample sample --config.checkpoint="$folder/pretrain" --config.data.split=test
job report report --config.workdirs="$folder/*"
