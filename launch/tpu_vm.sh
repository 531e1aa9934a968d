#!/usr/bin/env bash
# Runs a job on TPU VMs, on all workers of one or several slices:
#
#   export NAME=igpt-l ZONE=us-west4-a TYPE=v5litepod-16        and SLICES=2, QUEUE="--spot", RUNTIME=..., EXTRAS=tpu,gcs
#   launch/tpu_vm.sh create                                     queues for the machines, waits, installs this checkout
#   launch/tpu_vm.sh run pretrain --config=configs/igpt_l.py --workdir=gs://BUCKET/igpt_l --config.data.store=gs://...
#   launch/tpu_vm.sh stop                                       sends SIGTERM: all processes save and stop
#   launch/tpu_vm.sh delete
#
# The workers find each other through the metadata server. `create` resumes after an interruption. `run` resumes by
# itself after exit codes 76 and 134, up to MAX_RESTARTS (100) times. After a stop (75), or a preemption (delete,
# create), the same `run` command resumes. DRY_RUN=1 shows the commands.
set -euo pipefail

usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
cloud() {
  printf '+ gcloud' >&2
  printf ' %q' "$@" >&2
  echo >&2
  [[ -n ${DRY_RUN:-} ]] || gcloud "$@"
}
everywhere() { cloud compute tpus queued-resources "$1" "${@:2}" --zone="$ZONE" --worker=all --node=all --batch-size=all; }

[[ $# -ge 1 && $1 != -* ]] || usage
for variable in NAME ZONE TYPE; do
  if [[ ! ${!variable:-} =~ ^[a-z0-9][-a-z0-9]*$ ]]; then
    echo "$0: $variable='${!variable:-}' must be a word such as igpt-l. Export it." >&2
    exit 2
  fi
done
verb=$1
shift
case $verb in
  create)
    read -ra queue <<< "${QUEUE:-}"
    nodes=(--node-id="$NAME")
    ((${SLICES:-1} == 1)) || nodes=(--node-count="$SLICES" --node-prefix="$NAME")
    describe=(compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)')
    if [[ -n ${DRY_RUN:-} ]] || ! gcloud "${describe[@]}" >/dev/null 2>&1; then
      cloud compute tpus queued-resources create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
        --runtime-version="${RUNTIME:-tpu-ubuntu2204-base}" "${nodes[@]}" "${queue[@]}"
    fi
    misses=0
    until [[ ${state:-} == ACTIVE ]]; do
      state=$(cloud "${describe[@]}") && misses=0 || ((++misses < 10)) || exit 1 # perhaps the network: it looks again
      [[ -n ${DRY_RUN:-} ]] && state=ACTIVE
      case $state in
        FAILED | SUSPENDED | SUSPENDING) echo "the request is $state: delete it and create it again" >&2; exit 1 ;;
        ACTIVE) ;;
        *) sleep 30 ;;
      esac
    done
    archive=$(mktemp)
    tar -czf "$archive" -C "$(dirname "$0")/.." igpt_jax configs setup.py setup.cfg pyproject.toml \
      constraints.txt constraints-buckets.txt README.md LICENSE launch
    everywhere scp "$archive" "$NAME:igpt.tar.gz"
    rm "$archive"
    everywhere ssh "$NAME" --command="mkdir -p igpt && tar -xzf igpt.tar.gz -C igpt && cd igpt && \
sudo apt-get update -qq && sudo apt-get install -qq -y python3.11-venv && python3.11 -m venv .venv && \
launch/install.sh .venv/bin/pip ${EXTRAS:-tpu,gcs}"
    ;;
  run)
    [[ $# -ge 1 ]] || usage
    command="cd igpt && .venv/bin/python -m igpt_jax$(printf ' %q' "$@")"
    echo "on all workers of $NAME: $command" >&2
    # gcloud ends with the code of the first worker that failed. If another one ended with a bug (1), bad input (2) or
    # divergence (77), a restart would end the same way.
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    for ((restarts = 0; ; restarts++)); do
      code=0
      everywhere ssh "$NAME" --command="$command" 2> >(tee "$log" >&2) || code=$?
      wait # for tee
      [[ $code == 76 || $code == 134 ]] && ((restarts < ${MAX_RESTARTS:-100})) || exit "$code"
      if grep -qE 'failed with exit status (1|2|77)\b' "$log"; then exit "$code"; fi
      echo "exit code $code: resuming" >&2
      sleep "${PAUSE:-10}"
    done
    ;;
  stop) everywhere ssh "$NAME" --command="pkill -TERM -f 'python -m igpt_jax'" ;;
  delete) cloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet ;;
  *) usage ;;
esac
