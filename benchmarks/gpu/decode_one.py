"""One way to decode: python -m benchmarks.gpu.decode_one ours|eager|static [--tiny]

Random weights, which hardly ever end a text before the limit. The last line on stdout is JSON.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu import materials
from benchmarks.gpu.evaluate_one import ours, static
from trainer.evaluation.backends import slots
from trainer.models import cuda_graphs, load, presets
from trainer.models.tokenizer import load_tokenizer


def main() -> None:
    way, tiny = sys.argv[1], "--tiny" in sys.argv
    problems, limit, num_slots = (12, 16, 4) if tiny else (512, 150, 256)
    shards = materials.stories("test", problems, tiny)
    tokenizer = load_tokenizer(shards.tokenizer_path)
    config = presets.student_config("stories-0.2m" if tiny else "stories-30m", len(tokenizer))
    config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    dtype = torch.float32 if tiny else torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.to(device=load.local_device()).eval()
    if way == "eager":
        slots.uses_cuda_graphs = lambda device: False
    captures: list[float] = []
    capture = cuda_graphs.CudaGraphRunner._try_to_capture

    def timed(graphs: cuda_graphs.CudaGraphRunner, shape: cuda_graphs.GraphShape) -> None:
        start = time.perf_counter()
        capture(graphs, shape)
        captures.append(time.perf_counter() - start)

    cuda_graphs.CudaGraphRunner._try_to_capture = timed  # type: ignore[method-assign]
    solve = static if way == "static" else ours
    solve(model, tokenizer, shards, range(num_slots), limit // 7, num_slots)  # warm up
    captures.clear()
    start = time.perf_counter()
    answers = solve(model, tokenizer, shards, range(problems), limit, num_slots)
    seconds = time.perf_counter() - start
    steps = -(-problems // num_slots) * limit
    told = {
        "milliseconds": 1000 * seconds / steps,
        "captures": len(captures),
        "capture_seconds": sum(captures),
    }
    print(json.dumps({**told, "problems": len(answers)}))


if __name__ == "__main__":
    main()
