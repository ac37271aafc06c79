"""One rank of test_tickets.py: draws tickets in several scenarios and writes what it got."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from trainer.evaluation.work_queue import CELLS, WorkQueue, exhaust_queue
from trainer.runtime import distributed
from trainer.runtime.shared_counter import shared_counter

SIZES = (1, 3)
SLOW = 60  # problems of the scenario in which the last rank is slow
SLOW_SECONDS = 0.02
CUT = 500  # problems of the scenario in which a rank gives up


def counts(world_size: int) -> list[int]:
    return [0, 1, world_size - 1, world_size, world_size + 1, 100]


def main(folder: Path) -> None:
    world = distributed.initialize()
    last = world.world_size - 1
    got: dict[str, list[int]] = {}
    for count in counts(world.world_size):
        for size in SIZES:
            with shared_counter(CELLS) as counter:
                tickets = WorkQueue(counter, range(count), size)
                mine = got[f"{count}/{size}"] = list(iter(tickets.next_index, None))
                counter.add("solved", len(mine))
                counter.serve()
    with shared_counter(CELLS) as counter:
        tickets = WorkQueue(counter, range(SLOW))
        mine = got["slow"] = []
        while (problem := tickets.next_index()) is not None:
            mine.append(problem)
            time.sleep(SLOW_SECONDS * (10 if world.rank == last else 1))
            counter.serve()
    with shared_counter(CELLS) as counter:
        tickets = WorkQueue(counter, range(CUT), 3)
        mine = got["cut"] = []
        while (problem := tickets.next_index()) is not None:
            mine.append(problem)
            if world.rank == last and len(mine) == 4:
                exhaust_queue(counter)
                break
            time.sleep(0.002)
    (folder / f"{type(counter).__name__}-{world.rank}.json").write_text(json.dumps(got))
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
