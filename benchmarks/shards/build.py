"""Tokenise GSM8K's training problems on two cores: build.py ours|datasets OUTPUT. Libraries are loaded before, the tokenizer is not.

Both cut every problem into the same segments with the same function and give them to the same tokenizer; `datasets.map`
gets whole batches and two processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.training.material import data_folder  # noqa: E402
from trainer.models.tokenizer import load_tokenizer  # noqa: E402
from trainer.problems.gsm8k import problem_from_record  # noqa: E402
from trainer.shards.segments import segment_texts  # noqa: E402

PROCESSES = 2


def ours(output: Path) -> tuple[float, np.ndarray]:
    from trainer.settings import PrepareSettings
    from trainer.shards.prepare import prepare

    data = data_folder()
    wanted = PrepareSettings(
        data="gsm8k", data_path=str(data / "gsm8k"), split="train", tokenizer_name=str(data / "gpt2-tokenizer"),
        output_dir=str(output), num_processes=PROCESSES,
    )  # fmt: skip
    start = time.perf_counter()
    shards = prepare(wanted)
    return time.perf_counter() - start, np.asarray(shards.tokens)


def with_datasets(output: Path) -> tuple[float, np.ndarray]:
    import datasets

    data = data_folder()

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pieces = []
        for question, answer in zip(batch["question"], batch["answer"], strict=True):
            problem = problem_from_record({"question": question, "answer": answer}, "x")
            pieces.append(segment_texts(problem))
        encoded = iter(
            tokenizer(
                [text for cut in pieces for _, text in cut],
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
            )["input_ids"]
        )
        rows: dict[str, list[Any]] = {"input_ids": [], "lengths": [], "roles": []}
        for cut in pieces:
            segments = [next(encoded) for _ in cut]
            segments[-1] = [*segments[-1], tokenizer.eos_token_id]
            rows["input_ids"].append([token for segment in segments for token in segment])
            rows["lengths"].append([len(segment) for segment in segments])
            rows["roles"].append([int(role) for role, _ in cut])
        return rows

    start = time.perf_counter()
    tokenizer = load_tokenizer(data / "gpt2-tokenizer")
    records = datasets.load_dataset(
        "json", data_files=str(data / "gsm8k" / "train.jsonl"), split="train", cache_dir=str(output / "cache")
    )
    mapped = records.map(tokenise, batched=True, num_proc=PROCESSES)
    mapped.save_to_disk(str(output / "saved"))
    seconds = time.perf_counter() - start
    return seconds, np.concatenate([np.asarray(row, np.uint16) for row in mapped["input_ids"]])


def main() -> None:
    name, output = sys.argv[1], Path(sys.argv[2])
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    shutil.rmtree(output, ignore_errors=True)
    load_tokenizer(data_folder() / "gpt2-tokenizer")  # what it imports
    try:
        seconds, tokens = {"ours": ours, "datasets": with_datasets}[name](output)
        digest = hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest()
    finally:
        shutil.rmtree(output, ignore_errors=True)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "tokens": len(tokens),
                "tokens_per_second": len(tokens) / seconds,
                "digest": digest,
            }
        )
    )


if __name__ == "__main__":
    main()
