"""Check before the first step that a layout of the examples gives the logits of the model's plain forward pass.

A plain forward pass processes one example at a time, without padding or cache, with transformers' default attention and
without replaced kernels. Packed logits are right if the layers respect positions and boundaries of examples. Padded logits
are right if the layers ignore padding. Wrong logits raise no error, but they make the training loss wrong. So the layouts
are tried on real examples of the run, from the fastest to the slowest. The first layout with right logits is used.

Rounding errors are accepted (see `_Comparison._rounding`). In a Mixture of Experts, rounding may also change the choice
between two experts with nearly equal router scores. So a layout is rejected only if its logits differ from the plain logits
in two comparisons. In the second comparison, the embeddings are slightly changed.
"""

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

# Bounds of the tolerance by dtype. A layout is rejected if its logits differ from the plain logits by more than the tolerance.
_MIN_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
_MAX_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-1}
_ROUNDING_FACTOR = 8  # the tolerance is this factor times the estimated rounding error of the plain logits
_MAX_POSITIONS = 64  # approximate maximum number of compared positions, all examples together; limits the memory for logits
_PERTURBATION = 1e-3  # relative change of the embeddings in the second comparison of a layout
_BACKWARD_TOKENS = 16  # number of tokens per example in `try_backward`; enough to detect a failure
_MASKED_LOGIT = 1e30  # a larger absolute value marks a logit that the model has masked


@dataclass(frozen=True)
class LayoutChoice:
    """The layout of a run and the result of the layout's check.

    difference: distance from the plain logits (see `distances`), in fp32 the maximum over positions, in bf16 the 90th
    percentile. tolerance: largest allowed difference. rejected: faster layouts, each with the reason for its rejection.
    compared_in: dtype of the weights in the comparison, "fp32" or "bf16".
    """

    layout: BatchLayout
    difference: float
    tolerance: float
    num_examples: int
    rejected: tuple[tuple[BatchLayout, str], ...]
    compared_in: str

    @property
    def fallback_reason(self) -> str:
        """The reason why the fastest layout was rejected, or "" if the fastest layout is used."""
        return self.rejected[0][1] if self.rejected else ""


class NoLayout(Exception):
    """Raised if no layout gives the plain logits.

    `rejected`: the tried layouts, each with the reason for its rejection; empty if the model itself fails the check.
    """

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
    """Return the first of `layouts` that gives the plain logits.

    Raises NoLayout if no layout gives the plain logits, or if the model itself fails the check. `model`: a causal LM of
    transformers, or a DeepSpeed engine that contains the LM. The model's attention implementation is changed and not
    restored. With an engine, the function is collective, and `agree` must return rank 0's number on all ranks. `examples`:
    tuples (tokens [n] int64, loss_mask [n] bool). `in_training_dtype`: returns a context manager that gives the fp32 model
    its training dtypes. With this argument, the logits are compared in fp32 and in these dtypes.
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
                rounding = max_rounding = 0.0
                try:
                    difference, tolerance = comparison.difference(layout)
                    if in_training_dtype:
                        rounding, max_rounding = comparison.rounding_in(in_training_dtype, layout)
                    if difference <= tolerance:
                        comparison.try_backward(layout)
                except (torch.OutOfMemoryError, NoLayout):
                    raise
                except Exception as error:
                    reason = first_line(error)
                    if not isinstance(error, UnsupportedAttention):  # its message is clear without the type
                        reason = f"the forward or backward pass fails ({type(error).__name__}: {reason})"
                    if hasattr(model, "empty_partition_cache"):  # ZeRO-3: release gathered weights
                        model.empty_partition_cache()
                else:
                    amount = "by {:.1g} of their standard deviation (allowed: {:.1g})"
                    if not difference <= tolerance:
                        reason = "its logits differ from those of the model alone "
                        reason += amount.format(difference, tolerance)
                    elif not rounding <= max_rounding:
                        reason = (
                            f"in the training dtype its logits differ {amount.format(rounding, max_rounding)}"
                        )
                    else:
                        numbers = (difference, tolerance, len(examples))
                        return LayoutChoice(layout, *numbers, tuple(rejected), comparison.dtype_name)
                rejected.append((layout, reason))
    finally:
        module.train(was_training)
    raise NoLayout(rejected[-1][1], tuple(rejected))


def distances(logits: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """Return the distance [L] between two sets of logits [L, vocabulary] at each position.

    The distance is the root mean square difference over the vocabulary, divided by the standard deviation of all `plain`
    logits. Logits that a model masks (huge or infinite values) are excluded.
    """
    difference, deviation = logits - plain, plain.std()
    if not deviation < _MASKED_LOGIT:
        usable = plain.abs() < _MASKED_LOGIT
        difference, deviation = torch.where(usable, difference, 0.0), plain[usable].std()
    distance: torch.Tensor = torch.linalg.vector_norm(difference, dim=1) / plain.shape[1] ** 0.5 / deviation
    return distance


class _Comparison:
    """Comparison of a layout's logits with the plain logits, for some examples."""

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
        self._plain: dict[bool, torch.Tensor] = {}  # key: whether the embeddings are perturbed
        self._tolerances: dict[bool, float] = {}
        self._plain_rounding: float | None = None

    def compute_plain(self) -> None:
        try:
            self._plain[False] = self._plain_logits()
        except Exception as error:  # the exception type depends on the model family
            raise NoLayout(f"its own forward pass fails: {first_line(error)}") from error
        if self._agree(float(self._plain[False].isnan().any())):
            raise NoLayout("its logits are not finite: its weights hold NaN or infinite numbers")

    def difference(self, layout: BatchLayout) -> tuple[float, float]:
        """Return (difference, tolerance). If the difference exceeds the tolerance, try again with perturbed embeddings."""
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
        """Return the distance of the layout's logits in training dtypes from the plain fp32 logits, and the tolerance.

        `dtype` returns a context manager that gives the model its training dtypes. The tolerance is four times the distance
        between the plain logits in training dtypes and in fp32, but at least 1e-3. Each distance is a 90th percentile,
        because coarse rounding changes the choice of experts at some positions.
        """
        with dtype():
            if self._plain_rounding is None:
                self._plain_rounding = self._distance(self._plain_logits(), self._plain[False])
            rounding = self._distance(self._logits(layout), self._plain[False])
        return rounding, max(4 * self._plain_rounding, 1e-3)

    def try_backward(self, layout: BatchLayout) -> None:
        """Run a forward and a backward pass in training mode. Does nothing for an engine, because its state would change.

        Raises torch's exception if a pass fails, e.g. because the model overwrites activations that the backward pass
        needs. Raises NoLayout if the passes change a buffer of the model.
        """
        if self._model is not self._module:
            return
        set_attention(self._module, layout.attention)
        truncated = [tokens[:_BACKWARD_TOKENS] for tokens, _ in self._examples[-2:]]
        batch = MicroBatch(0, [], [(tokens, np.ones(len(tokens), bool)) for tokens in truncated])
        parameters = [p for p in self._module.parameters() if p.is_floating_point()]
        requires_grad = [parameter.requires_grad for parameter in parameters]
        # Each gradient is deleted when it is complete, because all gradients together may not fit into memory.
        hooks = [
            p.requires_grad_(True).register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            for p in parameters
        ]
        self._module.train()
        try:
            before = self._persistent_buffers()
            with torch.enable_grad():
                passes = split_into_batches(batch, layout, self._device)
                torch.stack([summed_token_loss(self._module, rows) for rows in passes]).sum().backward()
            for name, buffer in self._persistent_buffers().items():
                if not torch.equal(before[name], buffer):
                    raise NoLayout(
                        f"its layers follow the batch in training ({name} changes), so an example's numbers depend on the others"
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

    def _difference(self, layout: BatchLayout, perturbed: bool) -> tuple[float, float]:
        logits, plain = self._logits(layout), self._plain[perturbed]
        # In bf16, compare the 90th percentile, because coarse rounding changes the choice of experts at some positions.
        largest = self._distance(logits, plain, use_maximum=self._dtype == torch.float32)
        tolerance = _MIN_TOLERANCE[self._dtype]
        if largest <= tolerance:
            return largest, tolerance
        if perturbed not in self._tolerances:
            rounding = _ROUNDING_FACTOR * self._rounding(plain)
            self._tolerances[perturbed] = min(_MAX_TOLERANCE[self._dtype], max(tolerance, rounding))
        return largest, self._tolerances[perturbed]

    def _rounding(self, plain: torch.Tensor) -> float:
        """Estimate the rounding error of the plain logits, as a distance (see `distances`).

        The plain logits are computed again with eager attention, and again with embeddings that are changed by about the
        epsilon of their dtype. The larger distance is returned. Eager attention has no effect in layers without attention.
        Raises NoLayout if a repeated plain forward pass gives other logits.
        """
        is_cpu = self._device.type == "cpu"
        # On accelerators, the logits of a repeated pass may differ slightly, because the order of summation may change.
        max_change = _MIN_TOLERANCE[self._dtype] if is_cpu else _MAX_TOLERANCE[self._dtype] / 10
        if not self._distance(self._plain_logits(), plain) <= max_change:
            raise NoLayout("its own forward pass gives other logits when it is repeated")
        with self._perturbed_embeddings(torch.finfo(self._dtype).eps):
            rounding = self._distance(self._plain_logits(), plain)
        if self._default != "eager" and can_set_attention(type(self._module)):
            # In a few model families, eager attention raises an exception.
            with contextlib.suppress(Exception), training_kernels.unpatched(self._module):
                eager = self._logits(BatchLayout(ONE_BY_ONE, "eager"))
                rounding = max(rounding, self._distance(eager, plain))
        return rounding

    def _distance(self, logits: torch.Tensor, plain: torch.Tensor, use_maximum: bool = False) -> float:
        """Return the maximum or the 90th percentile of the distances at all positions.

        A changed choice of experts at a few positions does not raise the percentile. A leak between examples raises it.
        """
        values = distances(logits, plain)
        return self._agree(float(values.max() if use_maximum else torch.quantile(values, 0.9)))

    def _logits(self, layout: BatchLayout) -> torch.Tensor:
        """Return the logits that a layout gives at the target positions: fp32 [L, vocabulary], in example order."""
        set_attention(self._module, layout.attention)
        examples = self._examples
        by_example: dict[int, torch.Tensor] = {}
        for group in group_examples([len(tokens) for tokens, _ in examples], layout.arrangement):
            micro_batch = MicroBatch(0, [], [examples[index] for index in group])
            batch = collate(micro_batch, layout.is_packed, self._device)
            counts = [int(examples[index][1][1:].sum()) for index in group]
            by_example |= zip(group, target_logits(self._model, batch).float().split(counts), strict=True)
        return torch.cat([by_example[index] for index in range(len(examples))])

    def _plain_logits(self) -> torch.Tensor:
        with training_kernels.unpatched(self._module):
            return self._logits(BatchLayout(ONE_BY_ONE, self._default))

    @contextlib.contextmanager
    def _perturbed_embeddings(self, size: float) -> Iterator[None]:
        """Context manager in which component i of each embedding is multiplied by 1 + `size` * r_i, r_i ~ N(0, 1)."""

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
    """Return the examples with fewer targets per loss mask: evenly spaced targets, including the first and the last."""
    max_positions = max(4, _MAX_POSITIONS // len(examples))
    subsampled = []
    for tokens, loss_mask in examples:
        targets = 1 + np.flatnonzero(loss_mask[1:])
        if not len(targets):
            targets = np.arange(1, len(tokens))
        indices = np.linspace(0, len(targets) - 1, min(max_positions, len(targets))).round().astype(int)
        subsampled.append((tokens, np.isin(np.arange(len(tokens)), targets[indices])))
    return subsampled
