#!/usr/bin/env bash
# From real handwritten digits to a trained, measured and sampled iGPT:  launch/quickstart.sh [PYTHON [FOLDER]]
# Rerunning resumes.
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

Result      $(printf %.3f "$loss") nats per pixel on held-out digits; uniform guessing among 17 gray levels gives ln 17 = 2.833
Figures     $folder/pretrain/figures/loss.png           loss curves
            $folder/probe/figures/accuracy_by_layer.png   linear-probe accuracy of each layer
            $folder/sample/figures/samples.png          generated digits
            $folder/sample/figures/completions.png      held-out digits: the whole image, its upper half, four completions
Fine-tuned  $folder/finetune/result.json                test_accuracy of the fine-tuned classifier
Report      $folder/report/report.html               all results on one page; open it in a browser
Curves      tensorboard --logdir $folder/pretrain/tensorboard   (pip install tensorboard)
Try next    $python -m igpt_jax sample --workdir=$folder/cool --config.checkpoint=$folder/pretrain --config.temperature=0.7
            $python -m igpt_jax pretrain --help          every setting, with its unit
END
