#!/usr/bin/env bash
# From real handwritten digits to a trained, measured and sampled iGPT:  launch/quickstart.sh [PYTHON [FOLDER]]
# Run again, it goes on where it was.
set -euo pipefail
python=${1:-python3}
folder=${2:-runs/quickstart}
job() { "$python" -m igpt_jax "$1" --workdir="$folder/$2" "${@:3}"; }

job prepare store --config.source=digits:train --config.test_source=digits:test
job pretrain pretrain --config=configs/pretrain.py:model=igpt_tiny --config.data.store="$folder/store" \
  --config.model.layers=4 --config.model.embed=64 \
  --config.steps=500 --config.batch_size=64 --config.precision=float32 --config.optimizer.warmup_steps=50 \
  --config.log_every_steps=25 --config.eval_every_steps=100 --config.checkpoint_every_steps=250
job evaluate evaluate --config.checkpoints="$folder/pretrain"
job probe probe --config.checkpoint="$folder/pretrain"
job finetune finetune --config=configs/finetune.py --config.checkpoint="$folder/pretrain" \
  --config.steps=300 --config.batch_size=64 --config.precision=float32 --config.optimizer.learning_rate=1e-3 \
  --config.log_every_steps=50 --config.eval_every_steps=100
job sample sample --config.checkpoint="$folder/pretrain" --config.data.store="$folder/store"
job report report --config.workdirs="$folder/*"

loss=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["metrics"]["eval/nats_per_pixel"])' \
  "$folder/pretrain/result.json")
cat <<END

Reached     $(printf %.3f "$loss") nats per pixel on held-out digits; guessing among 17 greys costs ln 17 = 2.833
Pictures    $folder/pretrain/figures/loss.png           the loss over the steps
            $folder/probe/figures/accuracy_by_layer.png   how much each layer knows of the ten classes
            $folder/finetune/result.json                test_accuracy: the same model, trained to classify as well
            $folder/sample/figures/samples.png          digits that nobody wrote
            $folder/sample/figures/completions.png      held-out digits: whole, upper half, four completions
All of it   $folder/report/report.html               one page, for any browser
Curves      tensorboard --logdir $folder/pretrain/tensorboard   (pip install tensorboard)
Try next    $python -m igpt_jax sample --workdir=$folder/cool --config.checkpoint=$folder/pretrain --config.temperature=0.7
            $python -m igpt_jax pretrain --help          every setting, with its unit
END
