"""Row of docs/models.md: the measurements of one model family."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from trainer.errors import UserError

OK = "ok"  # equal to transformers
FALLBACK = "fallback"  # equal, by a slower path that the product chooses and reports
REFUSED = "refused"  # a UserError with a reason
CRASH = "crash"  # any other exception
WRONG = "WRONG"  # other numbers than transformers', not refused
MISSING = "-"  # not measured, because an earlier stage failed

STAGES = ("packed", "padded", "slots", "own_cache", "export")


@dataclass
class Cell:
    """Result of one stage."""

    status: str = MISSING  # one of the constants above
    detail: str = ""  # the path that was taken
    reason: str = ""  # for not taking the fastest path


@dataclass
class Row:
    """Results of one model family."""

    name: str
    model_type: str
    packed: Cell = field(default_factory=Cell)  # training with `--packing auto`
    padded: Cell = field(default_factory=Cell)  # training with `--packing false`
    slots: Cell = field(default_factory=Cell)  # evaluation with `--backend auto`
    own_cache: Cell = field(default_factory=Cell)  # evaluation with `--backend transformers`
    export: Cell = field(default_factory=Cell)  # converted, reloaded and saved again
    seconds: float = 0.0
    log: str = ""  # traceback of a crash

    @contextlib.contextmanager
    def stage(self, *names: str) -> Iterator[None]:
        """Context manager that records an exception in those of the cells `names` without a result."""
        try:
            yield
        except UserError as error:
            self._fail(names, Cell(REFUSED, reason=str(error)))
        except Exception as error:  # a family may raise anything
            self.log += traceback.format_exc()
            first = str(error).strip().partition("\n")[0]
            self._fail(names, Cell(CRASH, reason=f"{type(error).__name__}: {first}"))

    def _fail(self, names: tuple[str, ...], cell: Cell) -> None:
        for name in names:
            if getattr(self, name).status == MISSING:
                setattr(self, name, cell)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Row:
        values = json.loads(text)
        for name in STAGES:
            values[name] = Cell(**values[name])
        return cls(**values)

    def has(self, status: str) -> bool:
        """Return whether any cell has this status."""
        return any(getattr(self, name).status == status for name in STAGES)

    @property
    def is_training_right(self) -> bool:
        """True if the numbers of `--packing auto` are right."""
        return self.packed.status in (OK, FALLBACK)

    @property
    def is_evaluation_right(self) -> bool:
        """True if the tokens of `--backend auto` are right."""
        return self.slots.status in (OK, FALLBACK)

    @property
    def is_fast(self) -> bool:
        """True if this family is trained packed and evaluated in slots."""
        return self.packed.status == OK and self.slots.status == OK
