"""Choice of torch's attention kernels for lengths that change from call to call."""

from __future__ import annotations

import torch


def disable_cudnn_sdpa() -> None:
    """Exclude cuDNN's kernel from `scaled_dot_product_attention` in this process.

    On Hopper and Blackwell torch (2.11 to 2.13) prefers cuDNN's kernel, which builds a plan for every new shape: 0.4 s
    on a B200 (modelscope/FunASR #3704). Packed examples and generation slots have a new shape at almost every call.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
