"""`socratic annotate`: let a teacher model write the steps of problems, and verify the steps."""

from pathlib import Path

from trainer.commands import next_command
from trainer.commands.command_line import command
from trainer.commands.extras import needs_extra
from trainer.runtime import terminal
from trainer.storage.run_directory import AnnotationDirectory
from trainer.teacher.settings import AnnotateSettings

DESCRIPTION = """Let a teacher model write solution steps for problems; check form, arithmetic and final answer.

  export OPENAI_API_KEY=...                (only if the endpoint requires a key)
  socratic annotate --data svamp --data_path data/svamp --style socratic --exemplars_from_gold 4 \\
      --base_url http://localhost:8000/v1 --model NAME --output_dir annotations/svamp-train --dry_run
  socratic annotate ...                    the same without --dry_run
  socratic annotate ... --model_name_or_path DIR     a local model, in place of --base_url and --model
  socratic prepare_shards --data jsonl --data_path annotations/svamp-train/result/annotated.jsonl ...

Each response is written to disk when it arrives (responses.jsonl). Run the same command again after an interruption: no
request is paid for twice. result/ holds the accepted solutions, the rejected ones with reasons, and a summary."""


@command(AnnotateSettings, DESCRIPTION)
def main(settings: AnnotateSettings) -> None:
    with needs_extra("teacher"):
        from trainer.teacher.annotate import annotate, print_dry_run
    if settings.dry_run:
        print_dry_run(settings)
    else:
        terminal.redirect_library_output(AnnotationDirectory(Path(settings.output_dir)).logs, "annotate")
        if annotate(settings):
            next_command.print_next(next_command.after_annotate(settings.output_dir, settings.split))


if __name__ == "__main__":
    main()
