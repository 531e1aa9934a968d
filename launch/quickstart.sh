#!/usr/bin/env bash
# From real handwritten digits to a trained, measured and sampled iGPT:  launch/quickstart.sh [PYTHON [FOLDER]]
# Rerunning resumes.
set -euo pipefail
if [[ ${1:-} == -* ]]; then
  echo "usage: $0 [PYTHON [FOLDER]]" >&2
  exit 2
fi
python=${1:-python3}
folder=${2:-runs/quickstart}
job() { "$python" -m igpt_jax "$1" --workdir="$folder/$2" "${@:3}"; }

job prepare store --config.source=digits:train --config.test_source=digits:test
job pretrain pretrain --config.data.store="$folder/store" --config.data.augment=shift \
  --config.model.name=igpt_tiny --config.model.layers=4 --config.model.embed=64 \
  --config.steps=3000 --config.batch_size=16 --config.optimizer.warmup_steps=50 \
  --config.log_every_steps=100 --config.eval_every_steps=500 --config.checkpoint_every_steps=1000
job evaluate evaluate --config.checkpoints="$folder/pretrain"
job probe probe --config.checkpoint="$folder/pretrain" --config.concatenate=3
job finetune finetune --config.checkpoint="$folder/pretrain" \
  --config.data.augment=shift --config.steps=900 --config.batch_size=32 \
  --config.optimizer.learning_rate=2e-3 --config.optimizer.schedule=cosine --config.optimizer.warmup_steps=30 \
  --config.log_every_steps=50 --config.eval_every_steps=150
job sample sample --config.checkpoint="$folder/pretrain" --config.data.store="$folder/store"
job report report --config.workdirs="$folder/*"

"$python" - "$folder" "$python" <<'END'
import json, sys

folder, python = sys.argv[1:]
read = lambda file: json.load(open(f"{folder}/{file}", encoding="utf-8"))
metrics = {job: read(f"{job}/result.json")["metrics"] for job in ("pretrain", "finetune", "probe")}
joined, = (row for row in read("probe/probe.json") if row["features"].startswith("layers "))
print(f"""
Learned     {metrics["pretrain"]["eval/nats_per_pixel"]:.3f} nats per pixel on held-out digits; guessing among 17 gray levels gives ln 17 = 2.833

Accuracy on 360 test digits, used neither for training nor for model selection:
  {metrics["finetune"]["test_accuracy"]:5.1%}     the pretrained model, fine-tuned on 1,293 labels
  {joined["test_accuracy"]:5.1%}     logistic regression on the features of {joined["features"]}; pretraining saw no label
  {metrics["probe"]["raw_pixel_accuracy"]:5.1%}     logistic regression on the raw pixels
  {metrics["probe"]["untrained_accuracy"]:5.1%}     logistic regression on the features of an untrained model

Pictures    {folder}/sample/figures/completions.png   held-out digits: the whole image, its upper half, four completions
            {folder}/sample/figures/samples.png       generated digits
Report      {folder}/report/report.html               all results on one page; open it in a browser
Try next    {python} -m igpt_jax demo --config.checkpoint={folder}/finetune   a page to play with the model
            {python} -m igpt_jax pretrain --help          every setting, with its unit""")
END
