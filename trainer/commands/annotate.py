"""`socratic annotate`: let a teacher model write the steps of problems, and verify them."""

from __future__ import annotations

from pathlib import Path

from trainer.commands.command_line import parse
from trainer.commands.extras import needs_extra
from trainer.runtime import terminal
from trainer.storage.run_directory import AnnotationDirectory
from trainer.teacher.settings import AnnotateSettings

DESCRIPTION = """A teacher writes steps (cot or socratic) for problems; what can be checked is checked.

  export OPENAI_API_KEY=...                       (only if the endpoint wants one)
  socratic annotate --data svamp --data_path data/svamp --style socratic --exemplars_from_gold 4 \\
      --base_url http://localhost:8000/v1 --model NAME --output_dir annotations/svamp-train --dry_run
  socratic annotate ...                    the same without --dry_run
  socratic annotate ... --model_name_or_path DIR instead of --base_url and --model: a local model
  socratic prepare_shards --data jsonl --data_path annotations/svamp-train/result/annotated.jsonl ...

Every answer is on the disk at once (responses.jsonl): run the same command again after an interruption and nothing is
paid for twice. result/ has what was kept, what was rejected and why, and a summary."""


def main() -> None:
    settings = parse(AnnotateSettings, DESCRIPTION)
    terminal.run_main(lambda: _annotate(settings))


def _annotate(settings: AnnotateSettings) -> None:
    if settings.dry_run:
        with needs_extra("teacher"):
            from trainer.teacher.annotate import print_dry_run
        print_dry_run(settings)
        return
    terminal.redirect_library_output(AnnotationDirectory(Path(settings.output_dir)).logs, "annotate")
    with needs_extra("teacher"):
        from trainer.teacher.annotate import annotate
    annotate(settings)


if __name__ == "__main__":
    main()
