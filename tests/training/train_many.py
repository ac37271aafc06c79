"""Train several runs one after another in the same processes (imports are slow): python train_many.py RUNS.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from trainer import distributed, terminal
from trainer.settings import TrainSettings, from_dict


def main() -> None:
    from trainer.training.loop import train

    for values in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        train(from_dict(TrainSettings, values, sys.argv[1]))
    distributed.shutdown()


terminal.run(main)
