"""Check before the first step that a layout of the examples gives the logits of the model's plain forward pass.

Plain means: one example at a time, no padding, no cache, transformers' default attention, no replaced kernels. Packing
is right if a model passes positions and boundaries to layers that respect them, padding if its layers ignore padding;
otherwise the model trains on wrong numbers without an error. The layouts are tried from the fastest to the slowest, on
real examples of the run, and the first one that agrees is used.

Differences up to the model's own rounding are accepted: see `_Comparison._rounding`. Rounding may also make a Mixture
of Experts choose another of two nearly equal experts, so a difference counts only if it occurs a second time, with
slightly changed embeddings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.errors import first_line
from trainer.models import load, training_kernels
from trainer.models.default_attention import UnsupportedAttention, can_set_attention, set_attention
from trainer.training.batches import MicroBatch
from trainer.training.layouts import ONE_BY_ONE, BatchLayout, group_examples, split_into_batches
from trainer.training.loss import collate, summed_token_loss, target_logits

Example = tuple[np.ndarray, np.ndarray]

# Root mean square of the difference of a position's logits, relative to the logits' standard deviation.
_MIN_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
_MAX_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-1}
_ROUNDING_FACTOR = 8  # tolerance relative to the plain model's own rounding
_MAX_POSITIONS = 64  # compared in all examples together: logits of a large vocabulary take much memory
_PERTURBATION = 1e-3  # relative, of the embeddings in the second try
_BACKWARD_TOKENS = 16  # of each of two examples: enough to detect a missing backward pass
_MASKED_LOGIT = 1e30  # logits beyond it are masked


@dataclass(frozen=True)
class LayoutChoice:
    """The layout of a run and the result of its check.

    difference: the largest of the target positions (see `distances`). tolerance: the largest allowed. rejected: the
    layouts tried before it, each with the reason. compared_in: "fp32" or "bf16".
    """

    layout: BatchLayout
    difference: float
    tolerance: float
    num_examples: int
    rejected: tuple[tuple[BatchLayout, str], ...]
    compared_in: str

    @property
    def reason(self) -> str:
        """Return why the fastest layout was rejected, "" if it was not."""
        return self.rejected[0][1] if self.rejected else ""


class NoLayout(Exception):
    """No layout gives the model's own logits. `rejected`: as in `LayoutChoice`; empty if the plain forward pass fails."""

    def __init__(self, message: str, rejected: tuple[tuple[BatchLayout, str], ...] = ()):
        super().__init__(message)
        self.rejected = rejected


def choose_layout(
    model: Any,
    layouts: Sequence[BatchLayout],
    examples: Sequence[Example],
    device: torch.device,
    in_training_dtype: Callable[[], contextlib.AbstractContextManager[None]] | None = None,
    agree: Callable[[float], float] = float,
) -> LayoutChoice:
    """Return the first of `layouts` that gives the plain model's logits. Raises NoLayout.

    `model`: a causal LM of transformers, or the engine around one (collective under ZeRO-3); its attention
    implementation is not restored. `examples`: (tokens [n] int64, loss_mask [n] bool) each. `in_training_dtype`:
    context manager in which an fp32 model has its training dtypes; if given, both are compared. `agree` returns rank 0's
    value of a number.
    """
    comparison = _Comparison(model, _subsample(examples), device, agree)
    module = getattr(model, "module", model)
    was_training = module.training
    module.eval()
    rejected: list[tuple[BatchLayout, str]] = []
    try:
        with torch.no_grad():
            comparison.compute_plain()
            for layout in layouts:
                try:
                    difference, tolerance = comparison.difference(layout)
                    rounding = (
                        comparison.rounding_in(in_training_dtype, layout) if in_training_dtype else None
                    )
                    if difference <= tolerance:
                        comparison.try_backward(layout)
                except (torch.OutOfMemoryError, NoLayout):
                    raise
                except Exception as error:
                    failure = (
                        f"the forward or backward pass fails ({type(error).__name__}: {first_line(error)})"
                    )
                    # The message of UnsupportedAttention is written for users.
                    is_explained = isinstance(error, UnsupportedAttention)
                    rejected.append((layout, first_line(error) if is_explained else failure))
                    comparison.recover()
                    continue
                if not difference <= tolerance:
                    reason = "its logits differ from those of the model alone by {:.1g} of their standard deviation (allowed: {:.1g})"
                    rejected.append((layout, reason.format(difference, tolerance)))
                elif rounding is not None and not rounding[0] <= rounding[1]:
                    reason = "in the training dtype its logits differ by {:.1g} of their standard deviation (allowed: {:.1g})"
                    rejected.append((layout, reason.format(*rounding)))
                else:
                    return LayoutChoice(
                        layout, difference, tolerance, len(examples), tuple(rejected), comparison.dtype_name
                    )
    finally:
        module.train(was_training)
    raise NoLayout(rejected[-1][1], tuple(rejected))


def distances(found: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """Return the distance [L] between two sets of logits [L, vocabulary] at each position.

    It is the root mean square difference over the vocabulary, divided by the standard deviation of all `plain` logits.
    Logits that a model masks (huge, or infinite) are excluded.
    """
    difference, deviation = found - plain, plain.std()
    if not deviation < _MASKED_LOGIT:
        usable = plain.abs() < _MASKED_LOGIT
        difference, deviation = torch.where(usable, difference, 0.0), plain[usable].std()
    distance: torch.Tensor = torch.linalg.vector_norm(difference, dim=1) / plain.shape[1] ** 0.5 / deviation
    return distance


def logits_of(
    model: Any, examples: Sequence[Example], layout: BatchLayout, device: torch.device
) -> torch.Tensor:
    """Return the logits at the target positions in a layout, fp32 [L, vocabulary], in the order of the examples."""
    by_example: dict[int, torch.Tensor] = {}
    for group in group_examples([len(tokens) for tokens, _ in examples], layout.arrangement):
        batch = collate(MicroBatch(0, [], [examples[index] for index in group]), layout.is_packed, device)
        counts = [int(examples[index][1][1:].sum()) for index in group]
        by_example |= zip(group, target_logits(model, batch).float().split(counts), strict=True)
    return torch.cat([by_example[index] for index in range(len(examples))])


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


class _Comparison:
    """Comparison of a layout's logits with the plain logits of some examples."""

    def __init__(
        self, model: Any, examples: list[Example], device: torch.device, agree: Callable[[float], float]
    ):
        self._model = model
        self._module = getattr(model, "module", model)
        self._examples = examples
        self._device = device
        self._agree = agree
        self._default = load.default_attn_implementation(self._module.config)
        self._dtype = next(p.dtype for p in self._module.parameters() if p.is_floating_point())
        self.dtype_name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self._dtype]
        self._plain: dict[bool, torch.Tensor] = {}  # by whether the embeddings are perturbed
        self._tolerances: dict[bool, float] = {}
        self._plain_rounding: float | None = None

    def compute_plain(self) -> None:
        try:
            self._plain[False] = self._plain_logits()
        except Exception as error:  # the exception type depends on the family
            raise NoLayout(f"its own forward pass fails: {first_line(error)}") from error
        if self._agree(float(self._plain[False].isnan().any())):
            raise NoLayout("its logits are not finite: its weights hold NaN or infinite numbers")

    def difference(self, layout: BatchLayout) -> tuple[float, float]:
        """Return the largest difference over all positions and the tolerance, from two tries if the first fails."""
        first = self._difference(layout, perturbed=False)
        if first[0] <= first[1]:
            return first
        with self._perturbed_embeddings(_PERTURBATION):
            if True not in self._plain:
                self._plain[True] = self._plain_logits()
            second = self._difference(layout, perturbed=True)
        return second if second[0] <= second[1] else first

    def rounding_in(
        self, dtype: Callable[[], contextlib.AbstractContextManager[None]], layout: BatchLayout
    ) -> tuple[float, float]:
        """Return the difference from the plain fp32 logits in another dtype and the tolerance.

        The tolerance is four times the difference of the plain model's own logits in that dtype. The 90th percentile is
        compared: rounding that coarse makes every Mixture of Experts choose other experts somewhere.
        """
        with dtype():
            if self._plain_rounding is None:
                self._plain_rounding = self._percentile_90(
                    distances(self._plain_logits(), self._plain[False])
                )
            found = self._percentile_90(distances(self._logits(layout), self._plain[False]))
        return found, max(4 * self._plain_rounding, 1e-3)

    def try_backward(self, layout: BatchLayout) -> None:
        """Run a backward pass in training mode (some families overwrite values that it needs).

        Skipped for an engine, whose bookkeeping it would change. Raises the model's exception, or NoLayout if the batch
        changes a buffer.
        """
        if self._model is not self._module:
            return
        set_attention(self._module, layout.attention)
        truncated = [tokens[:_BACKWARD_TOKENS] for tokens, _ in self._examples[-2:]]
        batch = MicroBatch(0, [], [(tokens, np.ones(len(tokens), bool)) for tokens in truncated])
        parameters = [p for p in self._module.parameters() if p.is_floating_point()]
        requires_grad = [parameter.requires_grad for parameter in parameters]
        # Each gradient is dropped when it is complete: there may be no memory for all.
        hooks = [
            p.requires_grad_(True).register_post_accumulate_grad_hook(_drop_gradient) for p in parameters
        ]
        self._module.train()
        try:
            buffers = self._persistent_buffers()
            with torch.enable_grad():
                passes = split_into_batches(batch, layout, self._device)
                torch.stack([summed_token_loss(self._module, rows) for rows in passes]).sum().backward()
            now = self._persistent_buffers()
            changed = [name for name, buffer in buffers.items() if not torch.equal(now[name], buffer)]
            if changed:
                raise NoLayout(
                    f"its layers follow the batch in training ({changed[0]} changes), so an example's numbers depend on the others"
                )
        finally:
            self._module.eval()
            for hook, parameter, value in zip(hooks, parameters, requires_grad, strict=True):
                hook.remove()
                parameter.requires_grad_(value)

    def _persistent_buffers(self) -> dict[str, torch.Tensor]:
        """Return copies of the buffers in the state dict, such as the running statistics of a batch norm."""
        saved = self._module.state_dict().keys()
        return {name: buffer.clone() for name, buffer in self._module.named_buffers() if name in saved}

    def recover(self) -> None:
        """Release what an interrupted forward pass has gathered under ZeRO-3."""
        if hasattr(self._model, "empty_partition_cache"):
            self._model.empty_partition_cache()

    def _difference(self, layout: BatchLayout, perturbed: bool) -> tuple[float, float]:
        found = distances(self._logits(layout), self._plain[perturbed])
        # For bf16 see `rounding_in`.
        is_fp32 = self._dtype == torch.float32
        largest = self._agree(float(found.max())) if is_fp32 else self._percentile_90(found)
        tolerance = _MIN_TOLERANCE[self._dtype]
        if largest <= tolerance:
            return largest, tolerance
        if perturbed not in self._tolerances:
            rounding = _ROUNDING_FACTOR * self._rounding(self._plain[perturbed])
            self._tolerances[perturbed] = min(_MAX_TOLERANCE[self._dtype], max(tolerance, rounding))
        return largest, self._tolerances[perturbed]

    def _rounding(self, plain: torch.Tensor) -> float:
        """Return the change of the plain logits that rounding alone causes.

        The larger of two: between transformers' attention implementations, and with embeddings changed by the epsilon of
        their dtype (the only one that covers layers without attention, of which many hybrids consist).
        """
        # On accelerators the order of summation may change from call to call.
        repeated = self._percentile_90(distances(self._plain_logits(), plain))
        if not repeated <= (
            _MIN_TOLERANCE[self._dtype] if self._device.type == "cpu" else _MAX_TOLERANCE[self._dtype] / 10
        ):
            raise NoLayout("its own forward pass gives other logits when it is repeated")
        with self._perturbed_embeddings(torch.finfo(self._dtype).eps):
            rounding = self._percentile_90(distances(self._plain_logits(), plain))
        if self._default != "eager" and can_set_attention(type(self._module)):
            # In a few families eager attention fails.
            with contextlib.suppress(Exception), training_kernels.unpatched(self._module):
                eager = self._logits(BatchLayout(ONE_BY_ONE, "eager"))
                rounding = max(rounding, self._percentile_90(distances(eager, plain)))
        return rounding

    def _percentile_90(self, values: torch.Tensor) -> float:
        """Return the 90th percentile: a leak between examples raises it, a few positions with other experts do not."""
        return self._agree(float(torch.quantile(values, 0.9)))

    def _logits(self, layout: BatchLayout) -> torch.Tensor:
        set_attention(self._module, layout.attention)
        return logits_of(self._model, self._examples, layout, self._device)

    def _plain_logits(self) -> torch.Tensor:
        with training_kernels.unpatched(self._module):
            return self._logits(BatchLayout(ONE_BY_ONE, self._default))

    @contextlib.contextmanager
    def _perturbed_embeddings(self, size: float) -> Iterator[None]:
        """Context manager in which each embedding component is scaled by 1 + `size` times a normal random number."""

        def perturb(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
            random = torch.Generator().manual_seed(0)
            factors = 1 + size * torch.randn(output.shape[-1], generator=random)
            return output * factors.to(output)

        hook = self._module.get_input_embeddings().register_forward_hook(perturb)
        try:
            yield
        finally:
            hook.remove()


def _subsample(examples: Sequence[Example]) -> list[Example]:
    """Keep some of the target positions of each example, evenly spread and including the last."""
    max_positions = max(4, _MAX_POSITIONS // len(examples))
    subsampled = []
    for tokens, loss_mask in examples:
        targets = 1 + np.flatnonzero(loss_mask[1:])
        if not len(targets):
            targets = np.arange(1, len(tokens))
        kept = np.linspace(0, len(targets) - 1, min(max_positions, len(targets))).round().astype(int)
        new_mask = np.zeros(len(tokens), bool)
        new_mask[targets[kept]] = True
        subsampled.append((tokens, new_mask))
    return subsampled
