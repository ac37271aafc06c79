"""`socratic train`: train one model with DeepSpeed ZeRO, on one or many ranks."""

from pathlib import Path

from trainer.commands import next_command
from trainer.commands.command_line import command
from trainer.runtime import restarts, startup, terminal
from trainer.runtime.stop_request import StopRequest
from trainer.settings import TrainSettings
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory

DESCRIPTION = """Train one model on one shard directory by one method.

  deepspeed --num_gpus 2 tools/train.py --train_shards shards/gsm8k-train --method socratic \\
      --model_name_or_path gpt2 --deepspeed ds_configs/zero2.json --output_dir runs/mine/gsm8k.socratic.gpt2.s0
  deepspeed --num_gpus 2 --module trainer.commands.train ...    (without the repository)
  socratic train --num_gpus 2 ...    (starts the deepspeed launcher without its messages)
  socratic train ...    mpiexec -n 2 socratic train ...    srun socratic train ...

Run the same command again to resume from the latest valid checkpoint.
On a machine without GPUs, --num_gpus is the number of processes."""


@command(TrainSettings, DESCRIPTION, launches_as="train")
def main(settings: TrainSettings) -> None:
    if settings.dry_run:
        from trainer.planning.command import dry_run

        raise SystemExit(0 if dry_run(settings) else 1)
    startup.pause_gc()
    stop = StopRequest()
    stop.install_signal_handlers()
    run = RunDirectory(Path(settings.output_dir))
    terminal.redirect_library_output(run.logs, "train")
    finished = [step for step in run.checkpoint_steps() if atomic_dir.is_complete(run.checkpoint(step))]
    restarts.record_restart(run.restarts, max(finished, default=0), settings.max_restarts)
    from trainer.training.loop import train
    from trainer.training.validation import ValidationLoss

    validation = None
    if settings.eval_steps:
        validation = ValidationLoss(settings.eval_shards, settings.eval_max_problems)
    if not train(settings, validation, stop):
        terminal.exit_for_requeue()
    next_command.print_next(["convert_checkpoint", settings.output_dir])


if __name__ == "__main__":
    main()
