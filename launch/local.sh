#!/usr/bin/env bash
# Runs one job as N processes on this machine:  launch/local.sh N JOB ARGUMENTS...
#
#   launch/local.sh 2 pretrain --config=configs/pretrain.py --workdir=runs/two --config.data.store=runs/digits
#
# Each process sees one GPU where there are GPUs. SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 make all save and stop at
# the same step (exit code 75). When one fails the others are stopped; the first failure's exit code is returned. Needs bash 5.1.
set -uo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 N JOB ARGUMENTS..." >&2
  exit 2
fi
count=$1
shift
python=${PYTHON:-python3}
echo "$count processes: $python -m igpt_jax $*" >&2
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

label() {
  trap '' INT TERM HUP USR1 USR2  # Ctrl-C must not end sed before the processes have reported
  sed -u "s/^/[$1] /"
}

if [[ -v CUDA_VISIBLE_DEVICES && -z $CUDA_VISIBLE_DEVICES ]]; then export CUDA_VISIBLE_DEVICES=-1; fi  # hides all
gpus=() # those that the caller may use; none: all
if [[ ${CUDA_VISIBLE_DEVICES:-} != -1 && ${JAX_PLATFORMS:-} != cpu ]]; then
  IFS=, read -ra gpus <<< "${CUDA_VISIBLE_DEVICES:-}"
fi
if ((${#gpus[@]} && count > ${#gpus[@]})); then
  echo "$0: $count processes for CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES. Start ${#gpus[@]}, or name more GPUs." >&2
  exit 2
fi
declare -A running  # process id -> process number
for ((i = 0; i < count; i++)); do
  if ((count > 1)); then
    export IGPT_COORDINATOR=127.0.0.1:$port IGPT_PROCESSES=$count IGPT_PROCESS_ID=$i
    if [[ ${CUDA_VISIBLE_DEVICES:-} != -1 ]]; then export CUDA_VISIBLE_DEVICES=${gpus[i]:-$i}; fi
  fi
  "$python" -m igpt_jax "$@" > >(label "$i") 2> >(label "$i" >&2) &
  running[$!]=$i
done

trap 'kill -TERM "${!running[@]}" 2>/dev/null' INT TERM HUP USR1 USR2
code=0
while ((${#running[@]})); do
  wait -n -p ended "${!running[@]}"
  status=$?
  [[ -z ${ended:-} ]] && continue  # a signal woke us, not the end of a process
  number=${running[$ended]}
  unset "running[$ended]"
  ((status == 0)) && continue
  ((code == 0)) && code=$status
  # A process that was asked to stop ends with 75, and so will the others. After any other failure they would wait for
  # it in a collective, deaf to SIGTERM; they get a moment to report an error of their own.
  if ((status != 75 && ${#running[@]})); then
    echo "process $number ended with exit code $status: stopping the others" >&2
    sleep 3
    kill -KILL "${!running[@]}" 2>/dev/null
    break
  fi
done
wait 2>/dev/null  # for the last lines
exit "$code"
