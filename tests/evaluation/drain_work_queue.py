"""One rank of test_work_queue.py: takes problems in several scenarios and writes their numbers to a JSON file."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from trainer.evaluation.work_queue import COUNTER_NAMES, exhaust_queue, take_problems
from trainer.runtime import distributed
from trainer.runtime.shared_counter import shared_counter

SIZES = (1, 3)
NUM_SLOW = 60  # problems of the scenario in which the last rank is slow
SLOW_SECONDS = 0.02
NUM_FAILED = 500  # problems of the scenario in which the last rank fails


def counts(world_size: int) -> list[int]:
    return [0, 1, world_size - 1, world_size, world_size + 1, 100]


def main(folder: Path) -> None:
    environment = distributed.initialize()
    last = environment.world_size - 1
    taken: dict[str, list[int]] = {}
    for count in counts(environment.world_size):
        for size in SIZES:
            with shared_counter(COUNTER_NAMES) as counter:
                mine = taken[f"{count}/{size}"] = list(take_problems(counter, range(count), size))
                counter.add("solved", len(mine))
                counter.serve()
    with shared_counter(COUNTER_NAMES) as counter:
        mine = taken["slow"] = []
        for problem in take_problems(counter, range(NUM_SLOW)):
            mine.append(problem)
            time.sleep(SLOW_SECONDS * (10 if environment.rank == last else 1))
            counter.serve()
    with shared_counter(COUNTER_NAMES) as counter:
        mine = taken["failed"] = []
        for problem in take_problems(counter, range(NUM_FAILED), 3):
            mine.append(problem)
            if environment.rank == last and len(mine) == 4:
                exhaust_queue(counter)
                break
            time.sleep(0.002)
    (folder / f"{type(counter).__name__}-{environment.rank}.json").write_text(json.dumps(taken))
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
