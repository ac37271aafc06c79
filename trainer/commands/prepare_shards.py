"""`socratic prepare_shards`: tokenize problems once, for all methods."""

from trainer.commands import next_command
from trainer.commands.command_line import command
from trainer.runtime import startup
from trainer.settings import PrepareSettings

DESCRIPTION = """Tokenise problems once, for all methods, and write them as shards.

  socratic prepare_shards --data gsm8k --data_path data/gsm8k --split train \\
      --tokenizer_name gpt2 --output_dir shards/gsm8k-train
  socratic prepare_shards --output_dir shards/gsm8k-train --inspect 3 --method cot

Records that are not valid problems are listed in rejects.jsonl with file, line and reason."""


@command(PrepareSettings, DESCRIPTION)
def main(settings: PrepareSettings) -> None:
    if settings.inspect:
        from trainer.shards.inspect import print_examples

        print_examples(settings.output_dir, settings.method, settings.inspect)
    else:
        startup.pause_gc()
        from trainer.shards.prepare import prepare

        shards = prepare(settings)
        next_command.print_next(next_command.after_prepare(settings, shards.facts))


if __name__ == "__main__":
    main()
