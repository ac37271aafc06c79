"""Before the first step: does this model, in this version of transformers, really keep packed examples apart?

Packing depends on a model passing positions and boundaries down to its attention. One that ignores them (ALiBi, a
custom attention) trains on wrong numbers without an error, so the first examples are run packed and one by one.
"""

from __future__ import annotations

import torch

from trainer.errors import UserError
from trainer.training.batches import MicroBatch
from trainer.training.loss import lay_out, token_losses

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative to the loss per token


def check_packing(
    model: torch.nn.Module, batch: MicroBatch, dtype: torch.dtype, device: torch.device
) -> float:
    """Collective under ZeRO-3. Relative difference of the loss of a batch's first examples, packed and one by one.

    Raises UserError if it is more than rounding.
    """
    few = batch.examples[:3]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        together = _loss(model, MicroBatch(0, [], few), device)
        alone = sum(_loss(model, MicroBatch(0, [], [example]), device) for example in few)
    model.train(was_training)
    difference = abs(together - alone) / max(1e-9, abs(alone))
    if not difference <= _TOLERANCE[dtype]:
        raise UserError(
            f"packing changes the loss of this model ({together:.6f} packed, {alone:.6f} one by one): "
            "its attention or its positions ignore the boundaries of examples; train it with --packing false"
        )
    return difference


def _loss(model: torch.nn.Module, batch: MicroBatch, device: torch.device) -> float:
    return float(token_losses(model, lay_out(batch, True, device)))
