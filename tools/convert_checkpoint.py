"""Convert a DeepSpeed ZeRO checkpoint to a Hugging Face folder: python tools/convert_checkpoint.py RUN."""

from __future__ import annotations

from command_line import parse

from trainer import terminal
from trainer.settings import ConvertSettings

DESCRIPTION = """A DeepSpeed ZeRO checkpoint (any stage, any number of ranks) -> a Hugging Face folder.

  python tools/convert_checkpoint.py runs/mine/gsm8k.socratic.gpt2.s0          its newest checkpoint -> export/
  python tools/convert_checkpoint.py runs/mine/.../checkpoints/step-000120 --dtype bf16 --output_dir my-model --verify

Copies byte ranges, so it needs little memory at every size of model. A folder that is already there is replaced only
with --overwrite, and only when the new one is complete."""


def main() -> None:
    settings = parse(ConvertSettings, DESCRIPTION)
    terminal.run(lambda: _convert(settings))


def _convert(settings: ConvertSettings) -> None:
    from trainer.export.convert import convert

    convert(settings)


if __name__ == "__main__":
    main()
