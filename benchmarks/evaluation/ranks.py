"""Speed of two ranks against one, one core each, with a shared work queue and with a fixed split.

deepspeed --num_gpus 2 benchmarks/evaluation/ranks.py

Forward passes of the busiest rank are counted too: they measure the split alone, whatever two cores cost each other.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.evaluation import material
from benchmarks.evaluation.contender import arguments
from benchmarks.processes import turns
from trainer.evaluation.decoding import STUDENT, Decoding
from trainer.evaluation.pipeline import Pipeline, RoleModel, predictions
from trainer.evaluation.work_queue import COUNTER_NAMES
from trainer.models.load import load_model
from trainer.models.tokenizer import load_tokenizer
from trainer.runtime import distributed
from trainer.runtime.shared_counter import ProcessCounter, SharedCounter, shared_counter


def main() -> None:
    given = arguments(__doc__)
    distributed.initialize()
    environment = distributed.environment()
    shards = material.shards()
    model = load_model(material.student(), "fp32", "sdpa")
    decoding = Decoding(material.METHOD, max_new_tokens=material.MAX_NEW_TOKENS, batch_size=given.slots)
    pipeline = Pipeline(
        {STUDENT: RoleModel(model, material.METHOD)}, load_tokenizer(shards.tokenizer_path), shards, decoding
    )

    def solve(problems: Sequence[int], counter: SharedCounter) -> tuple[float, int, dict[str, Any]]:
        """Return the seconds of the slowest rank, the forward passes of the busiest, and all ranks' texts by id."""
        serve, passes = counter.serve, []
        counter.serve = lambda: passes.append(serve())  # type: ignore[method-assign]  # after every pass
        distributed.barrier()
        start = time.perf_counter()
        mine = {
            prediction["id"]: prediction["text"] for prediction in predictions(pipeline, problems, counter)
        }
        ends = distributed.gather_objects((time.perf_counter() - start, len(passes), mine))
        answers = {name: text for _, _, texts in ends for name, text in texts.items()}
        return max(seconds for seconds, _, _ in ends), max(count for _, count, _ in ends), answers

    everything = range(given.problems)
    solve(range(2), ProcessCounter())
    for _ in turns():
        alone, passes_alone, answers = solve(everything if environment.rank == 0 else (), ProcessCounter())
        with shared_counter(COUNTER_NAMES) as counter:
            queue, passes_of_queue, answers_of_queue = solve(everything, counter)
        fixed, passes_of_fixed, answers_of_fixed = solve(
            everything[environment.rank :: environment.world_size], ProcessCounter()
        )
        assert answers == answers_of_queue == answers_of_fixed
        if environment.rank == 0:
            result = {
                "queue": alone / queue,
                "fixed": alone / fixed,
                "queue_in_passes": passes_alone / passes_of_queue,
                "fixed_in_passes": passes_alone / passes_of_fixed,
                "seconds_one_rank": alone,
            }
            print(json.dumps(result), flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    main()
