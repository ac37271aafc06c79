"""Everything about an evaluation that is known before a weight is read: who, on what, how, and where it goes.

Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer import distributed
from trainer.errors import UserError
from trainer.evaluation import student as students
from trainer.evaluation.decoding import Decoding, resolve_mode
from trainer.evaluation.student import Student
from trainer.run_directory import EvaluationDirectory
from trainer.settings import EvaluateSettings
from trainer.shards.read import Shards


@dataclass(frozen=True)
class Task:
    """One evaluation, checked: the student can read the shards and can be made to write in this mode."""

    student: Student
    shards: Shards
    decoding: Decoding
    dtype: str
    max_problems: int  # 0: all
    directory: EvaluationDirectory

    @property
    def num_problems(self) -> int:
        return min(self.max_problems or len(self.shards), len(self.shards))

    @property
    def scratch(self) -> Path:
        """For the temporary export of a checkpoint; a killed evaluation finds it again."""
        return self.directory.parts / "student"

    def recipe(self, student_digest: str) -> dict[str, Any]:
        """What decides the predictions. Neither slots nor ranks do."""
        decoding = {name: value for name, value in asdict(self.decoding).items() if name != "batch_size"}
        problems = {"max_problems": self.max_problems, "shards_fingerprint": self.shards.fingerprint}
        return {**decoding, "dtype": self.dtype, **problems, "export_digest": student_digest}

    def about(self) -> dict[str, Any]:
        """Who is evaluated on what; "" or None where a model of unknown making does not say."""
        facts = self.student.facts
        return {
            "data": self.shards.facts["data"],
            "split": self.shards.facts["split"],
            "model_name": facts.get("model_name", Path(self.student.name).name),
            "method": facts.get("method", ""),
            "train_seed": facts.get("seed"),
            "train_data": facts.get("data", ""),
            "step": facts.get("step"),
            "finished": facts.get("finished"),
            "warnings": self.warnings(),
        }

    def warnings(self) -> list[str]:
        """What a reader of the results has to know; it is told and recorded."""
        facts, found = self.student.facts, []
        has_steps = self.decoding.mode != "answer_only"
        if has_steps and not self.decoding.calculator and facts.get("learn_calculator_results") is False:
            found.append(
                "the student has no calculator and did not learn the calculator's results (learn_calculator_results)"
            )
        if facts.get("finished") is False:
            found.append(f"the student's training stopped at step {facts.get('step')}, before its end")
        return found

    def in_words(self) -> str:
        how = f"temperature {self.decoding.temperature:g}" if self.decoding.temperature else "greedy"
        calculator = "with calculator" if self.decoding.calculator else "without calculator"
        slots = f"{distributed.world().world_size} x {self.decoding.batch_size} slots"
        return (
            f"{self.student.name} on {self.shards.path}: {self.decoding.mode}, {how}, {calculator}, "
            f"{self.num_problems} problems, {slots}"
        )


def plan(settings: EvaluateSettings) -> Task:
    """Raises UserError for a student and shards that do not fit, and if nobody says where the results go."""
    shards = Shards.open(settings.shards)
    student = students.find(settings.model_name_or_path)
    students.check(student, shards, settings.allow_unfinished)
    mode, impose_answer = resolve_mode(settings.mode, student.method)
    names = ("calculator", "temperature", "top_p", "seed", "max_new_tokens", "batch_size")
    decoding = Decoding(mode, impose_answer, **{name: getattr(settings, name) for name in names})
    if settings.output_dir:
        directory = EvaluationDirectory(Path(settings.output_dir))
    elif student.run is not None:
        directory = student.run.evaluation(_name(student, shards, decoding))
    else:
        raise UserError(f"{student.name} is not in a run directory; say where the results go with output_dir")
    return Task(student, shards, decoding, settings.dtype, settings.max_problems, directory)


def digest(recipe: dict[str, Any]) -> str:
    """Identity of an evaluation: equal recipes give equal predictions."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _name(student: Student, shards: Shards, decoding: Decoding) -> str:
    """`<data>-<split>-<mode>`, and what differs from the usual, so that both can stand side by side."""
    name = [shards.facts["data"], shards.facts["split"], decoding.mode]
    if not decoding.calculator:
        name += ["no_calculator"]
    if decoding.temperature:
        name += [f"t{decoding.temperature:g}", f"s{decoding.seed}"]
    if student.kind == "checkpoint":
        name += [Path(student.name).name]
    return "-".join(name)
