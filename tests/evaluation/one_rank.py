"""One rank of test_launched.py: `evaluate` as the tool calls it, with an injected fault.

`one_rank.py FAULT MODEL SHARDS OUTPUT_DIR`. MODEL: a path, or JSON with the roles of a pair.

FAULT: "none"; "kill:R:N", rank R is killed in the middle of writing its prediction number N (from 0); "fail:R:N", it
raises instead; "unwritable:R", rank R cannot create its rank file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from trainer.evaluation import rank_files
from trainer.runtime import distributed, startup, terminal
from trainer.settings import EvaluateSettings

HALF_A_LINE = b'{"id": "half a li'


def inject(fault: str) -> None:
    kind, *numbers = fault.split(":")
    if kind == "none" or distributed.environment().rank != int(numbers[0]):
        return
    append, written = rank_files.RankFile.append, []

    def faulty(rank_file: rank_files.RankFile, prediction: dict[str, Any]) -> None:
        if len(written) == int(numbers[1]):
            if kind == "fail":
                raise ZeroDivisionError("a fault of ours")
            with open(rank_file.path, "ab") as file:
                file.write(HALF_A_LINE)
            os.kill(os.getpid(), signal.SIGKILL)
        append(rank_file, prediction)
        written.append(prediction)

    def unwritable(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    setattr(rank_files.RankFile, *(("__init__", unwritable) if kind == "unwritable" else ("append", faulty)))


def main() -> None:
    startup.pause_gc()
    fault, model, shards, output_dir = sys.argv[1:]
    models = json.loads(model) if model.startswith("{") else {"model_name_or_path": model}
    settings = EvaluateSettings(**models, shards=shards, output_dir=output_dir, batch_size=2)
    distributed.initialize(timeout_seconds=60)
    from trainer.evaluation.evaluate import evaluate

    inject(fault)
    evaluate(settings)


if __name__ == "__main__":
    terminal.run_main(main)
