"""Train several runs one after another in the same processes (imports are slow): python train_many.py RUNS.json

Stops at the first error, or, with --collect, prints "run <n>: <message>" for each UserError.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from trainer.errors import UserError
from trainer.runtime import startup, terminal
from trainer.settings import TrainSettings
from trainer.storage.configuration import from_dict


def main() -> None:
    startup.pause_gc()
    from trainer.training.loop import train
    from trainer.training.validation import ValidationLoss

    for number, values in enumerate(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))):
        settings = from_dict(TrainSettings, values, sys.argv[1])
        evaluate = (
            ValidationLoss(settings.eval_shards, settings.eval_max_problems) if settings.eval_steps else None
        )
        try:
            train(settings, evaluate)
        except UserError as error:
            if "--collect" not in sys.argv:
                raise
            print(f"run {number}: {error}")


terminal.run_main(main)
