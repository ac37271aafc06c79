#!/usr/bin/env bash
# Inside a Slurm job: start one process per task with srun, and requeue the job if the processes request it.
#
#   slurm/ranks.sh [--OPTION=VALUE OF SRUN ...] .venv/bin/python tools/train.py --config my_run.yaml
#
# Slurm does not requeue a job that ends within the grace time of its preemption, because such a job counts as completed.
# So the tools exit with EXIT_REQUEUE after they have saved, and this script requeues the job.
#
# When one task fails, srun ends the others with SIGTERM and returns the highest exit status of all tasks. This could be
# the EXIT_REQUEUE of another task. So each task exits with a status that depends on the cause, in this order: killed by
# a signal > failed > stopped because of another task.
set -uo pipefail

EXIT_REQUEUE=75   # as in trainer/runtime/exit_codes.py
EXIT_PEER_LOST=76 # as in trainer/runtime/exit_codes.py
FAILED=192        # a task failed: FAILED + the tool's own status, which is below 62
KILLED=254        # a task was killed by a signal: out of memory, a hardware fault, the watchdog
SRUN_KILLED=137   # status of srun for a killed task
# Needed because only trainings and evaluations count restarts without progress themselves (max_restarts).
MAX_RESTARTS=10
# Limit for the other tasks after one has ended. Without it srun would wait forever after a short loss of a node.
WAIT_SECONDS=120

main() {
    local status job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    # Only the ranks handle Slurm's signals. This shell waits until the ranks have saved.
    trap : TERM USR1
    # Since Slurm 22.05 srun does not inherit --cpus-per-task from the job.
    local options=(--kill-on-bad-exit=1 --wait="$WAIT_SECONDS" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")
    if scontrol show config | grep '^TaskPlugin .*\(affinity\|cgroup\)' >/dev/null; then
        options+=(--cpu-bind=cores)
    fi
    while [[ $1 == -* ]]; do
        options+=("$1")
        shift
    done
    srun "${options[@]}" bash -c "$(declare -p EXIT_REQUEUE EXIT_PEER_LOST FAILED KILLED); $(declare -f task); task \"\$@\"" task "$@"
    status=$?
    # Child processes do not inherit a trap, so a late signal would kill them. They inherit an ignored signal.
    trap '' TERM USR1
    if ((status != 0)) && may_requeue "$status" "$job"; then
        local state
        state=$(job_field JobState "$job")
        # A cancelled job must not be requeued. A job is SIGNALING until all its nodes have confirmed the signal, even if
        # its ranks have already ended.
        if [[ $state == RUNNING || $state == SIGNALING ]] && scontrol requeue "$job"; then
            echo "ranks.sh: $(status_text "$status"), the job is requeued and will resume from the files on disk"
            # Wait until Slurm ends this script. If the script exited first, the job would count as failed.
            trap - TERM
            sleep 300
        else
            echo "ranks.sh: $(status_text "$status"), the job (${state:-state unknown}) is not requeued; submit it again to continue"
        fi
    fi
    if ((status == KILLED)); then
        exit "$SRUN_KILLED"
    elif ((status >= FAILED)); then
        exit $((status - FAILED))
    fi
    exit "$status"
}

# One task of srun: run the command, and exit with a status that depends on the cause (see above).
task() {
    local status signalled=""
    trap 'signalled=yes' TERM USR1
    "$@"
    status=$?
    # srun signals the processes of a task one by one, so the command may end before this shell gets the signal.
    ((status == 0)) || [[ $signalled ]] || sleep 1
    if ((status == 0)) || [[ $signalled ]]; then
        exit $((status ? EXIT_REQUEUE : 0))
    elif ((status > 128 && status != 130)); then # 130: Ctrl-C
        exit "$KILLED"
    elif ((status != EXIT_REQUEUE && status != EXIT_PEER_LOST)); then
        exit $((FAILED + (status < 62 ? status : 1)))
    fi
    exit "$status"
}

# While a job is being preempted, any exit status of its ranks is attributed to the preemption.
may_requeue() {
    case $1 in
    "$EXIT_REQUEUE") true ;;
    "$EXIT_PEER_LOST" | "$KILLED" | "$SRUN_KILLED") ((${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)) || is_preempted "$2" ;;
    *) is_preempted "$2" ;;
    esac
}

status_text() {
    case $1 in
    "$EXIT_REQUEUE") echo "stop requested" ;;
    "$EXIT_PEER_LOST") echo "a rank was lost" ;;
    "$KILLED" | "$SRUN_KILLED") echo "a rank was killed" ;;
    *) echo "status $1" ;;
    esac
}

is_preempted() {
    [[ $(job_field PreemptTime "$1") == 20* ]]
}

# Print a field of the job, or nothing. Retry for 5 minutes, because slurmctld may be busy or restarting.
job_field() {
    local attempt fields
    for attempt in {1..60}; do
        if fields=$(scontrol --oneliner show job "$2"); then
            tr ' ' '\n' <<<"$fields" | sed -n "s/^$1=//p"
            return
        fi
        sleep 5
    done
}

main "$@"
