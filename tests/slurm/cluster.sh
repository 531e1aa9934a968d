#!/usr/bin/env bash
# A SLURM cluster of two nodes on this machine, for tests:  tests/slurm/cluster.sh up|down|down-node N|up-node N FOLDER
#
# Needs Debian's slurm-wlm and munge, and root: n1 and n2, as SLURM calls the nodes, become names of this machine in
# /etc/hosts. Everything else lies in FOLDER; SLURM_CONF=FOLDER/slurm.conf makes it the cluster of SLURM's commands.
set -euo pipefail
[[ $# -ge 2 ]] || { echo "usage: $0 up|down|up-node|down-node [n1|n2] FOLDER" >&2; exit 2; }
verb=$1 folder=$(realpath -m "${!#}")
mark='# igpt_jax: nodes of tests/slurm/cluster.sh'

configure() {
  mkdir -p "$folder"/{state,n1,n2,log}
  hostname=$(hostname -s)
  cat > "$folder/slurm.conf" << END
ClusterName=igpt
SlurmctldHost=$hostname(127.0.0.1)
SlurmctldPort=17817
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
# A job that was requeued may start after cred_expire seconds (else 120).
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# Quick to notice and to forgive: a node that is silent for 10 s is down, and back when it reports.
SlurmdTimeout=10
ReturnToService=2
InactiveLimit=0
KillWait=10
WaitTime=0
SchedulerParameters=sched_min_interval=200000,batch_sched_delay=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname=$hostname NodeAddr=127.0.0.1 Port=17818 CPUs=2
NodeName=n2 NodeHostname=$hostname NodeAddr=127.0.0.1 Port=17819 CPUs=2
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=2
END
}

# The node's daemon and all that it started, at once, as when its power goes.
node_down() {
  kill -KILL "$(cat "$folder/slurmd-$1.pid")"
  for step in $(pgrep slurmstepd); do
    if readlink "/proc/$step/fd"/* | grep -qx "$folder/log/slurmd-$1.log"; then
      descendants "$step" | xargs -r kill -KILL 2> /dev/null || true
    fi
  done
}

descendants() {
  local child
  for child in $(pgrep -P "$1"); do descendants "$child"; done
  echo "$1"
}

export SLURM_CONF=$folder/slurm.conf
case $verb in
  up)
    configure
    for node in n1 n2; do
      grep -q "^127.0.0.1 $node " /etc/hosts || echo "127.0.0.1 $node $mark" >> /etc/hosts
    done
    head -c 1024 /dev/urandom > "$folder/munge.key"
    chmod 400 "$folder/munge.key"
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
      --log-file="$folder/log/munged.log" --seed-file="$folder/munged.seed"
    slurmctld
    slurmd -N n1
    slurmd -N n2
    for ((try = 0; try < 100; try++)); do
      [[ $(sinfo -h -N -p main -o %t 2> /dev/null | grep -c idle) == 2 ]] && exit 0
      sleep 0.3
    done
    echo "the nodes do not come up; see $folder/log" >&2
    exit 1
    ;;
  down)
    scancel --user="$(id -un)" 2> /dev/null || true
    for name in slurmd-n1 slurmd-n2 slurmctld munged; do
      [[ -s $folder/$name.pid ]] && kill "$(cat "$folder/$name.pid")" 2> /dev/null || true
    done
    hosts=$(grep -v "$mark" /etc/hosts)
    echo "$hosts" > /etc/hosts  # in place: containers mount the file
    ;;
  up-node) slurmd -N "$2" ;;
  down-node) node_down "$2" ;;
  *) echo "not known: $verb" >&2 && exit 2 ;;
esac
