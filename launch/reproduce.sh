#!/usr/bin/env bash
# The paper's Figures 2 and 3 in small: three sizes on CIFAR-10 at 16x16, three checkpoints of each, every layer probed.
#   launch/reproduce.sh [PYTHON [FOLDER]]
# About two hours on two CPU cores. Rerunning resumes. LIMIT=10000 probes on the first
# 10,000 images of each split only. Where the images are (default: TFDS downloads them):
#   SOURCE=npz:cifar10_train.npz TEST_SOURCE=npz:cifar10_test.npz PALETTE=kmeans_centers.npy launch/reproduce.sh
set -euo pipefail
if [[ ${1:-} == -* ]]; then
  echo "usage: $0 [PYTHON [FOLDER]]" >&2
  exit 2
fi
python=${1:-python3}
folder=${2:-runs/reproduce}
job() { "$python" -m igpt_jax "$1" --workdir="$folder/$2" "${@:3}"; }

# Two devices use two cores better than one device with two threads.
export XLA_FLAGS="--xla_force_host_platform_device_count=${DEVICES:-2} ${XLA_FLAGS:-}"
steps=${STEPS:-500,1000,1500}
last=${steps##*,}

job prepare store --config.source="${SOURCE:-tfds:cifar10}" --config.test_source="${TEST_SOURCE:-tfds:cifar10@test}" \
  --config.image_size=16 --config.palette="${PALETTE:-fit:512}"
checkpoints=()
for size in 4x64 6x96 6x128; do
  job pretrain "$size" --config.model.name=igpt_tiny --config.data.store="$folder/store" \
    --config.model.layers="${size%x*}" --config.model.embed="${size#*x}" --config.steps="$last" --config.batch_size=64 \
    --config.optimizer.learning_rate=3e-3 --config.optimizer.warmup_steps="${WARMUP:-100}" --config.precision=float32 \
    --config.mesh.data=-1 --config.mesh.fsdp=1 --config.keep_steps="($steps,)" --config.checkpoint_every_steps=250 \
    --config.eval_every_steps=500
  for step in ${steps//,/ }; do checkpoints+=("$folder/$size/checkpoints/$step"); done
done
job evaluate evaluate --config.checkpoints="$(IFS=,; echo "${checkpoints[*]}")" --config.data.split=test \
  --config.probe=True --config.probing.limit="${LIMIT:-0}" --config.mesh.data=-1 --config.mesh.fsdp=1
job probe probe --config.checkpoint="$folder/6x128" --config.limit="${LIMIT:-0}" --config.mesh.data=-1 --config.mesh.fsdp=1
job report report --config.workdirs="$folder/*"
