#!/usr/bin/env bash
# Inside a Slurm job: start one process for each of its tasks, and ask for a restart if they were told to stop.
#
#   slurm/ranks.sh [OPTIONS OF SRUN] .venv/bin/python tools/train.py --config my_run.yaml
#
# A job that ends within the grace time of its preemption counts as completed and is *not* requeued by Slurm, even if it
# only saved. So the tools end with a status of their own when they want to go on, and the job requeues itself.
set -uo pipefail

GO_ON_LATER=75   # trainer/terminal.py: told to stop, what is done is kept
ENDED_BY_TERM=143 # before the tool listened, or a tool that has nothing to save
ENDED_BY_USR1=138

main() {
    local status job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    # Slurm's signals are for the ranks: this shell waits until they have saved.
    trap : TERM USR1
    # Since Slurm 22.05 srun no longer takes --cpus-per-task from the job by itself.
    local options=(--kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")
    if scontrol show config | grep '^TaskPlugin .*\(affinity\|cgroup\)' >/dev/null; then
        options+=(--cpu-bind=cores)
    fi
    srun "${options[@]}" "$@"
    status=$?
    # A trap is not inherited by the commands that follow, and a late signal would kill them; "ignore" is inherited.
    trap '' TERM USR1
    if ((status != 0)) && told_to_stop "$status" "$job"; then
        local state
        state=$(fact JobState "$job")
        # A cancelled job is no longer running, and requeuing it would bring it back to life. A job is SIGNALING as long
        # as not all of its nodes have confirmed the signal that the ranks have followed already.
        if [[ $state == RUNNING || $state == SIGNALING ]] && scontrol requeue "$job"; then
            echo "ranks.sh: status $status, the job is requeued and will go on from what is on disk"
            # Slurm ends this script: one that ended by itself meanwhile would report a failed job.
            trap - TERM
            sleep 300
        else
            echo "ranks.sh: status $status, the job (${state:-state unknown}) is not requeued; submit it again to go on"
        fi
    fi
    exit "$status"
}

told_to_stop() {
    (($1 == GO_ON_LATER || $1 == ENDED_BY_TERM || $1 == ENDED_BY_USR1)) || is_preempted "$2"
}

# While a job is being preempted, whatever its ranks end with is the preemption's doing.
is_preempted() {
    [[ $(fact PreemptTime "$1") == 20* ]]
}

# A field of our job; slurmctld may be too busy to answer at once.
fact() {
    local attempt told
    for attempt in {1..10}; do
        told=$(scontrol --oneliner show job "$2" | tr ' ' '\n' | sed -n "s/^$1=//p")
        if [[ -n $told ]]; then
            echo "$told"
            return
        fi
        sleep 1
    done
}

main "$@"
