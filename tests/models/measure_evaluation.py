"""Compare the tokens of the evaluation backends with the model's own greedy `generate`, one problem at a time."""

from __future__ import annotations

from typing import Any

import torch

from tests.models.row import FALLBACK, OK, WRONG, Cell
from tests.models.small_configs import VOCABULARY
from trainer.evaluation.backend_check import check_texts
from trainer.evaluation.backends import SequenceState
from trainer.evaluation.backends.choice import SLOTS, TRANSFORMERS, choose_backend, make_backend
from trainer.evaluation.backends.transformers import CACHE_USES
from trainer.evaluation.generate import generate, make_sampler
from trainer.models import load

PROMPT_LENGTHS = (6, 3, 20, 6, 11)
NEW_TOKENS = 20  # so that texts grow longer than the short windows
CAPACITY = 64
_NUM_SLOTS = 2  # fewer than problems: slots are refilled
_MAX_TIE_DIFFERENCE = 1e-4  # of the logits of two equally likely tokens, in standard deviations


def prompts() -> list[list[int]]:
    """Return random prompts, two of equal length."""
    random = torch.Generator().manual_seed(1)
    return [
        torch.randint(1, VOCABULARY - 20, (length,), generator=random).tolist() for length in PROMPT_LENGTHS
    ]


def measure(folder: str, requested: str, plain: Any) -> Cell:
    """Load the model as evaluation does, choose a backend, and compare its tokens with those of `plain`.

    `plain`: the same model, loaded by transformers.
    """
    model: Any = load.load_model(folder, "fp32")
    texts = check_texts(prompts(), CAPACITY)
    choice = choose_backend(model, texts, folder, requested)
    found = _decode(model, choice)
    pairs = list(zip(prompts(), found, strict=True))
    generated = [_is_generated(plain, prompt, text) for prompt, text in pairs]
    right = all(same or _is_greedy(plain, *pair) for same, pair in zip(generated, pairs, strict=True))
    reason = choice.reason
    if right and not all(generated):
        reason = "; ".join(
            filter(None, (reason, "`generate` differs from its own forward pass, which is followed"))
        )
    detail = choice.name
    if choice.name == TRANSFORMERS and choice.cache_use != CACHE_USES[0]:
        use = choice.cache_use
        detail += ", no cache" if not use.cache else ", token by token" if use.batch else ", one at a time"
    if not right:
        return Cell(WRONG, detail, reason)
    fastest = SLOTS if requested == "auto" else TRANSFORMERS
    return Cell(OK if choice.name == fastest else FALLBACK, detail, reason)


class _Problem:
    """Prompt to be continued by `NEW_TOKENS` tokens."""

    def __init__(self, prompt: list[int]) -> None:
        self.sequences = [SequenceState(list(prompt))]
        self.tokens: list[int] = []
        self.next_model: int | None = 0

    def after(self, token: int) -> None:
        self.tokens.append(token)
        self.sequences[0].pending = [token]
        if len(self.tokens) == NEW_TOKENS:
            self.next_model = None


def _decode(model: Any, choice: Any) -> list[list[int]]:
    problems = [_Problem(prompt) for prompt in prompts()]
    waiting = iter(problems)
    backend = make_backend(choice, 0, model, _NUM_SLOTS, CAPACITY, make_sampler(0.0, 1.0))
    for _ in generate([backend], waiting, _Problem.after, _NUM_SLOTS):
        pass
    return [problem.tokens for problem in problems]


def _is_generated(model: Any, prompt: list[int], text: list[int]) -> bool:
    """Return whether `text` is what `generate` writes after `prompt`."""
    ids = torch.tensor([prompt])
    try:
        with torch.no_grad():
            written = model.generate(
                ids, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0, eos_token_id=None
            )
    except Exception:  # `generate` of some families fails where their forward pass does not
        return False
    return bool(written[0, len(prompt) :].tolist() == text)


def _is_greedy(model: Any, prompt: list[int], text: list[int]) -> bool:
    """Return whether every token of `text` is the most likely one, or tied, in a plain forward pass over the whole text."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(text)[:, None])[:, 0]
    usable = logits[logits.isfinite() & (logits.abs() < 1e30)]
    return bool((logits.amax(1) - chosen <= _MAX_TIE_DIFFERENCE * usable.std()).all())
