"""Training against Hugging Face's Trainer and TRL's SFTTrainer, all on DeepSpeed ZeRO-1 in fp32, one core a rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmarks.harness import Comparison, Contender, Output, close_to, launched, no_gate, python
from benchmarks.training import material

TOLERANCE = 1e-6  # relative, of loss and gradient norm
WAYS = {
    "6x384": ("padded", "grouped", "packed"),
    "12x768": ("grouped", "packed"),  # padded loses to grouped by its padding, whatever the model
}
STEPS = {"6x384": 2, "12x768": 1}
NAMES = {
    "padded": "HF Trainer padded",
    "grouped": "HF Trainer length-grouped",
    "packed": "TRL SFT packed, padding-free, chunked loss",
}


def comparisons() -> Iterator[Comparison]:
    material.prepare()
    for shape, ranks in (("6x384", 1), ("6x384", 2), ("12x768", 2)):
        yield training(shape, ranks)
    yield Comparison(
        work="share of a training step outside forward, backward and optimizer (GPT-2 6x384, 2 ranks)",
        figure="share_percent",
        unit="%",
        contenders=[Contender("trainer", on_ranks(2, "overhead.py", "6x384", "3"), peer=False)],
        gate=no_gate,
        limit=2.0,
        higher_is_better=False,
        notes="the real loop, from one step's end to the next; outside are data, layout, agreement, log and watchdog, "
        "and also waiting for the other rank in the agreement on the loss",
    )
    yield Comparison(
        work="decomposer + solver on Socratic GSM8K: tokens computed in an epoch",
        figure="tokens",
        unit="tokens",
        contenders=[
            Contender(
                "trainer: complementary masks, packed", on_ranks(1, "two_models.py", "masks"), peer=False
            ),
            Contender(
                "one example per sub-question and per solution, padded",
                on_ranks(1, "two_models.py", "apart"),
            ),
        ],
        gate=close_gradients,
        goal=3.0,
        higher_is_better=False,
        notes="test_socratic (1319 problems; train_socratic is not among the stored data); padded in batches of 8 "
        "sorted by length; loss and gradient of both models on 4 problems agree",
    )


def training(shape: str, ranks: int) -> Comparison:
    """Real tokens a second. The peers' ways share a process: imports cost more than steps."""
    ways, steps = WAYS[shape], str(STEPS[shape])
    return Comparison(
        work=f"training, real tokens/s: GPT-2 {shape}, fp32, {ranks} rank{'s' * (ranks > 1)} of one core",
        figure="tokens_per_second",
        unit="tokens/s",
        contenders=[
            Contender("trainer", on_ranks(ranks, "ours.py", shape, steps), peer=False),
            Contender(
                "the fastest of " + ", ".join(NAMES[way] for way in ways),
                on_ranks(ranks, "peer.py", shape, steps, *ways),
            ),
        ],
        gate=same_training,
        goal=3.5,
        notes="GSM8K train as chains of thought, GPT-2's tokenizer and dropout; about 1000 tokens a rank and step; "
        "same AdamW (torch, fused), ZeRO-1, clipping",
    )


def same_training(outputs: Mapping[str, Output]) -> None:
    """Loss and gradient norm of one step without dropout, and how many tokens were learned. Raises Unequal."""
    expected = {key: next(iter(outputs.values()))[key][0] for key in material.PROOF}
    for name, output in outputs.items():
        for key, value in expected.items():
            for way, found in zip(output.get("ways", {name: None}), output[key], strict=True):
                close_to(f"{name}, {way}: {key}", found, value, 0.0 if key == "learned_tokens" else TOLERANCE)


def close_gradients(outputs: Mapping[str, Output]) -> None:
    """Losses and gradients of both models. (The sums run over other orders: 1e-5 for every gradient's norm.)"""
    one, other = outputs.values()
    for key in ("losses", "gradients"):
        for found, value in zip(one[key], other[key], strict=True):
            close_to(key, found, value, 1e-6 if key == "losses" else 1e-5)


def on_ranks(ranks: int, script: str, *arguments: str) -> list[str]:
    """argv for a script beside this file: plain python on one rank, else the launcher."""
    path = f"benchmarks/training/{script}"
    return launched(ranks, "--no_local_rank", path, *arguments) if ranks > 1 else python(path, *arguments)
