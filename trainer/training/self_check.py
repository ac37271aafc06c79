"""Before the first step: does this model, in this version of transformers, really keep packed examples apart?

Packing depends on a model passing positions and boundaries down to its attention. One that ignores them (ALiBi, a
custom attention) trains on wrong numbers without an error. The loss would hardly show it on random weights, and bf16
rounding would hide the rest, so what is asked is exact: an example's logits must not change by one bit when the
tokens of its neighbour do.
"""

from __future__ import annotations

import numpy as np
import torch

from trainer.errors import UserError
from trainer.training.batches import MicroBatch
from trainer.training.loss import Packed, lay_out, packed_logits

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}  # of logits, in parts of their standard deviation
_REMEDY = "train it with --packing false"
_TOKENS = 32  # of each of the two examples; more would show nothing more, and a run waits for this


def check_packing(
    model: torch.nn.Module, batch: MicroBatch, dtype: torch.dtype, device: torch.device
) -> float:
    """Difference of a packed example's logits from those it has alone, in parts of their standard deviation.

    Collective under ZeRO-3. Raises UserError if a neighbour shows through, or if positions do not restart.
    """
    neighbour, example = ((tokens[:_TOKENS], learned) for tokens, learned in (batch.examples * 2)[:2])
    other = ((neighbour[0] + 1) % max(2, int(neighbour[0].max())), neighbour[1])
    was_training = model.training
    model.eval()
    with torch.no_grad():
        packed = _logits(model, [neighbour, example], device)
        beside_another = _logits(model, [other, example], device)
        alone = _logits(model, [example], device)
    model.train(was_training)
    if not torch.equal(packed, beside_another):
        raise UserError(
            f"this model sees across the examples of a pack: its attention ignores boundaries; {_REMEDY}"
        )
    difference = float((packed - alone).abs().max() / alone.std())
    if not difference <= _TOLERANCE[dtype]:
        raise UserError(
            f"this model gives a packed example other logits than the same example alone (by {difference:.2g} of their "
            f"standard deviation): its positions do not restart; {_REMEDY}"
        )
    return difference


def _logits(
    model: torch.nn.Module, examples: list[tuple[np.ndarray, np.ndarray]], device: torch.device
) -> torch.Tensor:
    """Logits [tokens - 1, vocabulary] of the last example of a pack."""
    marked = [(tokens, np.zeros(len(tokens), bool)) for tokens, _ in examples[:-1]]
    marked.append((examples[-1][0], np.ones(len(examples[-1][0]), bool)))
    packed = lay_out(MicroBatch(0, [], marked), True, device)
    assert isinstance(packed, Packed)
    return packed_logits(model, packed).float()
