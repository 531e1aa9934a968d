#!/usr/bin/env bash
# Prints a manifest with its variables filled in, and on stderr the command that its containers run:
#
#   NAME=igpt-l IMAGE=REGISTRY/igpt:1 CONFIG=configs/igpt_l.py WORKDIR=gs://BUCKET/igpt_l STORE=gs://BUCKET/imagenet32 \
#   ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=4x4 SLICES=1 HOSTS=4 DEVICES=4 launch/gke/render.sh tpu.yaml | kubectl apply -f -
#
#   gpu.yaml     NAME IMAGE CONFIG WORKDIR STORE ACCELERATOR (nvidia-h100-80gb) HOSTS DEVICES (of a node)
#   slices.yaml  NAME IMAGE JOB (prepare, evaluate or scaling) CONFIG (configs/prepare.py:source=tar:gs://BUCKET/*.tar,image_size=32
#   merge.yaml   or configs/evaluate.py:checkpoints=gs://BUCKET/igpt_l/checkpoints/*) WORKDIR COUNT CPUS GPUS (0 or 1)
set -euo pipefail

case ${1:-} in
  tpu.yaml | gpu.yaml | slices.yaml | merge.yaml) manifest=$(dirname "$0")/$1 ;;
  *) echo "usage: VARIABLE=value ... $0 tpu.yaml|gpu.yaml|slices.yaml|merge.yaml" >&2; exit 2 ;;
esac
text=$(< "$manifest")
names=$(grep -v '^#' "$manifest" | tr '$' '\n' | sed -n 's/^{\([A-Z]*\)}.*/\1/p' | sort -u)
for name in $names; do
  value=${!name:-}
  # Values that YAML or Kubernetes would not read as a single word are refused.
  case $name in
    NAME) allowed='^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$' ;;
    GPUS) allowed='^[0-9]$' ;;
    SLICES | HOSTS | DEVICES | COUNT | CPUS) allowed='^[1-9][0-9]{0,5}$' ;;
    *) allowed='^[A-Za-z0-9_.,:/@*?=+()-]+$' ;;
  esac
  if [[ ! $value =~ $allowed ]]; then
    echo "$1: $name='$value' must match $allowed. Set it: $name=... $0 $1" >&2
    exit 2
  fi
  text=${text//"\${$name}"/$value}
done
awk '/command:/ { on = 1; next } on && /^ *- / { sub(/^ *- /, ""); printf "%s ", $0; next } { on = 0 }' <<< "$text" >&2
echo >&2
grep -v '^#' <<< "$text"
