#!/usr/bin/env bash
# slurm_cluster.sh DIR: a SLURM cluster of two nodes on this machine, in namespaces of its own.
#
# Needs root and Debian's slurm-wlm and munge. Runs until its standard input ends, then takes all
# down. DIR/pid is the process whose namespaces commands enter: nsenter -t "$(cat DIR/pid)" -m -n.
# Nodes have awkward names, addresses that are no loopback, and two CPUs each; no cgroups, no GPUs.
set -euo pipefail

if [[ ${2:-} != inside ]]; then
  mkdir -p "$1"
  exec unshare --mount --net -- "$0" "$(cd "$1" && pwd)" inside
fi
D=$1
NODES=(rack001-ib rack002-ib)

ip link set lo up
ip addr add 10.77.8.1/32 dev lo
{
  echo "127.0.0.1 localhost"
  echo "10.77.8.1 $(hostname) ${NODES[*]}"
} >"$D/hosts"
mount --bind "$D/hosts" /etc/hosts

mkdir -p "$D"/{munge,run,state,log,spool.rack001-ib,spool.rack002-ib}
chmod 700 "$D/munge"
chmod 755 "$D" "$D/run"
dd if=/dev/urandom of="$D/munge/key" bs=1024 count=1 status=none
chmod 400 "$D/munge/key"
cat >"$D/slurm.conf" <<CONF
ClusterName=cwcl
SlurmctldHost=$(hostname)(10.77.8.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job may start again after this many seconds and one more.
AuthInfo=socket=$D/run/munge.socket,cred_expire=5
SlurmctldPort=17200
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd.%n.pid
SlurmdSpoolDir=$D/spool.%n
StateSaveLocation=$D/state
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
SlurmdTimeout=10
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=bf_interval=1,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PropagateResourceLimits=NONE
ReturnToService=2
KillWait=5
MinJobAge=30
SlurmdParameters=config_overrides
NodeName=rack001-ib NodeHostname=$(hostname) NodeAddr=10.77.8.1 Port=17201 CPUs=2 RealMemory=4000
NodeName=rack002-ib NodeHostname=$(hostname) NodeAddr=10.77.8.1 Port=17202 CPUs=2 RealMemory=4000
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$D/slurm.conf

down() {
  scancel --signal=KILL --user=root 2>/dev/null || true
  for file in "$D"/slurmd.*.pid "$D/slurmctld.pid" "$D/munge/munged.pid"; do
    # KILL: a slurmd that is asked to end waits for steps which will not come.
    [[ -r $file ]] && kill -KILL "$(cat "$file")" 2>/dev/null || true
  done
}
trap down EXIT

munged --force --key-file="$D/munge/key" --socket="$D/run/munge.socket" \
  --pid-file="$D/munge/munged.pid" --log-file="$D/log/munged.log" --seed-file="$D/munge/seed"
slurmctld -f "$SLURM_CONF"
for node in "${NODES[@]}"; do slurmd -f "$SLURM_CONF" -N "$node"; done
# Whole or not at all: who waits for the file reads it at once.
echo $$ >"$D/pid.new" && mv "$D/pid.new" "$D/pid"
cat >/dev/null
