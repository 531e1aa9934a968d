#!/usr/bin/env bash
# The paper's transfer in small: pretrains on one set of images and probes on another one that the model never saw.
#   launch/transfer.sh [PYTHON [FOLDER]]
# About an hour on two CPU cores. Rerunning resumes. LIMIT=10000 probes on the first 10,000 images of
# each split only. Where the images are (default: TFDS downloads them):
#   SOURCE=npz:tinyimagenet.npz PROBED=npz:cifar10_train.npz PROBED_TEST=npz:cifar10_test.npz PALETTE=kmeans_centers.npy \
#     launch/transfer.sh
set -euo pipefail
if [[ ${1:-} == -* ]]; then
  echo "usage: $0 [PYTHON [FOLDER]]" >&2
  exit 2
fi
python=${1:-python3}
folder=${2:-runs/transfer}
job() { "$python" -m igpt_jax "$1" --workdir="$folder/$2" "${@:3}"; }

# Two devices use two cores better than one device with two threads.
export XLA_FLAGS="--xla_force_host_platform_device_count=${DEVICES:-2} ${XLA_FLAGS:-}"

job prepare store --config.source="${SOURCE:-tfds:imagenet_resized/16x16}" --config.image_size=16 \
  --config.palette="${PALETTE:-fit:512}"
job prepare probed --config.source="${PROBED:-tfds:cifar10}" --config.test_source="${PROBED_TEST:-tfds:cifar10@test}" \
  --config.image_size=16 --config.palette="$folder/store/palette.npy"
job pretrain pretrain --config.model.name=igpt_tiny --config.data.store="$folder/store" \
  --config.steps="${STEPS:-1500}" --config.batch_size=64 --config.optimizer.learning_rate=3e-3 \
  --config.optimizer.warmup_steps="${WARMUP:-100}" --config.precision=float32 --config.mesh.data=-1 --config.mesh.fsdp=1 \
  --config.checkpoint_every_steps=250 --config.eval_every_steps=500
job evaluate evaluate --config.checkpoints="$folder/pretrain" --config.data.store="$folder/probed" --config.data.split=test \
  --config.mesh.data=-1 --config.mesh.fsdp=1
job probe probe --config.checkpoint="$folder/pretrain" --config.data.store="$folder/probed" \
  --config.labels_per_class="${LABELS:-(4,25,400)}" --config.limit="${LIMIT:-0}" --config.mesh.data=-1 --config.mesh.fsdp=1
job report report --config.workdirs="$folder/*"
