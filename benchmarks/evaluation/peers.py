"""Other tools that generate the same answers from the same weights, prompts and calculator, each tuned.

python benchmarks/evaluation/peers.py {generate,continuous,lm_eval,in_turn} [--slots 16] [--without_calculator]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from transformers import GenerationConfig, GPT2LMHeadModel, LogitsProcessorList

from benchmarks.evaluation import material
from benchmarks.evaluation.calculators import CalculatorOfGenerate
from benchmarks.evaluation.contender import Answer, arguments, measured
from trainer.evaluation.pipeline import longest_first
from trainer.evaluation.stop_tokens import StopTokens
from trainer.models.tokenizer import load_tokenizer
from trainer.problems.problem import DELIMITER

_PAGE, _LONGEST_PROMPT_CHUNK = 32, 1024


class Peers:
    """Each method answers the first `problems` problems: texts and counts of generated tokens by number."""

    def __init__(self, slots: int, calculator: bool) -> None:
        self.shards = shards = material.shards()
        self.slots = slots
        self.tokenizer = load_tokenizer(shards.tokenizer_path)
        self.language = StopTokens(self.tokenizer)
        self.calculator = calculator
        self.prompts = [shards.prompt(index).tolist() for index in range(len(shards))]
        self.end = self.tokenizer.eos_token_id

    def model(self, name: str = "student") -> GPT2LMHeadModel:
        return GPT2LMHeadModel.from_pretrained(
            material.student(name), dtype=torch.float32, attn_implementation="sdpa"
        ).eval()

    def generate(self) -> Answer:
        """Static batches of problems of like length, padded on the left; a batch ends with its last row."""
        model = self.model()

        def answer(problems: int, max_new_tokens: int) -> dict[int, tuple[str, int]]:
            order = longest_first(self.shards, range(problems))
            answers = {}
            for start in range(0, problems, self.slots):
                batch = order[start : start + self.slots]
                longest = max(len(self.prompts[index]) for index in batch)
                padding = [longest - len(self.prompts[index]) for index in batch]
                rows = [
                    [self.end] * pad + self.prompts[index] for pad, index in zip(padding, batch, strict=True)
                ]
                output = model.generate(
                    torch.tensor(rows),
                    attention_mask=torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding]),
                    logits_processor=self._processors(
                        CalculatorOfGenerate(self.language, len(batch), longest)
                    ),
                    generation_config=self._greedy(max_new_tokens),
                )
                answers |= {
                    index: self._text_and_count(row)
                    for index, row in zip(batch, output[:, longest:].tolist(), strict=True)
                }
            return answers

        return answer

    def continuous(self) -> Answer:
        """Transformers' continuous batching over a paged cache that holds all slots at their longest."""
        from transformers import ContinuousBatchingConfig

        model = self.model()
        longest = max(map(len, self.prompts)) + material.MAX_NEW_TOKENS

        def answer(problems: int, max_new_tokens: int) -> dict[int, tuple[str, int]]:
            processors = self._processors(CalculatorOfGenerate(self.language))
            model._get_logits_processor = lambda config: processors  # generate_batch takes none as argument
            order = longest_first(self.shards, range(problems))
            outputs = model.generate_batch(
                [self.prompts[index] for index in order],
                generation_config=self._greedy(max_new_tokens),
                continuous_batching_config=ContinuousBatchingConfig(
                    page_size=_PAGE,
                    num_blocks=(-(-longest // _PAGE) + 1) * self.slots,
                    max_batch_tokens=_LONGEST_PROMPT_CHUNK,
                    max_requests_per_batch=self.slots,
                    allow_block_sharing=False,
                    use_async_batching=False,
                    per_request_processors=True,
                ),
            )
            written = [outputs[name].generated_tokens for name in outputs]
            return {index: self._text_and_count(tokens) for index, tokens in zip(order, written, strict=True)}

        return answer

    def lm_eval(self) -> Answer:
        """lm-evaluation-harness's `generate_until`; it has no calculator, takes and gives text, and tells no number of tokens."""
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        harness = HFLM(pretrained=self.model(), tokenizer=self.tokenizer, batch_size=self.slots)

        def answer(problems: int, max_new_tokens: int) -> dict[int, tuple[str, int]]:
            settings = {"until": [], "max_gen_toks": max_new_tokens, "do_sample": False}
            texts = [self.language.text(prompt) for prompt in self.prompts[:problems]]
            requests = [
                Instance("generate_until", {}, (text, settings), index) for index, text in enumerate(texts)
            ]
            written = harness.generate_until(requests, disable_tqdm=True)
            return {index: (text, None) for index, text in enumerate(written)}

        return answer

    def in_turn(self) -> Answer:
        """Decomposer and solver, one problem at a time, as published scripts have it: every turn is a call of `generate`
        that reads everything before it anew."""
        decomposer, solver = self.model("decomposer"), self.model("solver")
        language = self.language
        delimiter = list(language.tokens(DELIMITER))
        lines = sorted(language.newlines | {self.end})

        def line(
            model: GPT2LMHeadModel, context: list[int], room: int, ends: list[int]
        ) -> tuple[list[int], int]:
            """Return the generated line and its number of tokens; an end token is replaced by a line break."""
            rows = torch.tensor([context])
            calculator = (
                self._processors(CalculatorOfGenerate(language, 1, len(context))) if model is solver else None
            )
            output = model.generate(
                rows,
                attention_mask=torch.ones_like(rows),
                logits_processor=calculator,
                generation_config=self._greedy(room, ends),
            )
            written = output[0, len(context) :].tolist()
            if written[-1] != self.end:
                return written, len(written)
            return [*written[:-1], *language.tokens("\n")], len(written)

        def said(tokens: list[int]) -> str:
            return language.text(tokens).partition("\n")[0]

        def solve(prompt: list[int], room: int) -> tuple[str, int]:
            context, count = list(prompt), 0
            written: list[str] = []
            while count < room:
                question, more = line(decomposer, context, room - count, sorted({*lines, *language.hashes}))
                count += more
                asked = said(question)
                if count >= room or not asked.strip() or asked.lstrip().startswith(DELIMITER):
                    break
                solution, more = line(solver, context + question, room - count, lines)
                count += more
                context += question + solution
                written += [asked, said(solution)]
                if written[-1].lstrip().startswith(DELIMITER):  # the answer, earlier than asked for
                    return "\n".join(written), count
            if count < room:
                last, more = line(solver, context + delimiter, room - count, lines)
                count += more
                written.append(DELIMITER + said(last))
            return "\n".join(written), count

        return lambda problems, max_new_tokens: {
            index: solve(self.prompts[index], max_new_tokens) for index in range(problems)
        }

    def _processors(self, calculator: CalculatorOfGenerate) -> LogitsProcessorList:
        return LogitsProcessorList([calculator] if self.calculator else [])

    def _greedy(self, max_new_tokens: int, ends: list[int] | None = None) -> GenerationConfig:
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends or self.end,
            pad_token_id=self.end,
        )

    def _text_and_count(self, tokens: list[int]) -> tuple[str, int]:
        """Text and count up to the first end token, which counts."""
        if self.end in tokens:
            tokens = tokens[: tokens.index(self.end) + 1]
        return self.language.text([token for token in tokens if token != self.end]), len(tokens)


def main() -> None:
    way = sys.argv.pop(1)
    given = arguments(__doc__)
    peers = Peers(given.slots, not given.without_calculator)
    ways = {
        "generate": peers.generate,
        "continuous": peers.continuous,
        "lm_eval": peers.lm_eval,
        "in_turn": peers.in_turn,
    }
    measured(ways[way](), given.problems)


if __name__ == "__main__":
    main()
