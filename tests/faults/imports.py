# ruff: noqa: F401, B018
"""Imports of a training before its first step, done once in the server that forks ranks (forked_ranks.py).

Without them a start takes twelve seconds instead of two or three. Must not start threads or draw random numbers.
"""

from __future__ import annotations

import deepspeed
import deepspeed.module_inject
import deepspeed.ops
import deepspeed.runtime.zero.muon.muon_optimizer
import deepspeed.runtime.zero.partition_parameters
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2
import torch._dynamo
import torch._inductor.compile_fx
import torch.distributed.tensor
import torch.profiler
import transformers.core_model_loading
import transformers.generation
import transformers.integrations.deepspeed
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.tokenization_utils_tokenizers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import trainer.runtime.restarts
import trainer.training.loop
import trainer.training.validation

deepspeed.ops.__compatible_ops__  # searches compilers and libraries
get_checkpoint_conversion_mapping("gpt2")
