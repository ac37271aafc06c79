"""A quick start of a process: what libraries do there for nobody.

torch, transformers and deepspeed make about a million objects that live until the process ends. While they are loaded,
Python's collector looks through all of them again and again. Measured, in CPU seconds of a rank: 4.9 -> 3.8.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator


def pause_gc() -> None:
    """Called by a tool that is about to load the heavy libraries: no collection until `done`."""
    gc.disable()


def freeze_gc() -> None:
    """Loaded: collect from now on, but only among what is made from now on. Without `begin` nothing changes."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def torch_compile_disabled() -> Iterator[None]:
    """Inside, torch.compile gives functions back as they are. For `deepspeed.initialize`.

    It looks whether the optimizer is Muon, and importing Muon (0.19.8) decorates kernels that AdamW never calls: that
    would load torch's compiler, 0.9 CPU seconds of a rank.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # read when a function is decorated, not when it runs
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before
