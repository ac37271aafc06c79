"""Training against Hugging Face's Trainer and TRL's SFTTrainer, all on DeepSpeed ZeRO-1, one core a rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmarks.harness import Comparison, Contender, Gate, Output, close_to, no_gate, python
from benchmarks.training import material

TOLERANCE = {"fp32": 1e-6, "bf16": 2e-3}  # relative, of loss and gradient norm
PEERS = {
    "padded": "HF Trainer padded",
    "grouped": "HF Trainer length-grouped",
    "packed": "TRL SFT packed, padding-free, chunked loss",
}
CASES = (
    ("fp32", "6x384", 1),
    ("fp32", "6x384", 2),
    ("fp32", "12x768", 1),
    ("fp32", "12x768", 2),
    ("bf16", "6x384", 2),
)
STEPS = {"6x384": 2, "12x768": 1}
HOPELESS = 1.25


def comparisons() -> Iterator[Comparison]:
    material.prepare()
    for case in CASES:
        yield training(*case)
    yield Comparison(
        work="share of a training step outside forward, backward and optimizer (GPT-2 6x384, 2 ranks)",
        figure="share_percent",
        unit="%",
        contenders=[Contender("trainer", script("overhead.py", "6x384", 5), peer=False, ranks=2)],
        gate=no_gate,
        limit=2.0,
        higher_is_better=False,
        rounds=1,
        notes="the real loop, from one step's end to the next; outside are data, layout, agreement, log and watchdog, "
        "and also waiting for the other rank in the agreement on the loss",
    )
    yield Comparison(
        work="decomposer + solver on Socratic GSM8K: tokens computed in an epoch",
        figure="tokens",
        unit="tokens",
        contenders=[
            Contender("trainer: complementary masks, packed", script("two_models.py", "masks"), peer=False),
            Contender(
                "one example per sub-question and per solution, padded",
                script("two_models.py", "apart"),
            ),
        ],
        gate=close_gradients,
        goal=3.0,
        higher_is_better=False,
        rounds=1,
        notes="a count. test_socratic (1319 problems; train_socratic is not among the stored data); padded in batches "
        "of 8 sorted by length; loss and gradient of both models on 4 problems agree",
    )


def training(dtype: str, shape: str, ranks: int) -> Comparison:
    """Real tokens a second."""
    steps, first = STEPS[shape], (dtype, shape, ranks) == CASES[0]
    contenders = [
        Contender("trainer", script("ours.py", shape, steps, dtype), False, ranks=ranks, is_persistent=True)
    ]
    for way, name in PEERS.items():
        if first or way != "padded":  # it loses to grouped by its padding, whatever the model
            command = script("peer.py", way, shape, steps, dtype)
            contenders.append(Contender(name, command, ranks=ranks, is_persistent=True))
    return Comparison(
        work=f"training, real tokens/s: GPT-2 {shape}, {dtype}, {ranks} rank{'s' * (ranks > 1)} of one core",
        figure="tokens_per_second",
        unit="tokens/s",
        contenders=contenders,
        gate=same_training(TOLERANCE[dtype]),
        goal=3.5,
        hopeless=HOPELESS,
        notes=f"about {material.PACK_LENGTHS[shape]} tokens a rank and step; GSM8K train as chains of thought, GPT-2's dropout, "
        "ZeRO-1, clipping, the same AdamW (torch, fused)",
    )


def same_training(tolerance: float) -> Gate:
    """Loss and gradient norm of one step without dropout, and how many tokens were learned."""

    def gate(outputs: Mapping[str, Output]) -> None:
        expected = next(iter(outputs.values()))
        for name, output in outputs.items():
            for key in material.PROOF:
                allowed = 0.0 if key == "learned_tokens" else tolerance
                close_to(f"{name}: {key}", output[key], expected[key], allowed)

    return gate


def close_gradients(outputs: Mapping[str, Output]) -> None:
    """Losses and gradients of both models. (The sums run over other orders: 1e-5 for every gradient's norm.)"""
    one, other = outputs.values()
    for key in ("losses", "gradients"):
        for found, value in zip(one[key], other[key], strict=True):
            close_to(key, found, value, 1e-6 if key == "losses" else 1e-5)


def script(name: str, *arguments: object) -> list[str]:
    """argv for a script beside this file."""
    return python(f"benchmarks/training/{name}", *map(str, arguments))
