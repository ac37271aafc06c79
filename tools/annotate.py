"""Give problems the steps of a teacher, verified: python tools/annotate.py --data svamp --base_url URL --model NAME ..."""

from __future__ import annotations

from pathlib import Path

from command_line import parse

from trainer.runtime import terminal
from trainer.storage.run_directory import AnnotationDirectory
from trainer.teacher.settings import AnnotateSettings

DESCRIPTION = """A teacher writes steps (cot or socratic) for problems; what can be checked is checked.

  export OPENAI_API_KEY=...                       (only if the endpoint wants one)
  python tools/annotate.py --data svamp --data_path data/svamp --style socratic --exemplars_from_gold 4 \\
      --base_url http://localhost:8000/v1 --model NAME --output_dir annotations/svamp-train --dry_run
  python tools/annotate.py ...                    the same without --dry_run
  python tools/annotate.py ... --model_name_or_path DIR instead of --base_url and --model: a local model
  python tools/prepare_shards.py --data jsonl --data_path annotations/svamp-train/result/annotated.jsonl ...

Every answer is on the disk at once (responses.jsonl): run the same command again after an interruption and nothing is
paid for twice. result/ has what was kept, what was rejected and why, and a summary."""


def main() -> None:
    settings = parse(AnnotateSettings, DESCRIPTION)
    terminal.run(lambda: _annotate(settings))


def _annotate(settings: AnnotateSettings) -> None:
    if settings.dry_run:
        from trainer.teacher.annotate import print_plan

        print_plan(settings)
        return
    terminal.redirect_library_output(AnnotationDirectory(Path(settings.output_dir)).logs, "annotate")
    from trainer.teacher.annotate import annotate

    annotate(settings)


if __name__ == "__main__":
    main()
