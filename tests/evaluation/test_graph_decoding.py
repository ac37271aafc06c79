"""Decoding as on a GPU, where a pass is a graph or reads prompts: the texts are those of passes that read everything."""

from __future__ import annotations

import random
import weakref

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tests.evaluation.test_generate import MODELS, make, prompts, solve
from tests.recorded_launches import decode_by_graphs
from trainer.evaluation.backends.slots import SequenceState, SlotBackend, use_graph_step
from trainer.models.slot_attention import use_slot_attention
from trainer.models.tokenizer import load_tokenizer
from trainer.shards.read import Shards


@pytest.fixture(scope="module")
def tokenizer(shards: Shards) -> PreTrainedTokenizerBase:
    return load_tokenizer(shards.tokenizer_path)


@pytest.mark.parametrize("name", MODELS)
def test_graphs_change_no_token(
    name: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and sampled; prompts of 1 to 30 tokens, so that some are read one by one; slots empty in the end."""
    model, texts, ends = make(name), prompts(20), frozenset(range(40))
    expected = [
        solve(model, tokenizer, texts, num_slots=9, ends=ends, temperature=degrees) for degrees in (0.0, 1.0)
    ]
    replayed = decode_by_graphs(monkeypatch)
    found = [
        solve(model, tokenizer, texts, num_slots=9, ends=ends, temperature=degrees) for degrees in (0.0, 1.0)
    ]
    assert found == expected
    assert len(set(replayed)) > 3 and len({shape.block for shape in replayed}) > 2


class Listener:
    """A text that is read some tokens at a time, whenever it is let. `seen`: logits by the number of tokens read."""

    def __init__(self, text: list[int]) -> None:
        self.text = text
        self.given = 0
        self.seen: dict[int, torch.Tensor] = {}
        self.sequences = [SequenceState([])]
        self.next_model: int | None = 1  # another model's

    def hear(self, count: int) -> None:
        self.sequences[0].pending += self.text[self.given : self.given + count]
        self.given += count
        self.next_model = 0


@pytest.mark.parametrize("name", MODELS)
def test_parked_slots_go_on_where_they_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At random some read one token, a few or many, others wait; a text that fills its slot waits on among the rest."""
    numbers = random.Random(3)
    model, capacity = make(name), 60
    replayed = decode_by_graphs(monkeypatch)
    texts = [
        [numbers.randrange(1, 1024) for _ in range(length)] for length in (60, 60, 31, 47, 52, 20, 58, 44, 38)
    ]
    listeners = [Listener(text) for text in texts]

    def keep(logits: torch.Tensor, feeds: list[SequenceState]) -> list[int]:
        for row, feed in zip(logits, feeds, strict=True):
            listener = next(one for one in listeners if one.sequences[0] is feed)
            listener.seen[feed.length] = row.clone()
        return [0] * len(feeds)

    with use_slot_attention(model):
        machine = SlotBackend[Listener](0, model, 9, capacity, keep)
        for listener in listeners:
            machine.add(listener)
        listeners[0].hear(60)
        while any(one.given < len(one.text) or one.next_model == 0 for one in listeners):
            for one in listeners[1:]:
                if one.next_model == 1 and one.given < len(one.text) and numbers.random() < 0.6:
                    left = len(one.text) - one.given
                    one.hear(1 if left < 4 else min(numbers.choice((1, 1, 1, 2, 3, 9)), left))
            if machine.num_waiting:
                for one, _ in machine.step():
                    assert not one.sequences[0].pending
                    one.next_model = 1
            if listeners[5].given == 20 and listeners[5].next_model == 1:
                listeners[5].next_model = None  # leaves, and the last one moves into its slot
    for listener in listeners:
        with torch.no_grad():
            expected = model(torch.tensor([listener.text])).logits[0]
        assert len(listener.text) in listener.seen
        for length, logits in listener.seen.items():
            torch.testing.assert_close(logits, expected[length - 1], rtol=1e-4, atol=1e-4)
    assert len(replayed) > 20 and len(set(replayed)) > 1


def test_a_model_that_asks_the_device_for_a_number_decodes_without_graphs(
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


def test_graphs_are_gone_with_their_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: what they hold on the device is not left to the garbage collector."""
    model = make("llama")
    decode_by_graphs(monkeypatch)
    with use_slot_attention(model):
        machine = SlotBackend[Listener](0, model, 2, 30, lambda logits, feeds: [0] * len(feeds))
        listener = Listener([7] * 20)
        machine.add(listener)
        for _ in range(20):
            listener.hear(1)
            machine.step()
    graphs = machine._graphs
    assert graphs is not None and graphs.captured
    there = weakref.ref(graphs)
    del graphs, machine
    assert there() is None


def test_a_pass_reads_when_enough_wait_for_it() -> None:
    assert use_graph_step([1])
    assert use_graph_step([1] * 255 + [16])  # few are read one by one
    assert not use_graph_step([2, 16])  # nobody would choose a token
    assert not use_graph_step([17, 1, 1])
    assert use_graph_step([17] * 31 + [1] * 225)
    assert not use_graph_step([17] * 32 + [1] * 224)


def test_nobody_stands_still_for_ever() -> None:
    """Problems of 1 to 100 tokens to read and 1 to 40 to write, with some to read in between: all end, each in passes
    not many more than what it and those before it have to write."""
    numbers = random.Random(0)
    waiting = [(numbers.choice((1, 5, 30, 100)), numbers.randint(1, 40)) for _ in range(400)]
    slots: list[tuple[int, int]] = []  # tokens to read, tokens to write
    stood, longest_stand = [0] * 64, 0
    num_passes = 0
    while waiting or slots:
        while waiting and len(slots) < 64:
            slots.append(waiting.pop())
        decoding = use_graph_step([pending for pending, _ in slots])
        num_passes += 1
        for slot, (pending, left) in enumerate(slots):
            stood[slot] = stood[slot] + 1 if decoding and pending > 16 else 0
            longest_stand = max(longest_stand, *stood)
            if not decoding or pending == 1:
                slots[slot] = (numbers.choice((1, 1, 1, 1, 4, 30)), left - 1)
            elif pending <= 16:
                slots[slot] = (pending - 1, left)
        slots = [slot for slot in slots if slot[1]]
    assert 0 < longest_stand <= 40 * 5 and num_passes < 400
