"""One rank that saves checkpoints in some ZeRO settings and loads them in others: change_layouts.py FOLDER CASES_JSON.

Each `save` trains two steps from the same weights and saves `FOLDER/<name>-<ranks>`, with a digest of every parameter,
master, moment and buffer as DeepSpeed itself gathers them. Each `load` loads every checkpoint of its `sources` into a new
engine with other weights, and appends the comparison of the digests to `FOLDER/loaded.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from tests.export.make_checkpoints import VOCABULARY, config_of, groups_of, model_of
from trainer.errors import UserError
from trainer.runtime import distributed, terminal
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory
from trainer.training import checkpoint
from trainer.zero.optimizer_state import MOMENTS

STEPS = 2


def engine_of(case: dict[str, Any], seed: int) -> Any:
    model = model_of(case)
    if seed:  # weights that a load must replace
        torch.manual_seed(seed)
        with torch.no_grad():
            for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
                tensor.add_(torch.randn_like(tensor))
    engine, *_ = deepspeed.initialize(
        model=model, config=config_of(case), model_parameters=groups_of(model, case), dist_init_required=False
    )
    engine.checkpoint_engine = checkpoint.SafeCheckpointEngine()
    return engine


def step(engine: Any) -> None:
    tokens = torch.randint(0, VOCABULARY, (2, 16))
    engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
    engine.step()


def digests(engine: Any, round_robin: bool) -> dict[str, str]:
    """Return the digest of every tensor, gathered by DeepSpeed's functions alone. Collective."""
    optimizer, found = engine.optimizer, {}
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed links the states after the step of the first of several groups.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = digest(parameter)
        # With round_robin_gradients DeepSpeed gathers masters and moments wrongly.
        if not parameter.requires_grad or round_robin:
            continue
        if engine.zero_optimization():
            found[f"master of {name}"] = digest(safe_get_full_fp32_param(parameter))
        else:
            found[f"master of {name}"] = digest(parameter)
        for which in MOMENTS:
            if engine.zero_optimization():
                found[f"{which} of {name}"] = digest(safe_get_full_optimizer_state(parameter, which))
            else:
                found[f"{which} of {name}"] = digest(optimizer.state[parameter][which])
    found |= {
        name: digest(buffer)
        for name, buffer in engine.module.named_buffers()
        if name in ("calibration", "scale")
    }
    found["steps"] = str(sorted(set(adam_steps(optimizer))))
    return found


def adam_steps(optimizer: Any) -> list[int]:
    plain = getattr(optimizer, "optimizer", optimizer)
    return [int(state["step"]) for state in plain.state.values()]


def digest(tensor: torch.Tensor) -> str:
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return f"{tensor.dtype} {hashlib.sha256(content.numpy().tobytes()).hexdigest()}"


def save(case: dict[str, Any], folder: Path, rank: int, world_size: int) -> None:
    engine = engine_of(case, seed=0)
    torch.manual_seed(rank)
    for _ in range(STEPS):
        step(engine)
    name = f"{case['name']}-{world_size}"
    found = digests(engine, "robin" in name)
    facts = {
        "step": STEPS,
        "world_size": world_size,
        "zero_stage": case["stage"],
        "dtype": case["dtype"],
        "digests": found,
    }
    model = folder / "model"
    model.mkdir(exist_ok=True)
    checkpoint.save(engine, RunDirectory(folder / name), facts, model)
    engine.destroy()


def load(case: dict[str, Any], folder: Path, rank: int, world_size: int) -> None:
    for path in sorted(folder.glob("*/checkpoints/step-*")):
        if path.parents[1].name not in case["sources"]:
            continue
        facts = atomic_dir.read_manifest(path)["facts"]
        engine = engine_of(case, seed=7)
        checkpoint.load(engine, path)
        expected, found = facts["digests"], digests(engine, "robin" in case["name"])
        wrong = {key for key in set(expected) & set(found) if expected[key] != found[key]}
        step(engine)
        line: dict[str, Any] = {
            "from": path.parents[1].name, "to": f"{case['name']}-{world_size}", "compared": len(set(expected) & set(found)),
            "wrong": sorted(wrong), "global_steps": engine.global_steps, "steps": adam_steps(engine.optimizer),
        }  # fmt: skip
        if rank == 0:
            with open(folder / "loaded.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        engine.destroy()


def main() -> None:
    folder, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    environment = distributed.initialize(120)
    deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False)
    for case in cases:
        act = save if case["act"] == "save" else load
        try:
            act(case, folder, environment.rank, environment.world_size)
        except UserError as error:
            raise RuntimeError(f"{case}: {error}") from error


terminal.run_main(main)
