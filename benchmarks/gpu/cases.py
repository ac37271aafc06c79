"""Cases measured on the GPU, and tiny versions for a machine without one.

Shapes are published ones with random weights and GPT-2's tokenizer, without dropout: torch's fused attention has none.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import MATERIALS, REPOSITORY, Contender, python

BROUGHT = REPOSITORY / "build" / "gpu"  # what `gpu.sh wheels` fetched where there is a network
METHOD = "cot"  # every problem of GSM8K has solutions
VOCABULARY = 50304  # GPT-2's tokenizer, padded to a multiple of 64
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
WARM_UP, TIMED = 2, 5  # steps
FAILED_SPEED = 1e-9  # of a contender that does not fit or times out: never the best, and not zero

# name -> what of the published shape is changed
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": dict.fromkeys(DROPOUTS, 0.0),
    "gpt2-xl": dict.fromkeys(DROPOUTS, 0.0),
    "llama-2-7b": {"vocab_size": VOCABULARY},
}
_TINY_GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 1024}
_TINY_LLAMA = {
    **{"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 80, "vocab_size": 1024},
    **{"num_attention_heads": 2, "num_key_value_heads": 2},
}


@dataclass(frozen=True)
class Case:
    """One way to train a shape: `packs` of `pack_length` tokens in a forward pass, `accumulation` of them a step."""

    shape: str
    stage: int
    packs: int
    accumulation: int = 1
    checkpointing: bool = False
    tiny: bool = False

    @property
    def name(self) -> str:
        parts = [self.shape + (" in tiny" if self.tiny else ""), f"ZeRO-{self.stage}"]
        parts += ["recomputed"] * self.checkpointing
        size = f"{self.packs} x {self.pack_length} tokens"
        return ", ".join([*parts, size if self.accumulation == 1 else f"{self.accumulation} times {size}"])

    @property
    def pack_length(self) -> int:
        return 256 if self.tiny else 1024

    def flags(self) -> list[str]:
        """Return argv from which `parse` restores the case."""
        values = (self.shape, self.stage, self.packs, self.accumulation, int(self.checkpointing))
        return [*map(str, values), *["--tiny"] * self.tiny]


def parse(arguments: list[str]) -> Case:
    numbers = [int(text) for text in arguments[1:5]]
    return Case(arguments[0], *numbers[:3], bool(numbers[3]), "--tiny" in arguments)


def training(tiny: bool) -> list[Case]:
    """Return the cases measured for speed."""
    if tiny:
        return [Case("gpt2", 1, 2, tiny=True), Case("llama-2-7b", 3, 2, tiny=True)]
    return [
        Case("gpt2-xl", 1, 16, 4),
        Case("gpt2", 1, 32, 2),
        Case("llama-2-7b", 3, 4, 4),
        Case("gpt2-xl", 3, 16, 4),
        Case("gpt2", 3, 32, 2),
    ]


def memory(tiny: bool) -> list[Case]:
    """Return the cases for the planner besides `training`. ZeRO-1 of 7B does not fit into 141 GB: the plan refuses it."""
    if tiny:
        return [Case("gpt2", 1, 2, checkpointing=True, tiny=True)]
    return [
        Case("gpt2-xl", 1, 16, checkpointing=True),
        Case("gpt2", 2, 32, 2),
        Case("llama-2-7b", 3, 16, checkpointing=True),
        Case("llama-2-7b", 1, 4, 4),
    ]


def config(shape: str, tiny: bool, **changes: Any) -> Any:
    """Return the transformers config of a shape, without a KV cache."""
    from trainer.models import presets

    found = presets.published_config(shape)
    small = _TINY_LLAMA if shape.startswith("llama") else _TINY_GPT2
    for key, value in {**SHAPES[shape], **(small if tiny else {}), **changes}.items():
        setattr(found, key, value)
    found.use_cache = False
    return found


def environment(tiny: bool) -> dict[str, str]:
    """Return the variables of a contender: on the GPU machine it uses all cores."""
    return {} if tiny else {"OMP_NUM_THREADS": str(os.cpu_count())}


def contender(name: str, module: str, *arguments: str, tiny: bool) -> Contender:
    """Return a contender that runs benchmarks.gpu.`module`; one not called "ours" is a peer."""
    command = python("-m", f"benchmarks.gpu.{module}", *arguments, *["--tiny"] * tiny)
    return Contender(name, command, name != "ours", environment(tiny))


def folder(tiny: bool) -> Path:
    return MATERIALS / ("gpu-tiny" if tiny else "gpu")
