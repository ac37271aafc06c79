"""One rank of a real DeepSpeed training of a model too narrow to matter: template.py FOLDER LAYERS HEADS STAGE...

Saves FOLDER/stage<k>/, exactly the files that DeepSpeed 0.19.8 writes; make.py widens their tensors.
"""

from __future__ import annotations

import os
import sys

import deepspeed
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from trainer.runtime import startup


def main() -> None:
    folder, layers, heads, *stages = sys.argv[1:]
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    for stage in stages:
        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=int(layers), n_head=int(heads), n_embd=int(heads), vocab_size=64, n_positions=8
        )
        with startup.torch_compile_disabled():
            engine, *_ = deepspeed.initialize(model=GPT2LMHeadModel(config), config={
                "train_micro_batch_size_per_gpu": 1,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}},
                # one flat tensor of all parameters, whatever the model's size
                "zero_optimization": {"stage": int(stage), "sub_group_size": 1 << 40},
            })  # fmt: skip
        tokens = torch.randint(
            0, 64, (1, 8), generator=torch.Generator().manual_seed(int(os.environ["RANK"]))
        )
        engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
        engine.step()
        engine.save_checkpoint(folder, tag=f"stage{stage}", save_latest=False)
        engine.destroy()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
