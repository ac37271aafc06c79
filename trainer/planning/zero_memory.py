"""Memory of DeepSpeed 0.19.8 on one rank in every phase of a step, read from its source and checked by measurement.

Notation: P parameters, W ranks, k bytes of an element of the model (bf16: 2, fp32: 4). Functions return bytes by
component, for the device and for the host. `benchmarks/plan_accuracy.py` compares the sums with real runs.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trainer.planning.activations import ActivationTrace, MemorySample

_ALLREDUCE_BUCKET = 500_000_000  # elements; MEMORY_OPT_ALLREDUCE_SIZE of DeepSpeed's engine, for stage 0
_DEFAULT_REDUCE_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size
_DEFAULT_LIVE = 1_000_000_000  # stage3_max_live_parameters and stage3_max_reuse_distance
_DEFAULT_SUB_GROUP = 1_000_000_000  # sub_group_size

# Names of components, in display order.
WEIGHTS = "weights"
GATHERED = "gathered weights"
MASTER_WEIGHTS = "fp32 master weights"
OPTIMIZER = "optimizer states"
GRADIENTS = "gradients"
BUCKETS = "communication buckets"
ACTIVATIONS = "activations"
LOGITS = "logits"
COMPONENTS = (WEIGHTS, GATHERED, MASTER_WEIGHTS, OPTIMIZER, GRADIENTS, BUCKETS, ACTIVATIONS, LOGITS)


@dataclass(frozen=True)
class ZeroMemoryConfig:
    """Numbers of a resolved ds_config and a model that decide its memory."""

    stage: int
    world_size: int
    parameter_sizes: tuple[int, ...]  # elements of every parameter, in the order of the model
    element_bytes: int  # k
    accumulation_steps: int
    reduce_bucket: int  # elements
    overlap_comm: bool
    max_gathered_elements: int  # elements of gathered weights under ZeRO-3
    prefetch_bucket: int  # elements that ZeRO-3 prefetches in one collective
    sub_group: int  # elements of the largest sub-group of a rank; ZeRO-3 updates one at a time
    persistent_elements: int  # elements of parameters that ZeRO-3 never partitions
    offload_optimizer: bool
    offload_parameters: bool
    on_accelerator: bool  # on a CPU untouched buffers take no memory

    @classmethod
    def from_ds_config(
        cls,
        resolved: dict[str, Any],
        sizes: list[int],
        element_bytes: int,
        world_size: int,
        on_accelerator: bool,
        largest_layer: int = 0,
    ) -> ZeroMemoryConfig:
        """Return the layout of `resolved`, a result of `ds_config.resolve_ds_config`.

        `sizes`: elements of every parameter, tied ones once. `largest_layer`: elements of the largest decoder layer,
        which ZeRO-3 gathers as a whole.
        """
        zero = resolved["zero_optimization"]
        threshold = int(zero.get("stage3_param_persistence_threshold", 100_000))
        live = int(zero.get("stage3_max_live_parameters", _DEFAULT_LIVE))
        # ZeRO-3 keeps a gathered weight if fewer than stage3_max_reuse_distance elements are used before its next use.
        # Between its forward and its backward all later layers are used twice, so at most half of that is kept.
        reuse = int(zero.get("stage3_max_reuse_distance", _DEFAULT_LIVE)) // 2
        prefetch = int(zero.get("stage3_prefetch_bucket_size", 50_000_000))
        return cls(
            stage=int(zero.get("stage", 0)),
            world_size=world_size,
            parameter_sizes=tuple(sizes),
            element_bytes=element_bytes,
            accumulation_steps=int(resolved["gradient_accumulation_steps"]),
            reduce_bucket=int(zero.get("reduce_bucket_size", _DEFAULT_REDUCE_BUCKET)),
            overlap_comm=bool(zero.get("overlap_comm", int(zero.get("stage", 0)) == 3)),
            prefetch_bucket=prefetch,
            max_gathered_elements=min(live, reuse) + prefetch + max(*sizes, largest_layer),
            sub_group=int(zero.get("sub_group_size", _DEFAULT_SUB_GROUP)) + -(-max(sizes) // world_size),
            persistent_elements=sum(size for size in sizes if size < threshold),
            offload_optimizer=_offloaded(zero, "offload_optimizer"),
            offload_parameters=_offloaded(zero, "offload_param"),
            on_accelerator=on_accelerator,
        )

    @property
    def num_parameters(self) -> int:
        return sum(self.parameter_sizes)

    @property
    def largest_parameter(self) -> int:
        return max(self.parameter_sizes)

    @property
    def partition_elements(self) -> int:
        """Elements of this rank's partition (P/W)."""
        return -(-self.num_parameters // self.world_size)


@dataclass
class Phase:
    """Bytes by component at the peak of a phase."""

    name: str
    device: Counter[str] = field(default_factory=Counter)
    host: Counter[str] = field(default_factory=Counter)

    def device_bytes(self) -> int:
        return sum(self.device.values())


def estimate_phases(layout: ZeroMemoryConfig, trace: ActivationTrace, logits_bytes: int) -> list[Phase]:
    """Return the peaks of forward and backward, reduction, and step. `logits_bytes` of the activations are logits."""
    transients = [("forward and backward", now) for now in _backward_memory(layout, trace, logits_bytes)]
    if layout.stage <= 1:
        transients += [("gradient reduction", now) for now in _reduction_memory(layout)]
    transients.append(("optimizer step", _optimizer_step_memory(layout)))
    worst: dict[str, Phase] = {}
    for name, transient in transients:
        phase = Phase(name)
        _add_persistent_memory(layout, phase)
        phase.device.update(transient)
        if name not in worst or phase.device_bytes() > worst[name].device_bytes():
            worst[name] = phase
    return list(worst.values())


def _add_persistent_memory(layout: ZeroMemoryConfig, phase: Phase) -> None:
    """Add the memory that persists from step to step."""
    k, total, share = layout.element_bytes, layout.num_parameters, layout.partition_elements
    device, host = phase.device, phase.host
    optimizer = host if layout.offload_optimizer else device
    if layout.stage == 3:
        weights = host if layout.offload_parameters else device
        weights[WEIGHTS] += k * share
        device[WEIGHTS] += k * layout.persistent_elements
        # In fp32 the flat shard is the master weight; with offload it is copied.
        if k != 4 or layout.offload_optimizer:
            optimizer[MASTER_WEIGHTS] += 4 * share
        optimizer[OPTIMIZER] += 8 * share
        optimizer[GRADIENTS] += k * share  # one flat buffer, kept for the run
        if layout.offload_optimizer:
            host[GRADIENTS] += 4 * share
        # On a CPU only pages that were written to are resident.
        resident = layout.reduce_bucket if layout.on_accelerator else min(layout.reduce_bucket, total)
        device[BUCKETS] += k * resident
    elif layout.stage == 0:
        device[WEIGHTS] += k * total
        device[OPTIMIZER] += 8 * total
    else:
        device[WEIGHTS] += k * total
        optimizer[MASTER_WEIGHTS] += 4 * share  # also a copy in fp32
        optimizer[OPTIMIZER] += 8 * share
        if layout.offload_optimizer:
            host[GRADIENTS] += 4 * share
            host[BUCKETS] += k * (share + layout.largest_parameter)
            device[BUCKETS] += k * layout.largest_parameter


def _backward_memory(
    layout: ZeroMemoryConfig, trace: ActivationTrace, logits_bytes: int
) -> Iterator[Counter[str]]:
    """Yield the memory of the last micro-batch: activations shrink while gradients grow and buckets fill."""
    k, samples = layout.element_bytes, trace.samples
    order = [b.gradient_elements - a.gradient_elements for a, b in itertools.pairwise(samples)]
    reduces = layout.stage >= 2 or (layout.stage == 1 and layout.overlap_comm)
    fills = _simulate_buckets(
        order, layout.reduce_bucket, 2 if layout.overlap_comm and layout.stage < 3 else 1
    )
    kept, before = _held_during_backward(layout), BucketFill(0, 0, 0)
    # After the last gradient the epilogue reduces the rest of the bucket.
    following, sizes = (*samples[1:], samples[-1]), (*order, 0)
    for sample, later, size, fill in zip(samples, following, sizes, fills, strict=True):
        logits = min(logits_bytes, sample.bytes) if sample is samples[0] else 0
        now = kept + (_buckets(layout, before) if reduces else _unreduced_gradients(layout, sample))
        yield now + Counter({LOGITS: logits, ACTIVATIONS: sample.bytes - logits})
        if reduces:
            # DeepSpeed's hook runs after each gradient; if it does not fit, the bucket is copied flat and reduced.
            added = {GRADIENTS: k * size, BUCKETS: k * fill.copied, ACTIVATIONS: later.bytes_at_start}
            yield kept + _buckets(layout, before) + Counter(added)
            before = fill


def _held_during_backward(layout: ZeroMemoryConfig) -> Counter[str]:
    """Return the memory held during the last backward: gradients of earlier micro-batches, gathered weights."""
    k, now = layout.element_bytes, Counter[str]()
    if layout.accumulation_steps > 1 and layout.stage == 2 and not layout.offload_optimizer:
        now[GRADIENTS] = k * layout.partition_elements
    if layout.accumulation_steps > 1 and layout.stage == 1 and layout.overlap_comm:
        now[GRADIENTS] = k * layout.num_parameters
    if layout.stage == 3:
        divided = layout.num_parameters - layout.persistent_elements
        now[GATHERED] = k * min(divided, layout.max_gathered_elements)
        if layout.world_size > 1:
            # Prefetched weights are gathered into one flat buffer and copied out of it; the measured peaks of backward
            # include that buffer. The embedding, the largest parameter, is not prefetched.
            now[BUCKETS] += k * max(0, min(layout.prefetch_bucket, divided - layout.largest_parameter))
    return now


def _unreduced_gradients(layout: ZeroMemoryConfig, sample: MemorySample) -> Counter[str]:
    """Return the gradients of stages 0 and 1, which keep all until the end of the last micro-batch."""
    k, now = layout.element_bytes, Counter[str]()
    accumulates = layout.accumulation_steps > 1
    now[GRADIENTS] = k * (layout.num_parameters if accumulates else sample.gradient_elements)
    if layout.stage == 1 and layout.on_accelerator:
        now[BUCKETS] = k * layout.reduce_bucket
    return now


def _buckets(layout: ZeroMemoryConfig, fill: BucketFill) -> Counter[str]:
    """Return the bucket buffers, and this rank's partition of the reduced gradients."""
    k, now = layout.element_bytes, Counter[str]()
    if layout.stage < 3:
        whole = (2 if layout.overlap_comm else 1) * layout.reduce_bucket
        now[BUCKETS] = k * (whole if layout.on_accelerator else fill.written)
        # Worst rank: the owner of the first gradients keeps them from the start.
        kept = 0 if layout.offload_optimizer else min(fill.reduced, layout.partition_elements)
        now[GRADIENTS] = k * kept
    return now


@dataclass(frozen=True)
class BucketFill:
    """Elements written to bucket buffers, copied flat for the last reduction, and reduced so far."""

    written: int
    copied: int
    reduced: int


def _simulate_buckets(order: list[int], bucket: int, buffers: int) -> Iterator[BucketFill]:
    """Yield the fill after each gradient of the sizes in `order`, then after the reduction of the rest.

    A bucket is reduced when the next gradient does not fit; a gradient larger than the bucket bypasses the buffer.
    """
    filled = [0] * buffers
    index = inside = reduced = 0
    for size in order:
        copied = 0
        if inside and inside + size > bucket:
            copied, inside, index = inside, 0, (index + 1) % buffers
            reduced += copied
        inside += size
        if size <= bucket:
            filled[index] = max(filled[index], inside)
        yield BucketFill(sum(filled), copied, reduced)
    yield BucketFill(sum(filled), inside, reduced + inside)


def _reduction_memory(layout: ZeroMemoryConfig) -> Iterator[Counter[str]]:
    """Yield the memory of stages 0 and 1 after the last backward."""
    k, total = layout.element_bytes, layout.num_parameters
    if layout.stage == 0:
        yield Counter({GRADIENTS: k * total, BUCKETS: k * min(_ALLREDUCE_BUCKET, total)})
        return
    moved, before = 0, BucketFill(0, 0, 0)
    fills = _simulate_buckets(list(layout.parameter_sizes), layout.reduce_bucket, 1)
    for size, fill in zip((*layout.parameter_sizes, 0), fills, strict=True):
        buffer = layout.reduce_bucket if layout.on_accelerator else before.written
        # Gradients in the bucket have freed their own memory; this rank's partition is copied out again.
        held = total - moved + min(before.reduced, layout.partition_elements)
        yield Counter({GRADIENTS: k * held, BUCKETS: k * (buffer + fill.copied)})
        moved, before = moved + size, fill


def _optimizer_step_memory(layout: ZeroMemoryConfig) -> Counter[str]:
    """Return the gradient of this rank's partition, flattened once more and converted to fp32.

    Stage 3 converts one sub-group at a time.
    """
    k, share = layout.element_bytes, layout.partition_elements
    now: Counter[str] = Counter()
    if layout.stage == 0:
        now[GRADIENTS] = k * layout.num_parameters
    elif not layout.offload_optimizer:
        kept = 0 if layout.stage == 3 else k * share
        converted = min(share, layout.sub_group) if layout.stage == 3 else share
        now[GRADIENTS] = kept + 4 * converted + (k * converted if k != 4 else 0)
    return now


def _offloaded(zero: dict[str, Any], key: str) -> bool:
    return zero.get(key, {}).get("device", "none") != "none"
