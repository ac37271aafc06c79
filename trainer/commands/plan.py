"""`socratic plan`: estimate memory, disk and time of a training or a study before it is submitted."""

from __future__ import annotations

from trainer.commands.command_line import parse, read_yaml
from trainer.runtime import terminal
from trainer.settings import PlanSettings

DESCRIPTION = """What a run needs before it is submitted: memory of every GPU and host, disk, time; and which ds_config fits.

  socratic plan --model_name_or_path gpt2-xl --bf16 --gpu a100-80gb --gpus_per_node 8 --max_steps 1000
  socratic plan --config my-run.yaml --gpu h100 --nodes 2 --gpus_per_node 8 --json
  socratic plan --study studies/gsm8k_gpt2.yaml --gpu a100-80gb

Takes every flag of `socratic train`. Exits with status 1 if it cannot run there."""


def main() -> None:
    settings = parse(PlanSettings, DESCRIPTION)
    terminal.run_main(lambda: _plan(settings))


def _plan(settings: PlanSettings) -> None:
    from trainer.planning import run

    if settings.study:
        from pathlib import Path

        from trainer.study.study_file import load_study

        study = load_study(read_yaml(Path(settings.study)), Path(settings.study))
        fits = run.plan_study(settings, study)
    else:
        fits = run.plan_training(settings)
    if not fits:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
