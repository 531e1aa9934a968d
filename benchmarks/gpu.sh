#!/usr/bin/env bash
# Runs all benchmarks of a GPU, in slices of under nine minutes:
#   benchmarks/gpu.sh SLICE [PYTHON [FOLDER]]      SLICE: kernels, steps, flags, sampling, peers, or all
# Each figure is a file in FOLDER (default benchmarks/results/gpu). Existing ones are not measured again, so that
# rerunning an interrupted slice resumes it. TINY=1 tries this file with tiny shapes on any device.
# The slice `peers` and half of `sampling` need torch and transformers. If some candidates of a file fail, the figures
# of the others are saved, with a log.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
slice=${1:?"SLICE: kernels, steps, flags, sampling, peers, or all"}
python=${2:-python3}
folder=${3:-benchmarks/results/gpu}
tiny=${TINY:-}
limit=$((SECONDS + ${SLICE_SECONDS:-530}))
failed=0
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=3
mkdir -p "$folder"
theirs=16
"$python" -c 'import torch, transformers' 2>/dev/null || theirs=0

# measure NAME FILE.py ARGUMENTS...: writes FOLDER/NAME.json, and FOLDER/NAME.log if something fails.
measure() {
  local name=$1 left=$((limit - SECONDS))
  [ -s "$folder/$name.json" ] && return
  if [ "$left" -lt 20 ]; then
    echo "$name: no time left in this slice; run it again"
    failed=1
    return
  fi
  echo "+ $*"
  rm -f "$folder/.$name.json"
  if timeout "$left" "$python" "benchmarks/$2" "${@:3}" --json "$folder/.$name.json" 2>"$folder/$name.log"; then
    rm "$folder/$name.log"
  else
    echo "$name: exit code $?: $(tail -n 1 "$folder/$name.log")"
    failed=1
  fi
  [ -s "$folder/.$name.json" ] && mv "$folder/.$name.json" "$folder/$name.json"
}

# model side batch remat, as one H200 holds.
steps="igpt_s 32 128 attention
igpt_s 32 128 dots
igpt_s 32 128 none
igpt_s 48 64 attention
igpt_s 64 32 attention
igpt_m 32 64 dots
igpt_m 48 32 dots
igpt_m 64 16 dots
igpt_l 32 32 dots
igpt_l 48 16 dots
igpt_l 64 8 dots
igpt_xl 32 8 full
igpt_xl 48 4 full
igpt_xl 64 2 full"
peers="igpt_s 32 64 attention
igpt_m 32 16 dots
igpt_l 32 8 dots"
flag_sets="none
--xla_gpu_enable_latency_hiding_scheduler=true
--xla_gpu_triton_gemm_any=true
--xla_gpu_enable_cublaslt=true
--xla_gpu_enable_command_buffer="
kernels="32,1024,8,64 16,2304,8,64 8,4096,8,64 16,1024,16,96 8,1024,24,128"
samples="igpt_s 32 1024
igpt_l 32 256"
if [ -n "$tiny" ]; then
  steps="2x32x2 8 2 none" peers="2x32x2 8 2 none" flag_sets="none" kernels="1,64,2,16" samples="igpt_tiny 8 2"
fi

run_slice() {
  case $1 in
    kernels)
      for shape in $kernels; do
        measure "kernel_${shape//,/x}" attention.py --shape "$shape" --dtype bfloat16 --rounds 20
      done ;;
    steps)
      while read -r model side batch remat; do
        measure "step_${model}_${side}_$remat" train_step.py --model "$model" --side "$side" --batch "$batch" --remat "$remat" \
          --only "ours, bfloat16, 1 " --rounds 10
      done <<<"$steps"
      # XLA's own attention, to compare with cuDNN's.
      read -r model side batch remat <<<"$steps"
      measure "step_${model}_${side}_xla_attention" train_step.py --model "$model" --side "$side" --batch "$batch" \
        --remat "$remat" --attention reference --only "ours, bfloat16, 1 " --rounds 10 ;;
    flags)
      read -r model side batch remat <<<"$steps"
      while read -r flag; do
        name=${flag#--xla_gpu_}
        if [ "$flag" = none ]; then unset XLA_FLAGS; else export XLA_FLAGS=$flag; fi
        measure "flag_${name//[^a-z_]/}" train_step.py --model "$model" --side "$side" --batch "$batch" \
          --remat "$remat" --only "ours, bfloat16, 1 " --rounds 10
      done <<<"$flag_sets"
      unset XLA_FLAGS ;;
    sampling)
      while read -r model side batch; do
        measure "sample_$model" sampling.py --size "$model" --side "$side" --batch "$batch" --precision bfloat16 \
          --lengths "" --theirs "$theirs"
      done <<<"$samples" ;;
    peers)
      if [ "$theirs" = 0 ]; then
        echo "peers: $python has no torch or no transformers: pip install '.[huggingface]'"
        failed=1
        return
      fi
      while read -r model side batch remat; do
        measure "peers_${model}_$side" train_step.py --model "$model" --side "$side" --batch "$batch" --remat "$remat" \
          --rounds 10
      done <<<"$peers" ;;
    *)
      echo "gpu.sh: the slice '$1' is not known: kernels, steps, flags, sampling, peers, or all" >&2
      exit 2 ;;
  esac
}

if [ "$slice" = all ]; then
  for each in kernels steps flags sampling peers; do
    limit=$((SECONDS + ${SLICE_SECONDS:-530}))
    run_slice "$each"
  done
else
  run_slice "$slice"
fi
exit "$failed"
