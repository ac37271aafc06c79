"""Compare a backend's logits with those of the model's plain forward pass on real prompts, before an evaluation.

The plain forward pass processes one text at a time, without padding and without a cache, with the attention that
transformers chooses. The backend decodes more texts than it has slots, of different lengths, some with several forced
tokens at once. All tokens are fixed beforehand, so the logits at every token can be compared. A difference is measured in
standard deviations of the plain logits at that token.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, islice
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, PreTrainedModel

from trainer.errors import UserError, first_line
from trainer.evaluation.backends import SequenceState
from trainer.evaluation.backends.transformers import default_attention
from trainer.evaluation.sampling import not_finite
from trainer.models.default_attention import UnsupportedAttention
from trainer.runtime import library_internals

T = TypeVar("T")

MIN_TOLERANCE = 1e-4  # rounding of fp32
MAX_TOLERANCE = 1e-2
_NOISE_FACTOR = 10  # allowed ratio to the difference between two implementations of transformers
MIN_TOLERANCE_BF16 = 0.05
BF16_FACTOR = 4  # allowed ratio to the difference between plain forward passes in bf16 and in fp32
_MAX_LENGTH = 4608  # in tokens; the longest prompt is extended to the longest answer, at most to this
_MAX_LOGITS_BYTES = 1 << 28

# Number of forced tokens after each choice: of a long text, one that ends early, its successor in the slot, a batch.
_LONG = (1, 1, 4, 1, 1, 1, 1)
_SHORT = (1, 2)
_MIDDLE = (1, 3, 1, 1, 1, 1, 1)
_BATCH = ((1,), (1, 1, 1, 1, 1, 1, 1), (1, 1, 1), (1, 2, 1, 1))


class BackendError(Exception):
    """A backend raised an exception for this model; the message describes it."""


@dataclass(frozen=True)
class CheckText:
    """A prompt, and the forced tokens after each choice except the last, which ends the text."""

    prompt: list[int]
    forced: list[list[int]]

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *(token for tokens in self.forced for token in tokens)]

    @property
    def choices(self) -> list[int]:
        """Positions of the tokens at whose logits the next token is chosen."""
        return list(accumulate(map(len, self.forced), initial=len(self.prompt) - 1))


@dataclass(frozen=True)
class CheckTexts:
    """Texts for the slot backend (more than its two slots) and for the transformers backend."""

    slots: list[CheckText]
    own_cache: list[CheckText]
    prefix: list[int]
    capacity: int  # maximum sequence length in tokens


def shortest_middle_longest(items: Iterable[T], length: Callable[[T], int]) -> list[T]:
    """Return these three of `items`, which must not be empty; fewer if there are fewer."""
    ordered = sorted(items, key=length)
    return [ordered[position] for position in dict.fromkeys((0, len(ordered) // 2, len(ordered) - 1))]


def check_texts(prompts: Sequence[Sequence[int]], capacity: int, prefix: Sequence[int] = ()) -> CheckTexts:
    """Return texts made of the shortest, the middle and the longest of the prompts, all of which start with `prefix`.

    The longest is extended with tokens of the prompts to nearly `capacity`, to detect attention windows or chunks shorter
    than an answer. Raises UserError if the capacity leaves no room for a token.
    """
    if capacity < len(prefix) + 2:
        raise UserError(f"a text has room for {capacity} tokens, but the prompt alone has {len(prefix) + 1}")
    by_length = shortest_middle_longest(prompts, len)
    material = [token for prompt in by_length for token in prompt[len(prefix) :]] or [*by_length[0]]
    longest = max(len(by_length[-1]), min(capacity, _MAX_LENGTH) - sum(_LONG))

    def text(prompt: Sequence[int], counts: Sequence[int], length: int, offset: int) -> CheckText:
        tokens = cycle(material[offset % len(material) :] + material[: offset % len(material)])
        room = capacity - len(prefix) - 1  # for what follows the prefix and one token of the prompt
        while sum(counts) > room:
            counts = counts[:-1]
        length = max(len(prefix) + 1, min(length, capacity - sum(counts)))
        extended = [*prompt, *islice(tokens, max(0, length - len(prompt)))][:length]
        return CheckText(extended, [list(islice(tokens, count)) for count in counts])

    short, middle = by_length[0], by_length[len(by_length) // 2]
    long_text = text(by_length[-1], _LONG, longest, 1)
    early = text(short, _SHORT, len(short), 2)
    late = text(middle, _MIDDLE, len(middle), 3)
    beside = text(middle, _SHORT, len(long_text.prompt) - 3, 4)
    # The rows of a batch end one after another, the first one first: the cache must keep the unfinished rows.
    batch = [text(short, counts, len(short) + row, 5 + row) for row, counts in enumerate(_BATCH)]
    return CheckTexts([long_text, early, late], [*batch, long_text, beside], list(prefix), capacity)


class CheckRequest:
    """Request that forces the tokens of a text. `logits`: those of its choices so far."""

    def __init__(self, text: CheckText) -> None:
        self.sequences = [SequenceState(list(text.prompt))]
        self.next_model: int | None = 0
        self.logits: list[torch.Tensor] = []
        self._forced = iter(text.forced)

    def on_token(self, token: int) -> None:
        """Append the next forced tokens instead of the chosen one."""
        tokens = next(self._forced, None)
        self.next_model = None if tokens is None else 0
        self.sequences[0].pending += tokens or ()


class LogitRecorder:
    """Sampler of a backend under check, which records the logits; the tokens that it returns are ignored."""

    def __init__(self, texts: Sequence[CheckText]) -> None:
        self.requests = [CheckRequest(text) for text in texts]

    def __call__(self, logits: torch.Tensor, sequences: list[SequenceState]) -> list[int]:
        by_sequence = {id(request.sequences[0]): request for request in self.requests}
        for row, sequence in zip(logits, sequences, strict=True):
            by_sequence[id(sequence)].logits.append(row.detach().float().cpu().clone())
        return [0] * len(sequences)


@contextlib.contextmanager
def raise_backend_error() -> Iterator[None]:
    """Context manager that turns any exception into BackendError, so that another backend can be tried."""
    try:
        yield
    except Exception as error:
        first = first_line(error)
        is_explained = isinstance(error, (UserError, UnsupportedAttention))
        message = first if is_explained else f"its forward pass fails ({type(error).__name__}: {first})"
        raise BackendError(message) from error


@torch.no_grad()
def plain_logits(
    model: PreTrainedModel, text: CheckText, attention: str | None = None, copies: int = 1
) -> torch.Tensor:
    """Return logits [choices, vocabulary] of the plain forward pass over one text, fp32 on the CPU.

    attention: "sdpa" or "eager"; None for the one that transformers chooses. copies: rows of the batch, all with this text.
    """
    ids = torch.tensor([text.tokens] * copies, device=model.device)
    choices = torch.tensor(text.choices, device=model.device)
    accepted = inspect.signature(model.forward).parameters
    arguments = {"use_cache": False} if "use_cache" in accepted else {}
    size = ids.numel() * getattr(model.config.get_text_config(decoder=True), "vocab_size", 0) * 4
    with default_attention(model, attention):
        if size > _MAX_LOGITS_BYTES and "logits_to_keep" in accepted:
            logits = model(input_ids=ids, logits_to_keep=choices, **arguments).logits
            if logits.shape[1] == len(choices):
                return logits[-1].float().cpu()
        return model(input_ids=ids, **arguments).logits[-1, choices].float().cpu()


def depends_on_later_tokens(model: PreTrainedModel, text: CheckText) -> bool:
    """Return whether the plain logits at a token depend on the tokens after it.

    They do where attention selects keys from the whole text; the reference for such a model is `generate`. Raises
    BackendError.
    """
    with raise_backend_error():
        prefixes = [plain_logits(model, CheckText(text.tokens[: at + 1], [])) for at in text.choices]
        return difference([torch.cat(prefixes)], [plain_logits(model, text)]) > MIN_TOLERANCE


def generate_continuation(model: PreTrainedModel, text: CheckText) -> tuple[CheckText, torch.Tensor]:
    """Return the prompt with the tokens that `generate` chooses, and its logits [choices, vocabulary].

    Raises BackendError.
    """
    number = len(text.choices)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=number, min_new_tokens=number, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    ids = torch.tensor([text.prompt], device=model.device)
    untyped: Any = model
    with raise_backend_error(), default_attention(model):
        outputs = untyped.generate(ids, generation_config=config)
    tokens: list[int] = outputs.sequences[0, len(text.prompt) : -1].tolist()
    return CheckText(text.prompt, [[token] for token in tokens]), torch.cat(outputs.logits).float().cpu()


def difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the maximum over all positions of |found - expected| / standard deviation of the expected logits there."""
    return max(
        float(
            ((logits - plain).abs().where(logits != plain, 0.0).amax(-1) / _spread(plain))
            .nan_to_num(torch.inf)
            .max()
        )
        for logits, plain in zip(found, expected, strict=True)
    )


def _spread(logits: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation of each row, without entries that a family sets to -inf."""
    finite = logits.where(logits.isfinite(), torch.nan)
    variance = (finite - finite.nanmean(-1, keepdim=True)).square().nanmean(-1)
    return variance.nan_to_num(0.0).sqrt().clamp(min=torch.finfo(torch.float32).tiny)


class ReferenceLogits:
    """Plain logits of the texts, computed once per text and dtype of the model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._logits: dict[tuple[torch.dtype, int], torch.Tensor] = {}

    def logits(self, texts: Sequence[CheckText]) -> list[torch.Tensor]:
        """Return the logits of each text. Raises UserError if they are not finite, BackendError if the forward pass fails."""
        keys = [(self._model.dtype, id(text)) for text in texts]
        for key, text in zip(keys, texts, strict=True):
            if key not in self._logits:
                with raise_backend_error():
                    plain = self._logits[key] = plain_logits(self._model, text)
                if plain.isnan().any() or not plain.amax(-1).isfinite().all():
                    raise not_finite()
        return [self._logits[key] for key in keys]

    def tolerance(self, texts: Sequence[CheckText], found: float, smallest: float) -> float:
        """Return the maximum difference that counts as rounding.

        If the difference `found` exceeds `smallest`, the tolerance is a multiple of the difference between transformers'
        own implementations on these texts.
        """
        if found <= smallest:
            return smallest
        noise = max(self._noise(text) for text in texts)
        return max(smallest, min(_NOISE_FACTOR * noise, MAX_TOLERANCE))

    def _noise(self, text: CheckText) -> float:
        expected = self.logits([text])
        others: list[torch.Tensor] = []
        if library_internals.supports_sdpa(self._model):
            with contextlib.suppress(Exception):
                others.append(plain_logits(self._model, text, "eager"))
        with contextlib.suppress(Exception):
            others.append(plain_logits(self._model, text, copies=2))
        return max((difference([other], expected) for other in others), default=0.0)
