"""`socratic convert_checkpoint`: convert a ZeRO checkpoint to a Hugging Face folder."""

from __future__ import annotations

from trainer.commands.command_line import parse
from trainer.runtime import startup, terminal
from trainer.settings import ConvertSettings

DESCRIPTION = """Convert a DeepSpeed ZeRO checkpoint to a Hugging Face folder: config, safetensors, tokenizer, model card.

  socratic convert_checkpoint runs/quickstart/stories.socratic.0.7m.s0     (its newest checkpoint -> export/)
  socratic convert_checkpoint runs/.../checkpoints/step-000120 --dtype bf16 --output_dir my-model --verify

Bytes are streamed: memory does not grow with the model."""


def main() -> None:
    settings = parse(ConvertSettings, DESCRIPTION)
    terminal.run_main(lambda: _convert(settings))


def _convert(settings: ConvertSettings) -> None:
    startup.pause_gc()
    from trainer.export.convert import convert

    convert(settings)


if __name__ == "__main__":
    main()
