"""Measurements of one model family: the cells of its row in docs/models.md."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from trainer.errors import UserError

OK = "ok"  # equal to transformers
FALLBACK = "fallback"  # equal, by a slower way that the product chooses and says
REFUSED = "refused"  # a UserError with a reason
CRASH = "crash"  # any other exception
WRONG = "WRONG"  # other numbers than transformers', not refused
MISSING = "-"  # not measured, because an earlier stage failed

STAGES = ("packed", "padded", "slots", "own_cache", "export")


@dataclass
class Cell:
    """status: one of the constants above. detail: the way that was taken. reason: why not the fastest one."""

    status: str = MISSING
    detail: str = ""
    reason: str = ""


@dataclass
class Row:
    """packed: training with `--packing auto`. padded: with `--packing false`. slots: evaluation with `--backend auto`.

    own_cache: with `--backend transformers`. export: converted, reloaded and saved again.
    """

    name: str
    model_type: str
    packed: Cell = field(default_factory=Cell)
    padded: Cell = field(default_factory=Cell)
    slots: Cell = field(default_factory=Cell)
    own_cache: Cell = field(default_factory=Cell)
    export: Cell = field(default_factory=Cell)
    seconds: float = 0.0
    log: str = ""  # traceback of a crash

    @contextlib.contextmanager
    def stage(self, *names: str) -> Iterator[None]:
        """Context manager: an exception becomes the cells `names` that have no result yet."""
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
    def trains(self) -> bool:
        """Whether `--packing auto` trains this family on right numbers."""
        return self.packed.status in (OK, FALLBACK)

    @property
    def evaluates(self) -> bool:
        """Whether `--backend auto` evaluates this family rightly."""
        return self.slots.status in (OK, FALLBACK)

    @property
    def is_fast(self) -> bool:
        """Whether this family is trained packed and evaluated in slots."""
        return self.packed.status == OK and self.slots.status == OK
