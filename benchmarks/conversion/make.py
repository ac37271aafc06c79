"""ZeRO checkpoints of real sizes without training: a real one of a very narrow model, its tensors made wide.

DeepSpeed itself writes the narrow one (template.py), so every key, class and file name is its own. Here shapes become
those of the wanted GPT-2, and every value a function of its place in the model, the same in all stages and world sizes.
One file is in memory at a time. `python benchmarks/conversion/make.py FOLDER SIZE STAGE RANKS` makes one by hand.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from tests.distributed import run_well  # noqa: E402
from trainer.models import architecture  # noqa: E402
from trainer.storage import atomic_dir  # noqa: E402

# layers, width, heads, vocabulary, positions
SIZES = {
    "tiny": (2, 48, 4, 257, 64),
    "124M": (12, 768, 12, 50257, 1024),
    "355M": (24, 1024, 16, 50257, 1024),
    "774M": (36, 1280, 20, 50257, 1024),
    "1.5B": (48, 1600, 25, 50257, 1024),
}
STEP = 1
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Place:
    """A parameter and the number of elements before it."""

    name: str
    shape: torch.Size
    start: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def config_of(size: str) -> Any:
    from transformers import GPT2Config

    layers, width, heads, vocabulary, positions = SIZES[size]
    return GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary, n_positions=positions
    )


def make(run: Path, size: str, stage: int, ranks: int) -> Path:
    """`run/checkpoints/step-000001`, finished, unless it is there. Returns it."""
    final = run / "checkpoints" / f"step-{STEP:06d}"
    if atomic_dir.is_complete(final):
        return final
    template = _template(run.parent, size, stage, ranks)
    staging = atomic_dir.create_staging(final)
    places = list(_places(size))
    for path in sorted(template.glob("*_states.pt")):
        state = _load(path)
        _widen(state, places, stage, ranks, _rank_of(path))
        torch.save(state, staging / path.name)
        del state
    config_of(size).save_pretrained(staging / "model")
    architecture.record_architecture(staging / "model")
    facts = {
        "step": STEP, "packs_consumed": STEP, "world_size": ranks, "zero_stage": stage, "dtype": "fp32", "method": "cot",
        "data": "none", "model_name": f"gpt2-{size}", "seed": 0, "finished": True,
        "num_parameters": sum(place.count for place in places),
    }  # fmt: skip
    atomic_dir.publish(staging, final, "checkpoint", facts, atomic_dir.digest_files(staging))
    return final


def _template(folder: Path, size: str, stage: int, ranks: int) -> Path:
    layers, _, heads, *_ = SIZES[size]
    kept = folder / f".template-{layers}x{heads}-{ranks}"
    if not (kept / "done").is_file():
        shutil.rmtree(kept, ignore_errors=True)
        script = "benchmarks/conversion/template.py"
        run_well([script, str(kept), str(layers), str(heads), "1", "2", "3"], ranks, timeout=1800)
        (kept / "done").touch()
    return kept / f"stage{stage}"


def _places(size: str) -> Iterator[Place]:
    from transformers import GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(config_of(size))
    start = 0
    for name, parameter in model.named_parameters():
        yield Place(name, parameter.shape, start)
        start += parameter.numel()


def values(start: int, count: int) -> torch.Tensor:
    """Elements [start, start + count) of all parameters in a row: fp32 in [-0.5, 0.5), as good as random."""
    made = torch.empty(count)
    for part in made.split(_CHUNK):  # numbered in int64, which all at once would take three times the memory
        numbers = torch.arange(start, start + len(part), dtype=torch.int64)
        part.copy_(numbers.mul_(2654435761).bitwise_and_((1 << 24) - 1)).mul_(2.0**-24).sub_(0.5)
        start += len(part)
    return made


def _load(path: Path) -> Any:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed: list[Any] = [fragment_address, LossScaler, DynamicLossScaler, ZeroStageEnum]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, weights_only=True)


def _rank_of(path: Path) -> int:
    return int(path.name.split("_rank_")[1].split("_")[0]) if path.name.startswith("zero_") else 0


def _widen(state: dict[str, Any], places: list[Place], stage: int, ranks: int, rank: int) -> None:
    """In place: a file of the narrow model becomes that of the wide one."""
    if "module" in state:
        state["param_shapes"] = [{place.name: place.shape for place in places}]
        if stage < 3:
            module = state["module"]
            for place in places:
                module[place.name] = values(place.start, place.count).view(place.shape)
            for alias, name in state["shared_params"].items():
                module[alias] = module[name]
        return
    inner = state["optimizer_state_dict"]
    if stage < 3:
        master = _partition(places, ranks, rank)
        groups, plain = inner["single_partition_of_fp32_groups"], inner["base_optimizer_state"]
        _describe_partition(inner, places, ranks, rank, len(master))
    else:
        master = torch.cat([_share(place, ranks, rank) for place in places])
        groups, plain = inner["fp32_flat_groups"], inner["optimizer_state_dict"]
    assert len(groups) == 1 and len(plain["state"]) == 1
    groups[0] = master
    plain["state"][0].update(exp_avg=master * 1e-3, exp_avg_sq=master * master)


def _partition(places: list[Place], ranks: int, rank: int) -> torch.Tensor:
    """Stages 1 and 2: an equal part of all parameters in a row, padded at the end to twice the ranks."""
    total = places[-1].start + places[-1].count
    size = 2 * -(-total // (2 * ranks))
    return _part(0, total, size, rank)


def _describe_partition(inner: dict[str, Any], places: list[Place], ranks: int, rank: int, size: int) -> None:
    total = places[-1].start + places[-1].count
    inner["group_paddings"] = [ranks * size - total if rank == ranks - 1 else 0]
    inner["param_alignment_paddings"] = [[0] * len(places)]
    address = type(next(iter(inner["param_slice_mappings"][0].values())))
    inner["param_slice_mappings"] = [{}]
    for place in places:
        first, last = max(place.start, rank * size), min(place.start + place.count, (rank + 1) * size)
        if first < last:
            inner["param_slice_mappings"][0][place.name] = address(last - first, first - rank * size)


def _share(place: Place, ranks: int, rank: int) -> torch.Tensor:
    """Stage 3: an equal part of one parameter, the last one padded."""
    size = -(-place.count // ranks)
    return _part(place.start, place.count, size, rank)


def _part(start: int, count: int, size: int, rank: int) -> torch.Tensor:
    """Values [rank * size, (rank + 1) * size) of the `count` from `start` on, zeros behind their end."""
    part = values(start + rank * size, max(0, min(size, count - rank * size)))
    return part if len(part) == size else torch.nn.functional.pad(part, (0, size - len(part)))


if __name__ == "__main__":
    print(make(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
