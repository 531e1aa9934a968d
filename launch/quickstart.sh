#!/usr/bin/env bash
# From real handwritten digits to a trained, measured and sampled iGPT:  launch/quickstart.sh [PYTHON [FOLDER]]
# Run again, it goes on where it was.
set -euo pipefail
python=${1:-python3}
folder=${2:-runs/quickstart}
job() { "$python" -m igpt_jax "$1" --workdir="$folder/$2" "${@:3}"; }

job prepare store --config.source=digits
job pretrain pretrain --config=configs/pretrain.py:model=igpt_tiny --config.data.store="$folder/store" \
  --config.model.layers=4 --config.model.embed=64 \
  --config.steps=500 --config.batch_size=64 --config.precision=float32 --config.optimizer.warmup_steps=50 \
  --config.log_every_steps=25 --config.eval_every_steps=100 --config.checkpoint_every_steps=250
job evaluate evaluate --config.checkpoints="$folder/pretrain" --config.data.store="$folder/store"
job sample sample --config.checkpoint="$folder/pretrain" --config.data.store="$folder/store"

cat <<END

Pictures:    $(cd "$folder" && ls -d "$PWD"/*/figures | tr '\n' ' ')
Curves:      tensorboard --logdir $folder/pretrain/tensorboard
Try next:    $python -m igpt_jax pretrain --help
             $python -m igpt_jax sample --workdir=$folder/cool --config.checkpoint=$folder/pretrain --config.temperature=0.8
END
