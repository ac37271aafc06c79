"""Compare a backend's logits with the logits of the model's plain forward pass on real prompts, before an evaluation.

The plain forward pass processes one text at a time, without padding or cache, with the attention that transformers chooses.
The backend decodes more texts than it has slots. The texts differ in length. Their tokens are fixed beforehand, so that the
logits can be compared at every position where the backend chooses a token. A difference between logits is divided by the
standard deviation of the plain logits at the same position.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, cycle, islice
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, PreTrainedModel

from trainer.errors import UserError, first_line
from trainer.evaluation.backends import SequenceState
from trainer.evaluation.backends.transformers import default_attention
from trainer.evaluation.sampling import non_finite_logits_error
from trainer.models.default_attention import UnsupportedAttention
from trainer.runtime import library_internals

T = TypeVar("T")

MIN_TOLERANCE = 1e-4  # in standard deviations of the logits; a smaller difference is considered fp32 rounding
MAX_TOLERANCE = 1e-2
_NOISE_FACTOR = 10  # allowed ratio of a backend's difference to the noise (see `ReferenceLogits.tolerance`)
MIN_TOLERANCE_BF16 = 0.05
BF16_FACTOR = 4  # allowed ratio of a backend's error in bf16 to the plain forward pass's error in bf16
_MAX_LENGTH = 4608  # maximum number of tokens of the extended longest prompt, including its forced tokens
_MAX_LOGITS_BYTES = 1 << 28

# Number of forced tokens after each choice of a text (see `CheckText`).
_LONG = (1, 1, 4, 1, 1, 1, 1)
_SHORT = (1, 2)  # the text ends early, so another text reuses its slot
_MIDDLE = (1, 3, 1, 1, 1, 1, 1)
_BATCH = ((1,), (1, 1, 1, 1, 1, 1, 1), (1, 1, 1), (1, 2, 1, 1))


class BackendError(Exception):
    """Raised if a backend or the plain forward pass fails for a model. The message describes the failure."""


@dataclass(frozen=True)
class CheckText:
    """A prompt, and the forced tokens that follow it in place of generated tokens.

    A choice is a position at which a backend chooses the next token: the last token of the prompt and of each list in
    `forced`. The tokens `forced[i]` follow choice i. No token follows the last choice.
    """

    prompt: list[int]
    forced: list[list[int]]

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *chain(*self.forced)]

    @property
    def choices(self) -> list[int]:
        """Positions of the choices in `tokens`."""
        return list(accumulate(map(len, self.forced), initial=len(self.prompt) - 1))


@dataclass(frozen=True)
class CheckTexts:
    """Texts for checks of the slot backend (`slots`) and of the transformers backend (`own_cache`)."""

    slots: list[CheckText]  # more texts than a check has slots
    own_cache: list[CheckText]
    prefix: list[int]  # tokens that all prompts start with
    capacity: int  # maximum sequence length in tokens


def shortest_middle_longest(items: Iterable[T], length: Callable[[T], int]) -> list[T]:
    """Return the items of smallest, middle and largest length, without duplicates. `items` must not be empty."""
    ordered = sorted(items, key=length)
    return [ordered[position] for position in dict.fromkeys((0, len(ordered) // 2, len(ordered) - 1))]


def check_texts(prompts: Sequence[Sequence[int]], capacity: int, prefix: Sequence[int] = ()) -> CheckTexts:
    """Return texts made of the shortest, the middle and the longest of `prompts`. All prompts must start with `prefix`.

    The longest prompt is extended to nearly `capacity` tokens (at most `_MAX_LENGTH`) by repeating tokens of `prompts`. This
    detects attention windows that are shorter than a prompt with its answer. Raises UserError if `capacity` is less than the
    length of `prefix` plus two tokens.
    """
    if capacity < len(prefix) + 2:
        raise UserError(f"a text has room for {capacity} tokens, but the prompt alone has {len(prefix) + 1}")
    by_length = shortest_middle_longest(prompts, len)
    material = [token for prompt in by_length for token in prompt[len(prefix) :]] or [*by_length[0]]
    longest = max(len(by_length[-1]), min(capacity, _MAX_LENGTH) - sum(_LONG))

    def text(prompt: Sequence[int], counts: Sequence[int], length: int, offset: int) -> CheckText:
        tokens = islice(cycle(material), offset % len(material), None)
        while len(prefix) + 1 + sum(counts) > capacity:
            counts = counts[:-1]
        length = max(len(prefix) + 1, min(length, capacity - sum(counts)))
        extended = [*prompt, *islice(tokens, max(0, length - len(prompt)))][:length]
        return CheckText(extended, [list(islice(tokens, count)) for count in counts])

    short, middle = by_length[0], by_length[len(by_length) // 2]
    long_text = text(by_length[-1], _LONG, longest, 1)
    early = text(short, _SHORT, len(short), 2)
    late = text(middle, _MIDDLE, len(middle), 3)
    beside = text(middle, _SHORT, len(long_text.prompt) - 3, 4)
    # The rows of the batch end at different steps, row 0 first. When a row ends, the cache must keep the other rows.
    batch = [text(short, counts, len(short) + row, 5 + row) for row, counts in enumerate(_BATCH)]
    return CheckTexts([long_text, early, late], [*batch, long_text, beside], list(prefix), capacity)


class CheckRequest:
    """Request that continues with the forced tokens of a text. `logits`: recorded logits [vocabulary] of each choice."""

    def __init__(self, text: CheckText) -> None:
        self.sequences = [SequenceState(list(text.prompt))]
        self.next_model: int | None = 0
        self.logits: list[torch.Tensor] = []
        self._forced = iter(text.forced)

    def on_token(self, token: int) -> None:
        """Append the next forced tokens. The chosen token `token` is ignored."""
        tokens = next(self._forced, None)
        self.next_model = None if tokens is None else 0
        self.sequences[0].pending += tokens or ()


class LogitRecorder:
    """Sampler that records logits in `requests`, one request per text. The requests ignore the returned tokens."""

    def __init__(self, texts: Sequence[CheckText]) -> None:
        self.requests = [CheckRequest(text) for text in texts]

    def __call__(self, logits: torch.Tensor, sequences: list[SequenceState]) -> list[int]:
        by_sequence = {id(request.sequences[0]): request for request in self.requests}
        for row, sequence in zip(logits, sequences, strict=True):
            by_sequence[id(sequence)].logits.append(row.detach().float().cpu().clone())
        return [0] * len(sequences)


@contextlib.contextmanager
def raise_backend_error() -> Iterator[None]:
    """Context manager that raises BackendError for any exception of its block, so that another backend can be tried."""
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
    """Return logits [choices, vocabulary] of the plain forward pass over one text, in fp32 on the CPU.

    attention: "sdpa" or "eager"; None: the current attention if it is one of these, else the family's default.
    copies: number of equal rows in the batch.
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

    The logits depend on later tokens if the model's attention selects keys from the whole text. A backend must then be
    compared with `generate`, not with the plain forward pass. Raises BackendError if a forward pass fails.
    """
    with raise_backend_error():
        prefixes = [plain_logits(model, CheckText(text.tokens[: at + 1], [])) for at in text.choices]
        return difference([torch.cat(prefixes)], [plain_logits(model, text)]) > MIN_TOLERANCE


def generate_continuation(model: PreTrainedModel, text: CheckText) -> tuple[CheckText, torch.Tensor]:
    """Continue the prompt of `text` with `generate`. Return the new text and the logits [choices, vocabulary].

    Raises BackendError if `generate` fails.
    """
    num_new = len(text.choices)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=num_new, min_new_tokens=num_new, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    ids = torch.tensor([text.prompt], device=model.device)
    untyped: Any = model
    with raise_backend_error(), default_attention(model):
        outputs = untyped.generate(ids, generation_config=config)
    tokens: list[int] = outputs.sequences[0, len(text.prompt) : -1].tolist()
    return CheckText(text.prompt, [[token] for token in tokens]), torch.cat(outputs.logits).float().cpu()


def difference(texts_logits: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the maximum difference between logits, in standard deviations of the expected logits at the same choice.

    Both arguments hold one tensor of logits [choices, vocabulary] per text.
    """

    def text_difference(logits: torch.Tensor, plain: torch.Tensor) -> float:
        absolute = (logits - plain).abs().where(logits != plain, 0.0).amax(-1)
        finite = plain.where(plain.isfinite(), torch.nan)  # some families set logits to -inf
        variance = (finite - finite.nanmean(-1, keepdim=True)).square().nanmean(-1)
        deviation = variance.nan_to_num(0.0).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        return float((absolute / deviation).nan_to_num(torch.inf).max())

    return max(text_difference(*pair) for pair in zip(texts_logits, expected, strict=True))


class ReferenceLogits:
    """Cache of the plain logits, by text and dtype of the model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._logits: dict[tuple[torch.dtype, int], torch.Tensor] = {}

    def logits(self, texts: Sequence[CheckText]) -> list[torch.Tensor]:
        """Return the plain logits of each text. Raises UserError for NaN or +inf, BackendError if the forward pass fails."""
        keys = [(self._model.dtype, id(text)) for text in texts]
        for key, text in zip(keys, texts, strict=True):
            if key not in self._logits:
                with raise_backend_error():
                    plain = self._logits[key] = plain_logits(self._model, text)
                if plain.isnan().any() or not plain.amax(-1).isfinite().all():
                    raise non_finite_logits_error()
        return [self._logits[key] for key in keys]

    def tolerance(self, texts: Sequence[CheckText], measured: float, min_tolerance: float) -> float:
        """Return the largest difference that counts as rounding. `measured`: difference of a backend on `texts`.

        If `measured` is at most `min_tolerance`, return `min_tolerance`. Otherwise return `_NOISE_FACTOR` times the noise,
        clamped to [`min_tolerance`, `MAX_TOLERANCE`]. The noise is the largest difference between the plain logits and the
        same logits computed with eager attention, or computed in a batch of two equal rows.
        """
        if measured <= min_tolerance:
            return min_tolerance
        noise = max(self._noise(text) for text in texts)
        return max(min_tolerance, min(_NOISE_FACTOR * noise, MAX_TOLERANCE))

    def _noise(self, text: CheckText) -> float:
        variants: list[torch.Tensor] = []
        if library_internals.supports_sdpa(self._model):
            with contextlib.suppress(Exception):
                variants.append(plain_logits(self._model, text, "eager"))
        with contextlib.suppress(Exception):
            variants.append(plain_logits(self._model, text, copies=2))
        return max((difference([variant], self.logits([text])) for variant in variants), default=0.0)
