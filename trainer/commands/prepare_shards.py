"""`socratic prepare_shards`: tokenize problems once, for all methods."""

from __future__ import annotations

from trainer.commands.command_line import parse
from trainer.runtime import startup, terminal
from trainer.settings import PrepareSettings

DESCRIPTION = """Turn problems into token shards, once, for all methods.

  socratic prepare_shards --data gsm8k --data_path data/gsm8k --split train \\
      --tokenizer_name gpt2 --output_dir shards/gsm8k-train
  socratic prepare_shards --output_dir shards/gsm8k-train --inspect 3 --method cot

Records that cannot be used are set aside in rejects.jsonl with file, line and reason."""


def main() -> None:
    settings = parse(PrepareSettings, DESCRIPTION)
    terminal.run_main(lambda: _prepare(settings))


def _prepare(settings: PrepareSettings) -> None:
    if settings.inspect:
        from trainer.shards.inspect import print_examples

        print_examples(settings.output_dir, settings.method, settings.inspect)
    else:
        startup.pause_gc()
        from trainer.shards.prepare import prepare

        prepare(settings)


if __name__ == "__main__":
    main()
