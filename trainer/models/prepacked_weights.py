"""Linear layers with prepacked weights for decoding on a CPU.

A decode step multiplies a few rows, one per sequence, with all weights. On a CPU, a plain product first copies the weights
into blocks. For few rows, this copy takes as long as the multiplication. Here oneDNN packs the weights once, before
generation, as `torch.compile` does when it freezes a model. For 32 rows on one core, the products of a layer become 1.2
times faster, and the product with a vocabulary head (384 x 50257) becomes 2.1 times faster.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.runtime import library_internals

_DTYPES = (torch.float32, torch.bfloat16)


@contextlib.contextmanager
def prepacked_weights(model: PreTrainedModel) -> Iterator[None]:
    """Context manager in which the linear layers of a model on the CPU use packed copies of their weights.

    The copies double the memory of these weights. Inside the `with` block, the weights must not change and get no
    gradients. On other devices, the context manager does nothing.
    """
    before: list[tuple[torch.nn.Module, Any]] = []
    try:
        if model.device.type == "cpu" and torch.backends.mkldnn.is_available():
            for module in model.modules():
                weight = _weight(module)
                if weight is not None and weight.dtype in _DTYPES:
                    packed = library_internals.reorder_linear_weight(weight)
                    before.append((module, vars(module).get("forward")))
                    bias: Any = module.bias
                    module.forward = partial(library_internals.linear_by_onednn, weight=packed, bias=bias)
        yield
    finally:
        for module, forward in before:
            del module.forward  # then the forward method of the class applies
            if forward is not None:  # `forward` had been replaced before, by training_kernels.py
                module.forward = forward


def _weight(module: Any) -> torch.Tensor | None:
    """Return the weight [outputs, inputs] if the class of `module` is exactly Linear or Conv1D, else None."""
    if type(module) is torch.nn.Linear:
        return module.weight.detach()
    if type(module) is Conv1D:
        return module.weight.detach().t().contiguous()
    return None
