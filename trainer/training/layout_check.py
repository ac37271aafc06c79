"""Before the first step: which layout of the examples gives the logits of the model's own plain forward pass?

Plain: one example at a time, no padding, no cache, transformers' default attention, none of our kernels. Packing depends
on a model handing positions and boundaries down to layers that respect them; padding depends on layers that ignore
padding. A model that does neither trains on wrong numbers without an error. The layouts are tried from the fastest to the
slowest, on real examples of the run, and the first one that agrees is used.

Only rounding may differ, by an amount that follows from the model: see `_Comparison._rounding`. A Mixture of Experts may
choose another expert because of rounding, where two are nearly equal. So a difference counts only if it is there a second
time, with slightly other embeddings.
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
from trainer.training.layouts import SINGLE, Layout, forward_passes, group_examples
from trainer.training.loss import collate, summed_token_loss, target_logits

Example = tuple[np.ndarray, np.ndarray]

# Root mean square of the difference of a position's logits, in parts of the logits' standard deviation.
_ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2e-2}  # always allowed
_MAX_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-1}  # never more than this
_MULTIPLE = 8  # of what rounding alone changes in the plain model
_MOST_POSITIONS = 64  # compared, of all examples together: logits of a large vocabulary take much memory
_DISTURBANCE = 1e-3  # of the embeddings in the second try
_BACKWARD_TOKENS = 16  # of two examples: enough to see whether there is a backward pass
_LARGE = 1e30  # logits beyond are a mask


@dataclass(frozen=True)
class LayoutChoice:
    """The layout of a run and how it was found.

    difference: the largest of the learned positions' (see `distances`), tolerance: what was allowed. rejected: the
    layouts tried before it, each with the reason. compared_in: "fp32" or the dtype of the training.
    """

    layout: Layout
    difference: float
    tolerance: float
    num_examples: int
    rejected: tuple[tuple[Layout, str], ...]
    compared_in: str

    @property
    def reason(self) -> str:
        """Return why the fastest layout was not taken, "" if it was."""
        return self.rejected[0][1] if self.rejected else ""


class NoLayout(Exception):
    """No layout gives the model's own logits; `rejected` as in `Choice`. Without any, its own forward pass fails."""

    def __init__(self, message: str, rejected: tuple[tuple[Layout, str], ...] = ()):
        super().__init__(message)
        self.rejected = rejected


def choose_layout(
    model: Any,
    layouts: Sequence[Layout],
    examples: Sequence[Example],
    device: torch.device,
    in_training_dtype: Callable[[], contextlib.AbstractContextManager[None]] | None = None,
    agree: Callable[[float], float] = float,
) -> LayoutChoice:
    """Return the first of `layouts` that gives the plain model's logits. Raises NoLayout.

    `model`: a causal LM of transformers, or the engine around one (collective under ZeRO-3). Its attention
    implementation may be another afterwards. `examples`: (tokens [n] int64, learned [n] bool) each. `in_training_dtype`:
    context manager inside which an fp32 model has the dtypes it is trained in; then both are compared. `agree`
    makes a number the same on all ranks.
    """
    comparison = _Comparison(model, _subsample(examples), device, agree)
    module = getattr(model, "module", model)
    was_training = module.training
    module.eval()
    rejected: list[tuple[Layout, str]] = []
    try:
        with torch.no_grad():
            try:
                comparison.compute_plain()
            except NoLayout:
                raise
            except Exception as error:  # every family fails in its own way
                raise NoLayout(f"its own forward pass fails: {first_line(error)}") from error
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
                except Exception as error:  # as above
                    rejected.append((layout, _sentence(error)))
                    comparison.recover()
                    continue
                if not difference <= tolerance:
                    reason = "its logits differ from those of the model alone by {:.1g} of their standard deviation (allowed: {:.1g})"
                    rejected.append((layout, reason.format(difference, tolerance)))
                elif rounding is not None and not rounding[0] <= rounding[1]:
                    reason = "in the dtype of the training its logits differ by {:.1g} of their standard deviation (allowed: {:.1g})"
                    rejected.append((layout, reason.format(*rounding)))
                else:
                    return LayoutChoice(
                        layout, difference, tolerance, len(examples), tuple(rejected), comparison.dtype_name
                    )
    finally:
        module.train(was_training)
    raise NoLayout(rejected[-1][1], tuple(rejected))


def distances(found: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """Return for each position how far two sets of logits [L, vocabulary] are apart: [L].

    Root mean square over the vocabulary, in parts of the standard deviation of all plain logits. Logits that a model
    masks (huge, or infinite) are left out.
    """
    difference, spread = found - plain, plain.std()
    if not spread < _LARGE:
        usable = plain.abs() < _LARGE
        difference, spread = torch.where(usable, difference, 0.0), plain[usable].std()
    return torch.linalg.vector_norm(difference, dim=1) / plain.shape[1] ** 0.5 / spread


def logits_of(model: Any, examples: Sequence[Example], layout: Layout, device: torch.device) -> torch.Tensor:
    """Return the logits at the learned positions in a layout, fp32 [L, vocabulary], in the order of the examples."""
    parts: dict[int, torch.Tensor] = {}
    for group in group_examples([len(tokens) for tokens, _ in examples], layout.rows):
        batch = collate(MicroBatch(0, [], [examples[index] for index in group]), layout.is_packed, device)
        counts = [int(examples[index][1][1:].sum()) for index in group]
        parts |= zip(group, target_logits(model, batch).float().split(counts), strict=True)
    return torch.cat([parts[index] for index in range(len(examples))])


def _sentence(error: Exception) -> str:
    if isinstance(error, UnsupportedAttention):  # its message is written for users
        return first_line(error)
    return f"it fails there ({type(error).__name__}: {first_line(error)})"


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


class _Comparison:
    """The plain logits of some examples, and how far those of a layout are from them."""

    def __init__(
        self, model: Any, examples: list[Example], device: torch.device, agree: Callable[[float], float]
    ):
        self._model = model
        self._module = getattr(model, "module", model)
        self._examples = examples
        self._device = device
        self._agree = agree
        self._default = load.default_attention(self._module.config)
        self._dtype = next(p.dtype for p in self._module.parameters() if p.is_floating_point())
        self.dtype_name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self._dtype]
        self._plain: dict[bool, torch.Tensor] = {}  # by whether the embeddings are disturbed
        self._tolerances: dict[bool, float] = {}
        self._plain_rounding: float | None = None

    def compute_plain(self) -> None:
        self._plain[False] = self._plain_logits()
        if self._agree(float(self._plain[False].isnan().any())):
            raise NoLayout("its logits are not finite: its weights hold NaN or infinite numbers")

    def difference(self, layout: Layout) -> tuple[float, float]:
        """Return the largest difference over all positions and what is allowed, of the second try if the first fails."""
        first = self._difference(layout, disturbed=False)
        if first[0] <= first[1]:
            return first
        with self._disturbed_embeddings(_DISTURBANCE):
            if True not in self._plain:
                self._plain[True] = self._plain_logits()
            second = self._difference(layout, disturbed=True)
        return second if second[0] <= second[1] else first

    def rounding_in(
        self, dtype: Callable[[], contextlib.AbstractContextManager[None]], layout: Layout
    ) -> tuple[float, float]:
        """Return the difference from the plain fp32 logits in another dtype and what is allowed.

        Allowed is four times what the plain model's own are off in that dtype. The 90th percentile is compared: rounding
        that coarse makes every Mixture of Experts choose other experts somewhere.
        """
        with dtype():
            if self._plain_rounding is None:
                self._plain_rounding = self._high(distances(self._plain_logits(), self._plain[False]))
            found = self._high(distances(self._logits(layout), self._plain[False]))
        return found, max(4 * self._plain_rounding, 1e-3)

    def try_backward(self, layout: Layout) -> None:
        """Raise what the backward pass raises, in training mode (some families overwrite what it needs).

        Not in an engine, whose own bookkeeping it would disturb.
        """
        if self._model is not self._module:
            return
        set_attention(self._module, layout.attention)
        cut = [tokens[:_BACKWARD_TOKENS] for tokens, _ in self._examples[-2:]]
        short = MicroBatch(0, [], [(tokens, np.ones(len(tokens), bool)) for tokens in cut])
        parameters = [p for p in self._module.parameters() if p.is_floating_point()]
        needed = [parameter.requires_grad for parameter in parameters]
        # A gradient is dropped as soon as it is complete: there may be no memory for all.
        hooks = [
            p.requires_grad_(True).register_post_accumulate_grad_hook(_drop_gradient) for p in parameters
        ]
        self._module.train()
        try:
            state = self._state()
            with torch.enable_grad():
                passes = forward_passes(short, layout, self._device)
                torch.stack([summed_token_loss(self._module, rows) for rows in passes]).sum().backward()
            changed = [name for name, now in self._state().items() if not torch.equal(now, state[name])]
            if changed:
                raise NoLayout(
                    f"its layers follow the batch in training ({changed[0]} changes), so an example's numbers depend on the others"
                )
        finally:
            self._module.eval()
            for hook, parameter, need in zip(hooks, parameters, needed, strict=True):
                hook.remove()
                parameter.requires_grad_(need)

    def _state(self) -> dict[str, torch.Tensor]:
        """Return copies of the buffers that a checkpoint holds, such as the running statistics of a batch norm."""
        saved = self._module.state_dict().keys()
        return {name: buffer.clone() for name, buffer in self._module.named_buffers() if name in saved}

    def recover(self) -> None:
        """After an exception inside a forward pass: ZeRO-3 must not keep half a model gathered."""
        if hasattr(self._model, "empty_partition_cache"):
            self._model.empty_partition_cache()

    def _difference(self, layout: Layout, disturbed: bool) -> tuple[float, float]:
        apart = distances(self._logits(layout), self._plain[disturbed])
        # bf16: see `rounding_in`.
        largest = self._agree(float(apart.max())) if self._dtype == torch.float32 else self._high(apart)
        allowed = _ROUNDING[self._dtype]
        if largest <= allowed:
            return largest, allowed
        if disturbed not in self._tolerances:
            own = _MULTIPLE * self._rounding(self._plain[disturbed])
            self._tolerances[disturbed] = min(_MAX_TOLERANCE[self._dtype], max(allowed, own))
        return largest, self._tolerances[disturbed]

    def _rounding(self, plain: torch.Tensor) -> float:
        """Return how far rounding alone moves the plain logits.

        The larger of two: between transformers' attention implementations, and with embeddings that are off by as much as
        they can be in their dtype (layers without attention, which many hybrids are made of, show in this one only).
        """
        # On accelerators sums may be formed in another order each time.
        repeated = self._high(distances(self._plain_logits(), plain))
        if not repeated <= (
            _ROUNDING[self._dtype] if self._device.type == "cpu" else _MAX_TOLERANCE[self._dtype] / 10
        ):
            raise NoLayout("its own forward pass gives other logits when it is repeated")
        with self._disturbed_embeddings(torch.finfo(self._dtype).eps):
            rounding = self._high(distances(self._plain_logits(), plain))
        if self._default != "eager" and can_set_attention(type(self._module)):
            # A few families have no eager attention that works.
            with contextlib.suppress(Exception), training_kernels.unpatched(self._module):
                eager = self._logits(Layout(SINGLE, "eager"))
                rounding = max(rounding, self._high(distances(eager, plain)))
        return rounding

    def _high(self, apart: torch.Tensor) -> float:
        """Return the 90th percentile. A few positions with other experts do not raise it, a leak between examples does."""
        return self._agree(float(torch.quantile(apart, 0.9)))

    def _logits(self, layout: Layout) -> torch.Tensor:
        set_attention(self._module, layout.attention)
        return logits_of(self._model, self._examples, layout, self._device)

    def _plain_logits(self) -> torch.Tensor:
        with training_kernels.unpatched(self._module):
            return self._logits(Layout(SINGLE, self._default))

    @contextlib.contextmanager
    def _disturbed_embeddings(self, size: float) -> Iterator[None]:
        """Inside, every component of the embeddings is larger or smaller by about the part `size` of itself."""

        def disturb(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
            random = torch.Generator().manual_seed(0)
            factors = 1 + size * torch.randn(output.shape[-1], generator=random)
            return output * factors.to(output)

        hook = self._module.get_input_embeddings().register_forward_hook(disturb)
        try:
            yield
        finally:
            hook.remove()


def _subsample(examples: Sequence[Example]) -> list[Example]:
    """Keep some of the learned positions of each example, evenly spread, the last one among them."""
    most = max(4, _MOST_POSITIONS // len(examples))
    thinned = []
    for tokens, learned in examples:
        at = 1 + np.flatnonzero(learned[1:])
        if not len(at):
            at = np.arange(1, len(tokens))
        kept = np.zeros(len(tokens), bool)
        kept[at[np.linspace(0, len(at) - 1, min(most, len(at))).round().astype(int)]] = True
        thinned.append((tokens, kept))
    return thinned
