"""Work queue of problems: a rank with a free slot takes the next chunk of problem numbers from a shared counter.

No problem is taken twice, even if ranks are slow or fail. Small chunks let all ranks end at similar times.
"""

from collections.abc import Iterator, Sequence

from trainer.runtime import distributed
from trainer.runtime.shared_counter import SharedCounter

COUNTER_NAMES = ("next_chunk", "solved", "correct")
_EXHAUSTED = 1 << 40
_MAX_CHUNK = 8


def take_problems(counter: SharedCounter, order: Sequence[int], size: int = 1) -> Iterator[int]:
    """Yield problems that this rank takes from `order` in chunks of `size`, until all problems are taken."""
    while True:
        start = counter.add("next_chunk", 1) * size
        chunk = order[start : start + size]
        if not chunk:
            return
        yield from chunk


def exhaust_queue(counter: SharedCounter) -> None:
    """Make `take_problems` end on all ranks after their current chunks, because a rank has failed."""
    counter.add("next_chunk", _EXHAUSTED)


def chunk_size(num_problems: int, num_slots: int) -> int:
    """Return the number of problems per chunk, from 1 to 8. Each slot gets eight chunks if there are enough problems."""
    return max(1, min(_MAX_CHUNK, num_problems // (8 * num_slots * distributed.environment().world_size)))
