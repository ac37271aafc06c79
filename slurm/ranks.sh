#!/usr/bin/env bash
# Inside a Slurm job: start one process for each of its tasks, and ask for a restart if that is what they need.
#
#   slurm/ranks.sh [--OPTION=VALUE OF SRUN ...] .venv/bin/python tools/train.py --config my_run.yaml
#
# A job that ends within the grace time of its preemption counts as completed and is *not* requeued by Slurm, even if it
# only saved. So the tools end with a status of their own when they want to go on, and the job requeues itself.
#
# As soon as one task has ended badly srun ends the others, and tells the highest status of all: a wrong setting would
# look as if the job had been told to stop. So each task says whether it was told to end or ended by itself, and why, in
# numbers that are ordered: an accident counts more than a failure, and a failure more than what follows from it.
set -uo pipefail

GO_ON_LATER=75 # trainer/runtime/terminal.py: told to stop, what is done is kept
LOST_OTHERS=76 # trainer/runtime/terminal.py: a rank is gone, says one that needed it
FAILED=192     # + the tool's own status, which is below 62
ACCIDENT=254   # killed by a signal: out of memory, a fault of the hardware, the watchdog
KILLED=137     # srun's word for it
# Trainings and evaluations count restarts without progress themselves (max_restarts); other tools do not.
MOST_RESTARTS=10
# Ranks end together. Of a node that was away for a moment srun hears nothing, and would wait for ever.
SECONDS_FOR_THE_OTHERS=120

main() {
    local status job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    # Slurm's signals are for the ranks: this shell waits until they have saved.
    trap : TERM USR1
    # Since Slurm 22.05 srun no longer takes --cpus-per-task from the job by itself.
    local options=(--kill-on-bad-exit=1 --wait="$SECONDS_FOR_THE_OTHERS" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")
    if scontrol show config | grep '^TaskPlugin .*\(affinity\|cgroup\)' >/dev/null; then
        options+=(--cpu-bind=cores)
    fi
    while [[ $1 == -* ]]; do
        options+=("$1")
        shift
    done
    srun "${options[@]}" bash -c "$(declare -p GO_ON_LATER LOST_OTHERS FAILED ACCIDENT); $(declare -f task); task \"\$@\"" task "$@"
    status=$?
    # A trap is not inherited by the commands that follow, and a late signal would kill them; "ignore" is inherited.
    trap '' TERM USR1
    if ((status != 0)) && may_go_on "$status" "$job"; then
        local state
        state=$(fact JobState "$job")
        # A cancelled job is no longer running, and requeuing it would bring it back to life. A job is SIGNALING as long
        # as not all of its nodes have confirmed the signal that the ranks have followed already.
        if [[ $state == RUNNING || $state == SIGNALING ]] && scontrol requeue "$job"; then
            echo "ranks.sh: $(in_words "$status"), the job is requeued and will go on from what is on disk"
            # Slurm ends this script: one that ended by itself meanwhile would report a failed job.
            trap - TERM
            sleep 300
        else
            echo "ranks.sh: $(in_words "$status"), the job (${state:-state unknown}) is not requeued; submit it again to go on"
        fi
    fi
    if ((status == ACCIDENT)); then
        exit "$KILLED"
    elif ((status >= FAILED)); then
        exit $((status - FAILED))
    fi
    exit "$status"
}

# One task of srun: run the command, and end with a status that tells who is to blame.
task() {
    local status told=""
    trap 'told=yes' TERM USR1
    "$@"
    status=$?
    # srun's signal reaches the processes of a task one after another: the command may have ended by it before we hear it.
    ((status == 0)) || [[ $told ]] || sleep 1
    if ((status == 0)) || [[ $told ]]; then
        exit $((status ? GO_ON_LATER : 0))
    elif ((status > 128 && status != 130)); then # 130: Ctrl-C
        exit "$ACCIDENT"
    elif ((status != GO_ON_LATER && status != LOST_OTHERS)); then
        exit $((FAILED + (status < 62 ? status : 1)))
    fi
    exit "$status"
}

# While a job is being preempted, whatever its ranks end with is the preemption's doing.
may_go_on() {
    case $1 in
    "$GO_ON_LATER") true ;;
    "$LOST_OTHERS" | "$ACCIDENT" | "$KILLED") ((${SLURM_RESTART_COUNT:-0} < MOST_RESTARTS)) || is_preempted "$2" ;;
    *) is_preempted "$2" ;;
    esac
}

in_words() {
    case $1 in
    "$GO_ON_LATER") echo "told to stop" ;;
    "$LOST_OTHERS") echo "a rank is gone" ;;
    "$ACCIDENT" | "$KILLED") echo "a rank was killed" ;;
    *) echo "status $1" ;;
    esac
}

is_preempted() {
    [[ $(fact PreemptTime "$1") == 20* ]]
}

# A field of our job, empty if it has none; slurmctld may be too busy to answer, or be started again this minute.
fact() {
    local attempt told
    for attempt in {1..60}; do
        if told=$(scontrol --oneliner show job "$2"); then
            tr ' ' '\n' <<<"$told" | sed -n "s/^$1=//p"
            return
        fi
        sleep 5
    done
}

main "$@"
