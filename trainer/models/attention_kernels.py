"""Which of torch's attention kernels are fit for lengths that change from call to call."""

from __future__ import annotations

import torch


def disable_cudnn_sdpa() -> None:
    """For this process: `scaled_dot_product_attention` takes flash or memory-efficient attention instead.

    On Hopper and Blackwell torch (2.11 to 2.13) tries cuDNN's first, which builds a plan for every new shape: 0.4 s were
    seen on a B200 (modelscope/FunASR #3704). Examples of a pack and slots in use have a new shape at almost every call.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
