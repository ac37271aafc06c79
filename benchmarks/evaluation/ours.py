"""Ours: the trainer's own evaluation of the material's problems, without launcher and files.

python benchmarks/evaluation/ours.py --slots 16 [--pair] [--without_calculator] [--problems 64]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.evaluation import material
from benchmarks.evaluation.contender import arguments, measured
from trainer.evaluation.decoding import DECOMPOSER, INTERLEAVED, SOLVER, STUDENT, Decoding
from trainer.evaluation.pipeline import Pipeline, RoleModel, predictions
from trainer.models.load import load_model
from trainer.models.tokenizer import load_tokenizer
from trainer.runtime.shared_counter import ProcessCounter


def main() -> None:
    given = arguments(__doc__)
    shards = material.shards()
    tokenizer = load_tokenizer(shards.tokenizer_path)
    roles = (DECOMPOSER, SOLVER) if given.pair else (STUDENT,)
    models = {
        role: RoleModel(load_model(material.student(role), "fp32", "sdpa"), material.METHOD) for role in roles
    }

    def answer(problems: int, max_new_tokens: int) -> dict[int, tuple[str, int]]:
        decoding = Decoding(
            mode=INTERLEAVED if given.pair else material.METHOD,
            calculator=not given.without_calculator,
            max_new_tokens=max_new_tokens,
            batch_size=given.slots,
        )
        pipeline = Pipeline(models, tokenizer, shards, decoding)
        numbers = {shards.problem(index).id: index for index in range(problems)}
        return {
            numbers[prediction["id"]]: (prediction["text"], prediction["generated_tokens"])
            for prediction in predictions(pipeline, range(problems), ProcessCounter())
        }

    measured(answer, given.problems)


if __name__ == "__main__":
    main()
