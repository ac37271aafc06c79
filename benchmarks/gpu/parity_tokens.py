"""Compare the texts of refilled slots with transformers' `generate` in fp32, and many slots with one.

Different tokens are allowed if their logits are tied within rounding. The last line on stdout is JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from benchmarks.gpu import materials
from benchmarks.gpu.evaluate_one import ours, static, up_to_answer
from trainer.models import load
from trainer.models.tokenizer import load_tokenizer
from trainer.shards.read import Shards

TIE = 1e-4  # of the standard deviation of the logits


def main() -> None:
    tiny = "--tiny" in sys.argv
    problems, limit = (12, 24) if tiny else (200, 450)
    shards, export = materials.stories("test", problems, tiny), materials.student(tiny)
    model, tokenizer = load.load_model(export, "fp32", "sdpa"), load_tokenizer(export)
    model.to(device=load.local_device())  # type: ignore[call-arg]
    many = ours(model, tokenizer, shards, range(problems), limit, 64)
    ways = {
        "generate": static(model, tokenizer, shards, range(problems), limit, 64),
        "one slot": ours(model, tokenizer, shards, range(min(problems, 10)), limit, 1),
    }
    failures, ties = [], 0
    indices = {shards.problem(index).id: index for index in range(problems)}
    for way, answers in ways.items():
        for problem, text in answers.items():
            one, other = up_to_answer(many[problem]), up_to_answer(text)
            if one == other:
                continue
            gap = gap_where_they_part(model, tokenizer, shards, indices[problem], one, other)
            ties += gap <= TIE
            if gap > TIE:
                failures.append(f"{problem}: not what {way} writes, and no tie (logits {gap:.1e} apart)")
    result = {"checks": sum(map(len, ways.values())), "failures": failures, "ties": ties}
    print(json.dumps(result))


@torch.inference_mode()
def gap_where_they_part(
    model: Any, tokenizer: Any, shards: Shards, index: int, one: str, other: str
) -> float:
    """Return the difference of the two next tokens' logits, in standard deviations, after the common prefix."""
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (one, other))
    first, second = [*first, tokenizer.eos_token_id], [*second, tokenizer.eos_token_id]
    place = next(i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    tokens = [*shards.prompt(index).tolist(), *first[:place]]
    logits = model(torch.tensor([tokens], device=model.device)).logits[0, -1].double()
    return float((logits[first[place]] - logits[second[place]]).abs() / logits.std())


if __name__ == "__main__":
    main()
