#!/usr/bin/env bash
# A real two-node Slurm on one machine, to try a job before it costs an allocation:  slurm/dev_cluster.sh up|status|down
#
# Starts slurmctld, a slurmd for each of the nodes n1 and n2, and munged, with their own ports, sockets and files in
# ${DEV_CLUSTER_DIR:-/tmp/dev_cluster.$USER}. It does not affect the system's Slurm and needs no root: jobs run as you.
set -euo pipefail

DIRECTORY=${DEV_CLUSTER_DIR:-${TMPDIR:-/tmp}/dev_cluster.$(id -un)}
CONF=$DIRECTORY/slurm.conf
PATH=$PATH:${DEV_CLUSTER_SBIN-/usr/sbin:/usr/local/sbin:/sbin} # daemons are not on a user's PATH
# Nodes are declared larger than the machine, so that jobs of both partitions run at the same time.
CPUS_PER_NODE=${DEV_CLUSTER_CPUS:-8}
GRACE_SECONDS=${DEV_CLUSTER_GRACE:-30}
KILL_WAIT_SECONDS=${DEV_CLUSTER_KILL_WAIT:-30}
NODE_LOST_SECONDS=${DEV_CLUSTER_NODE_LOST:-30}
REQUEUE_WAIT_SECONDS=${DEV_CLUSTER_REQUEUE_WAIT:-120} # Slurm's default: a requeued job waits until its credentials have expired

main() {
    case ${1:-} in
    up | status | down) "$1" ;;
    *)
        echo "usage: slurm/dev_cluster.sh up|status|down" >&2
        exit 2
        ;;
    esac
}

up() {
    check_packages
    if is_up; then
        echo "already up"
    else
        down >/dev/null # remains of an earlier start
        # Slurm and munge reject files that other users may write; the socket must be reachable.
        install --directory --mode=755 "$DIRECTORY" "$DIRECTORY/munge"
        install --directory --mode=700 "$DIRECTORY/state" "$DIRECTORY/n1" "$DIRECTORY/n2" "$DIRECTORY/logs" "$DIRECTORY/munge/private"
        start_munged
        write_configuration
        start_daemons
        wait_until_idle
    fi
    usage
}

status() {
    if ! is_up; then
        echo "down ($DIRECTORY)"
        exit 1
    fi
    SLURM_CONF=$CONF sinfo --format='%P %a %.6D %t %N' | column -t
    SLURM_CONF=$CONF squeue
    usage
}

down() {
    if is_up; then
        SLURM_CONF=$CONF scancel --quiet --full --state=RUNNING,SUSPENDED,PENDING --user="$(id -un)" 2>/dev/null || true
    fi
    local deadline=$((SECONDS + 90)) signal=TERM pids
    while pids=$(cluster_processes) && [[ -n $pids ]]; do
        # shellcheck disable=SC2086
        kill -"$signal" $pids 2>/dev/null || true
        sleep 0.2
        if ((SECONDS > deadline - 80)); then signal=KILL; fi
        if ((SECONDS > deadline)); then
            echo "cannot end processes $pids" >&2
            exit 1
        fi
    done
    rm -rf "$DIRECTORY"
    echo "down"
}

check_packages() {
    local missing="" command
    local -A package=([slurmctld]=slurmctld [slurmd]=slurmd [sbatch]=slurm-client [srun]=slurm-client [munged]=munge)
    for command in slurmctld slurmd sbatch srun munged; do
        if ! type -P "$command" >/dev/null && [[ " $missing " != *" ${package[$command]} "* ]]; then
            missing="${missing:+$missing }${package[$command]}"
        fi
    done
    if [[ -n $missing ]]; then
        echo "error: missing packages: $missing; on Debian or Ubuntu: apt-get install slurm-wlm munge" >&2
        exit 3
    fi
}

is_up() {
    [[ -f $CONF ]] && SLURM_CONF=$CONF timeout 20 scontrol ping 2>/dev/null | grep -q "is UP"
}

start_munged() {
    local key=$DIRECTORY/munge/private/key
    (umask 077 && head -c 1024 /dev/urandom >"$key")
    chmod 400 "$key"
    DEV_CLUSTER_OF=$DIRECTORY munged --force --key-file="$key" --socket="$DIRECTORY/munge/socket" \
        --pid-file="$DIRECTORY/munge/private/pid" --log-file="$DIRECTORY/munge/private/log" \
        --seed-file="$DIRECTORY/munge/private/seed" 2>/dev/null
}

write_configuration() {
    local host port node nodes=""
    host=$(hostname -s)
    port=$(free_ports 3)
    cat >"$CONF" <<-END
	ClusterName=dev
	SlurmctldHost=$host(127.0.0.1)
	SlurmctldPort=$port
	SlurmUser=$(id -un)
	SlurmdUser=$(id -un)
	AuthType=auth/munge
	AuthInfo=socket=$DIRECTORY/munge/socket,cred_expire=$REQUEUE_WAIT_SECONDS
	CredType=cred/munge
	StateSaveLocation=$DIRECTORY/state
	SlurmctldPidFile=$DIRECTORY/state/slurmctld.pid
	SlurmctldLogFile=$DIRECTORY/logs/slurmctld.log
	SlurmdSpoolDir=$DIRECTORY/%n
	SlurmdPidFile=$DIRECTORY/%n/slurmd.pid
	SlurmdLogFile=$DIRECTORY/logs/slurmd-%n.log
	# Without cgroups, to run in a container as well: limits of memory and cores are not enforced.
	ProctrackType=proctrack/linuxproc
	TaskPlugin=task/none
	JobAcctGatherType=jobacct_gather/none
	SelectType=select/cons_tres
	SelectTypeParameters=CR_CPU
	SlurmdParameters=config_overrides
	# A job in the partition "high" preempts jobs in "low"; they have the grace time to save, and are requeued.
	PreemptType=preempt/partition_prio
	PreemptMode=REQUEUE
	SchedulerParameters=bf_interval=2,batch_sched_delay=0,sched_min_interval=0
	AccountingStorageType=accounting_storage/none
	JobCompType=jobcomp/filetxt
	JobCompLoc=$DIRECTORY/logs/completed_jobs.txt
	EnforcePartLimits=ALL
	KillWait=$KILL_WAIT_SECONDS
	SlurmdTimeout=$NODE_LOST_SECONDS
	MessageTimeout=30
	ReturnToService=2
	MailProg=/bin/true
	GresTypes=gpu
	PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE_SECONDS DefaultTime=60 MaxTime=1440
	PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF DefaultTime=60 MaxTime=1440
	END
    for node in n1 n2; do
        port=$((port + 1))
        echo "NodeName=$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$port CPUs=$CPUS_PER_NODE Gres=gpu:pretended:4" >>"$CONF"
    done
    # Simulated devices, so that scripts that request GPUs can be tried; they use the CPU.
    printf "NodeName=n[1-2] Name=gpu Type=pretended File=/dev/%s\n" null zero full random >"$DIRECTORY/gres.conf"
}

# Print the first of N adjacent unused ports, below the range of ephemeral ports.
free_ports() {
    local first offset
    for _ in {1..50}; do
        first=$((10000 + RANDOM % 9000))
        for ((offset = 0; offset < $1; offset++)); do
            (: <"/dev/tcp/127.0.0.1/$((first + offset))") 2>/dev/null && continue 2
        done
        echo "$first"
        return
    done
    echo "error: no free ports between 10000 and 19000" >&2
    exit 1
}

start_daemons() {
    local node
    export SLURM_CONF=$CONF
    DEV_CLUSTER_OF=$DIRECTORY slurmctld -f "$CONF" -i
    for node in n1 n2; do
        DEV_CLUSTER_OF=$DIRECTORY slurmd -N "$node" -f "$CONF"
    done
}

wait_until_idle() {
    local deadline=$((SECONDS + 90))
    until [[ $(SLURM_CONF=$CONF sinfo --noheader --partition=low --format=%T 2>/dev/null) == idle ]]; do
        if ((SECONDS > deadline)); then
            echo "error: the cluster does not come up; see $DIRECTORY/logs" >&2
            tail -n 5 "$DIRECTORY"/logs/*.log >&2
            exit 1
        fi
        sleep 0.2
    done
}

# Print the pids of this cluster. Daemons have DEV_CLUSTER_OF in their environment, jobs SLURM_CONF and SLURM_JOB_ID;
# slurmstepd, which overwrites its environment, has a working directory below $DIRECTORY.
cluster_processes() {
    local process variables name
    for process in /proc/[0-9]*; do
        variables=$'\n'$(tr '\0' '\n' 2>/dev/null <"$process/environ" || true)$'\n'
        name=$(cat "$process/comm" 2>/dev/null || true)
        if [[ $variables == *$'\n'"DEV_CLUSTER_OF=$DIRECTORY"$'\n'* ]] ||
            [[ $variables == *$'\n'"SLURM_CONF=$CONF"$'\n'* && $variables == *$'\n'"SLURM_JOB_ID="* ]] ||
            [[ $name == slurm* && $(readlink "$process/cwd" 2>/dev/null) == "$DIRECTORY"/* ]]; then
            [[ ${process#/proc/} != "$$" ]] && echo "${process#/proc/}"
        fi
    done
}

usage() {
    cat <<-END
	partitions: low (default; preempted by high after $GRACE_SECONDS s of grace, then requeued), high
	use it:     export SLURM_CONF=$CONF
	then:       sinfo; sbatch slurm/train.sbatch --config my_run.yaml; squeue
	logs:       $DIRECTORY/logs
	end it:     slurm/dev_cluster.sh down
	END
}

main "$@"
