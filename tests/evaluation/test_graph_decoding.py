"""CUDA-graph decode steps, emulated on the CPU, give the same texts as prefill steps."""

from __future__ import annotations

import random
import weakref

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tests.evaluation.test_generate import MODELS, make, prompts, solve
from tests.recorded_launches import decode_by_graphs
from trainer.evaluation.backends.slots import SequenceState, SlotBackend, next_step_is_decode
from trainer.models.slot_attention import use_slot_attention
from trainer.models.tokenizer import load_tokenizer
from trainer.shards.read import Shards


@pytest.fixture(scope="module")
def tokenizer(shards: Shards) -> PreTrainedTokenizerBase:
    return load_tokenizer(shards.tokenizer_path)


@pytest.mark.parametrize("name", MODELS)
def test_graphs_give_the_same_tokens(
    name: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and sampled; prompts of 1 to 30 tokens, some of them fed token by token; fewer slots are used at the end."""
    model, texts, ends = make(name), prompts(20), frozenset(range(40))
    expected = [
        solve(model, tokenizer, texts, num_slots=9, ends=ends, temperature=degrees) for degrees in (0.0, 1.0)
    ]
    replayed = decode_by_graphs(monkeypatch)
    found = [
        solve(model, tokenizer, texts, num_slots=9, ends=ends, temperature=degrees) for degrees in (0.0, 1.0)
    ]
    assert found == expected
    assert len(set(replayed)) > 3 and len({shape.num_slots for shape in replayed}) > 2


class ChunkedRequest:
    """Request whose text becomes pending in chunks. `seen`: logits by the number of processed tokens."""

    def __init__(self, text: list[int]) -> None:
        self.text = text
        self.given = 0
        self.seen: dict[int, torch.Tensor] = {}
        self.sequences = [SequenceState([])]
        self.next_model: int | None = 1  # another model's

    def add_pending(self, count: int) -> None:
        self.sequences[0].pending += self.text[self.given : self.given + count]
        self.given += count
        self.next_model = 0


@pytest.mark.parametrize("name", MODELS)
def test_waiting_slots_continue_correctly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random chunks of one, a few or many tokens, beside waiting slots, one of which is full."""
    numbers = random.Random(3)
    model, capacity = make(name), 60
    replayed = decode_by_graphs(monkeypatch)
    texts = [
        [numbers.randrange(1, 1024) for _ in range(length)] for length in (60, 60, 31, 47, 52, 20, 58, 44, 38)
    ]
    requests = [ChunkedRequest(text) for text in texts]

    def record(logits: torch.Tensor, sequences: list[SequenceState]) -> list[int]:
        for row, sequence in zip(logits, sequences, strict=True):
            request = next(one for one in requests if one.sequences[0] is sequence)
            request.seen[sequence.length] = row.clone()
        return [0] * len(sequences)

    with use_slot_attention(model):
        backend = SlotBackend[ChunkedRequest](0, model, 9, capacity, record)
        for request in requests:
            backend.add(request)
        requests[0].add_pending(60)
        while any(one.given < len(one.text) or one.next_model == 0 for one in requests):
            for one in requests[1:]:
                if one.next_model == 1 and one.given < len(one.text) and numbers.random() < 0.6:
                    left = len(one.text) - one.given
                    one.add_pending(1 if left < 4 else min(numbers.choice((1, 1, 1, 2, 3, 9)), left))
            if backend.num_runnable:
                for one, _ in backend.step():
                    assert not one.sequences[0].pending
                    one.next_model = 1
            if requests[5].given == 20 and requests[5].next_model == 1:
                requests[5].next_model = None  # ends, and the last request moves into its slot
    for request in requests:
        with torch.no_grad():
            expected = model(torch.tensor([request.text])).logits[0]
        assert len(request.text) in request.seen
        for length, logits in request.seen.items():
            torch.testing.assert_close(logits, expected[length - 1], rtol=1e-4, atol=1e-4)
    assert len(replayed) > 20 and len(set(replayed)) > 1


def test_model_with_host_synchronisation_decodes_without_graphs(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, texts = make("gpt2"), prompts(5)
    expected = solve(model, tokenizer, texts, num_slots=3)
    replayed = decode_by_graphs(monkeypatch)
    model.transformer.wte.register_forward_pre_hook(lambda module, inputs: inputs[0].max().item() < 0 or None)
    for _ in range(2):
        assert solve(model, tokenizer, texts, num_slots=3) == expected
    assert not replayed
    warnings = capsys.readouterr().out.splitlines()
    assert warnings == [
        "warning: GPT2LMHeadModel decodes without CUDA graphs, more slowly: "
        "operation not permitted when stream is capturing"
    ]


def test_graphs_are_freed_with_their_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device memory must be freed by reference counting, not by the garbage collector."""
    model = make("llama")
    decode_by_graphs(monkeypatch)
    with use_slot_attention(model):
        backend = SlotBackend[ChunkedRequest](0, model, 2, 30, lambda logits, sequences: [0] * len(sequences))
        request = ChunkedRequest([7] * 20)
        backend.add(request)
        for _ in range(20):
            request.add_pending(1)
            backend.step()
    graphs = backend._graphs
    assert graphs is not None and graphs._graphs
    reference = weakref.ref(graphs)
    del graphs, backend
    assert reference() is None


def test_prefill_when_enough_slots_need_it() -> None:
    assert next_step_is_decode([1])
    assert next_step_is_decode([1] * 255 + [16])  # a few pending tokens: token by token
    assert not next_step_is_decode([2, 16])  # no slot would choose a token
    assert not next_step_is_decode([17, 1, 1])
    assert next_step_is_decode([17] * 31 + [1] * 225)
    assert not next_step_is_decode([17] * 32 + [1] * 224)


def test_no_slot_is_skipped_forever() -> None:
    """Requests with 1 to 100 pending tokens, 1 to 40 tokens to generate and forced tokens in between all end, with a bound
    on the steps for which a slot is skipped."""
    numbers = random.Random(0)
    waiting = [(numbers.choice((1, 5, 30, 100)), numbers.randint(1, 40)) for _ in range(400)]
    slots: list[tuple[int, int]] = []  # pending tokens, tokens to generate
    num_skipped, most_skipped = [0] * 64, 0
    num_steps = 0
    while waiting or slots:
        while waiting and len(slots) < 64:
            slots.append(waiting.pop())
        decoding = next_step_is_decode([pending for pending, _ in slots])
        num_steps += 1
        for slot, (pending, left) in enumerate(slots):
            num_skipped[slot] = num_skipped[slot] + 1 if decoding and pending > 16 else 0
            most_skipped = max(most_skipped, *num_skipped)
            if not decoding or pending == 1:
                slots[slot] = (numbers.choice((1, 1, 1, 1, 4, 30)), left - 1)
            elif pending <= 16:
                slots[slot] = (pending - 1, left)
        slots = [slot for slot in slots if slot[1]]
    assert 0 < most_skipped <= 40 * 5 and num_steps < 400
