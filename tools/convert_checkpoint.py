"""Convert a DeepSpeed ZeRO checkpoint to a Hugging Face folder (config, safetensors, tokenizer, model card).

python tools/convert_checkpoint.py runs/quickstart/stories.socratic.2m.s0     # its newest checkpoint -> export/
python tools/convert_checkpoint.py runs/.../checkpoints/step-000120 --dtype bf16 --output_dir my-model --verify
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.command_line import parse
from trainer import terminal
from trainer.settings import ConvertSettings


def main() -> None:
    settings = parse(ConvertSettings, __doc__ or "")

    def work() -> None:
        from trainer.export.convert import convert

        convert(settings)

    terminal.run(work)


if __name__ == "__main__":
    main()
