"""`socratic plan`: estimate memory, disk and time of a training or a study before it is submitted."""

from pathlib import Path

from trainer.commands.command_line import command, read_yaml
from trainer.settings import PlanSettings

DESCRIPTION = """Estimate what a run needs before it is submitted: memory per GPU and host, disk, time, and the ds_configs that fit.

  socratic plan --model_name_or_path gpt2-xl --bf16 --gpu a100-80gb --gpus_per_node 8 --max_steps 1000
  socratic plan --config my-run.yaml --gpu h100 --nodes 2 --gpus_per_node 8 --json
  socratic plan --study studies/gsm8k_gpt2.yaml --gpu a100-80gb

Takes every flag of `socratic train`. Exits with status 1 if the run does not fit."""


@command(PlanSettings, DESCRIPTION)
def main(settings: PlanSettings) -> None:
    from trainer.planning import command as planning

    if settings.study:
        from trainer.study.study_file import load_study

        study = load_study(read_yaml(Path(settings.study)), Path(settings.study))
        fits = planning.print_study_plan(settings, study)
    else:
        fits = planning.print_training_plan(settings)
    if not fits:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
