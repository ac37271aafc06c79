"""Estimate the memory of one rank in every phase of a step, from the allocations in the source of DeepSpeed 0.19.8.

`k` is the number of bytes per element of the model (bf16: 2, fp32: 4). A returned Counter holds the bytes of device memory
by component. `benchmarks/plan_accuracy.py` compares the sums with real runs.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from trainer.planning.activations import ActivationTrace, MemorySample

_ALLREDUCE_BUCKET = 500_000_000  # elements per bucket in stage 0; DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE

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
    """Numbers that determine the memory of a rank, from a ds_config and a model."""

    stage: int
    world_size: int
    parameter_sizes: tuple[int, ...]  # elements of every parameter, in the order of the model
    element_bytes: int
    accumulation_steps: int
    reduce_bucket: int  # elements
    overlap_comm: bool
    max_gathered_elements: int  # maximum number of elements that are gathered at a time in ZeRO-3
    prefetch_bucket: int  # elements that ZeRO-3 prefetches in one collective
    sub_group: int  # elements of the largest sub-group of a rank; ZeRO-3 updates one sub-group at a time
    persistent_elements: int  # elements of parameters that ZeRO-3 never partitions
    offload_optimizer: bool
    offload_parameters: bool
    on_accelerator: bool  # False for a CPU, where a page of a buffer takes memory only after the first write

    @classmethod
    def from_ds_config(
        cls,
        deepspeed_config: dict[str, Any],
        sizes: Sequence[int],
        element_bytes: int,
        world_size: int,
        on_accelerator: bool,
        largest_layer: int = 0,
    ) -> Self:
        """Return the config for a result of `ds_config.resolve_ds_config`. Missing keys have DeepSpeed's defaults.

        `sizes`: elements of every parameter; tied parameters count once. `largest_layer`: elements of the largest
        decoder layer, which ZeRO-3 gathers as a whole.
        """
        zero = deepspeed_config["zero_optimization"]
        stage = int(zero.get("stage", 0))
        threshold = int(zero.get("stage3_param_persistence_threshold", 100_000))
        live = int(zero.get("stage3_max_live_parameters", 1_000_000_000))
        # ZeRO-3 keeps a gathered weight if fewer than stage3_max_reuse_distance elements are used before its next use, in
        # the backward pass. Until then, each weight of a later layer is used twice. So at most half the distance stays gathered.
        reuse = int(zero.get("stage3_max_reuse_distance", 1_000_000_000)) // 2
        prefetch = int(zero.get("stage3_prefetch_bucket_size", 50_000_000))
        return cls(
            stage=stage,
            world_size=world_size,
            parameter_sizes=tuple(sizes),
            element_bytes=element_bytes,
            accumulation_steps=int(deepspeed_config["gradient_accumulation_steps"]),
            reduce_bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
            overlap_comm=bool(zero.get("overlap_comm", stage == 3)),
            prefetch_bucket=prefetch,
            max_gathered_elements=min(live, reuse) + prefetch + max(*sizes, largest_layer),
            sub_group=int(zero.get("sub_group_size", 1_000_000_000)) + -(-max(sizes) // world_size),
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
        """Number of parameters divided by the number of ranks, rounded up."""
        return -(-self.num_parameters // self.world_size)


@dataclass(frozen=True)
class BucketFill:
    """Numbers of gradient elements at one moment of the reduction."""

    written: int  # each buffer's highest fill so far, summed over the buffers
    copied: int  # elements that are copied to a flat tensor and reduced at this moment
    reduced: int  # elements reduced so far, including `copied`


@dataclass
class Phase:
    """Phase of a step, with the bytes of each component when the device memory peaks."""

    name: str
    device: Counter[str] = field(default_factory=Counter)
    host: Counter[str] = field(default_factory=Counter)


def estimate_phases(config: ZeroMemoryConfig, trace: ActivationTrace) -> list[Phase]:
    """Return the phases of a step: forward and backward pass, gradient reduction (stages 0 and 1), optimizer step."""
    transients = [("forward and backward", memory) for memory in _backward_memory(config, trace)]
    if config.stage <= 1:
        transients += [("gradient reduction", memory) for memory in _reduction_memory(config)]
    transients.append(("optimizer step", _optimizer_step_memory(config)))
    worst: dict[str, Phase] = {}
    for name, transient in transients:
        phase = Phase(name)
        _add_persistent_memory(config, phase)
        phase.device.update(transient)
        if name not in worst or phase.device.total() > worst[name].device.total():
            worst[name] = phase
    return list(worst.values())


def _add_persistent_memory(config: ZeroMemoryConfig, phase: Phase) -> None:
    k, total, share = config.element_bytes, config.num_parameters, config.partition_elements
    device, host = phase.device, phase.host
    optimizer = host if config.offload_optimizer else device
    if config.stage == 3:
        weights = host if config.offload_parameters else device
        weights[WEIGHTS] += k * share
        device[WEIGHTS] += k * config.persistent_elements
        # In fp32, the flat partition serves as master weights. With offload, the master weights are a copy on the host.
        if k != 4 or config.offload_optimizer:
            optimizer[MASTER_WEIGHTS] += 4 * share
        optimizer[OPTIMIZER] += 8 * share
        optimizer[GRADIENTS] += k * share  # one flat buffer, which exists during the whole run
        if config.offload_optimizer:
            host[GRADIENTS] += 4 * share
        resident = config.reduce_bucket if config.on_accelerator else min(config.reduce_bucket, total)
        device[BUCKETS] += k * resident
    elif config.stage == 0:
        device[WEIGHTS] += k * total
        device[OPTIMIZER] += 8 * total
    else:
        device[WEIGHTS] += k * total
        optimizer[MASTER_WEIGHTS] += 4 * share  # a copy, even if the weights are fp32
        optimizer[OPTIMIZER] += 8 * share
        if config.offload_optimizer:
            host[GRADIENTS] += 4 * share
            host[BUCKETS] += k * (share + config.largest_parameter)
            device[BUCKETS] += k * config.largest_parameter


def _backward_memory(config: ZeroMemoryConfig, trace: ActivationTrace) -> Iterator[Counter[str]]:
    """Yield the memory at successive moments of the last backward pass: activations shrink, gradients grow, buckets fill."""
    k, samples = config.element_bytes, trace.samples
    order = [b.gradient_elements - a.gradient_elements for a, b in itertools.pairwise(samples)]
    reduces = config.stage >= 2 or (config.stage == 1 and config.overlap_comm)
    num_buffers = 2 if config.overlap_comm and config.stage < 3 else 1
    fills = _simulate_buckets(order, config.reduce_bucket, num_buffers)
    held, previous_fill = _held_during_backward(config), BucketFill(0, 0, 0)
    # The last item, of size 0, is DeepSpeed's epilogue: after the last gradient, it reduces the rest of the bucket.
    next_samples, sizes = (*samples[1:], samples[-1]), (*order, 0)
    for sample, next_sample, size, fill in zip(samples, next_samples, sizes, fills, strict=True):
        logits = min(trace.logits_bytes, sample.bytes) if sample is samples[0] else 0
        gradients = _buckets(config, previous_fill) if reduces else _unreduced_gradients(config, sample)
        yield held + gradients + Counter({LOGITS: logits, ACTIVATIONS: sample.bytes - logits})
        if reduces:
            # If the new gradient does not fit in the bucket, DeepSpeed's hook first reduces a copy of the bucket.
            added = {GRADIENTS: k * size, BUCKETS: k * fill.copied, ACTIVATIONS: next_sample.bytes_at_start}
            yield held + gradients + Counter(added)
            previous_fill = fill


def _held_during_backward(config: ZeroMemoryConfig) -> Counter[str]:
    """Return the memory held during the whole last backward pass: gradients of earlier micro-batches, gathered weights."""
    k, memory = config.element_bytes, Counter[str]()
    if config.accumulation_steps > 1 and config.stage == 2 and not config.offload_optimizer:
        memory[GRADIENTS] = k * config.partition_elements
    if config.accumulation_steps > 1 and config.stage == 1 and config.overlap_comm:
        memory[GRADIENTS] = k * config.num_parameters
    if config.stage == 3:
        partitioned = config.num_parameters - config.persistent_elements
        memory[GATHERED] = k * min(partitioned, config.max_gathered_elements)
        if config.world_size > 1:
            # Prefetched weights are gathered into one flat buffer and then copied out of it. The measured peaks of the
            # backward pass include this buffer. The embedding, the largest parameter, is not prefetched.
            memory[BUCKETS] += k * max(0, min(config.prefetch_bucket, partitioned - config.largest_parameter))
    return memory


def _unreduced_gradients(config: ZeroMemoryConfig, sample: MemorySample) -> Counter[str]:
    """Return the memory of gradients and bucket in stages 0 and 1 if no gradient is reduced during the backward pass."""
    k, memory = config.element_bytes, Counter[str]()
    accumulates = config.accumulation_steps > 1
    memory[GRADIENTS] = k * (config.num_parameters if accumulates else sample.gradient_elements)
    if config.stage == 1 and config.on_accelerator:
        memory[BUCKETS] = k * config.reduce_bucket
    return memory


def _buckets(config: ZeroMemoryConfig, fill: BucketFill) -> Counter[str]:
    """Return the memory of bucket buffers and of this rank's reduced gradients. At stage 3, both are persistent memory."""
    k, memory = config.element_bytes, Counter[str]()
    if config.stage < 3:
        buffers = (2 if config.overlap_comm else 1) * config.reduce_bucket
        memory[BUCKETS] = k * (buffers if config.on_accelerator else fill.written)
        # The estimate is for the rank that uses the most memory: the owner of the gradients that are reduced first.
        held = 0 if config.offload_optimizer else min(fill.reduced, config.partition_elements)
        memory[GRADIENTS] = k * held
    return memory


def _simulate_buckets(order: list[int], bucket: int, buffers: int) -> Iterator[BucketFill]:
    """Yield a BucketFill per gradient, and one for the reduction of the last bucket. `order`: elements of each gradient.

    A bucket is reduced when the next gradient does not fit in it. A gradient larger than a bucket uses no buffer.
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


def _reduction_memory(config: ZeroMemoryConfig) -> Iterator[Counter[str]]:
    """Yield the memory at successive moments of the gradient reduction after the last backward pass (stages 0 and 1)."""
    k, total = config.element_bytes, config.num_parameters
    if config.stage == 0:
        yield Counter({GRADIENTS: k * total, BUCKETS: k * min(_ALLREDUCE_BUCKET, total)})
        return
    written, previous_fill = 0, BucketFill(0, 0, 0)
    fills = _simulate_buckets(list(config.parameter_sizes), config.reduce_bucket, 1)
    for size, fill in zip((*config.parameter_sizes, 0), fills, strict=True):
        buffer = config.reduce_bucket if config.on_accelerator else previous_fill.written
        # A gradient is freed once it is in the bucket. This rank's partition is copied out of the reduced bucket.
        held = total - written + min(previous_fill.reduced, config.partition_elements)
        yield Counter({GRADIENTS: k * held, BUCKETS: k * (buffer + fill.copied)})
        written, previous_fill = written + size, fill


def _optimizer_step_memory(config: ZeroMemoryConfig) -> Counter[str]:
    """Return the memory of the optimizer step beyond the persistent memory: gradients, and their flat and fp32 copies.

    Stage 0: gradients without copies. Stage 3: only the copies, of one sub-group at a time. With offload: none.
    """
    k, share = config.element_bytes, config.partition_elements
    if config.stage == 0:
        return Counter({GRADIENTS: k * config.num_parameters})
    if config.offload_optimizer:
        return Counter()
    unconverted = 0 if config.stage == 3 else k * share
    converted = min(share, config.sub_group) if config.stage == 3 else share
    return Counter({GRADIENTS: unconverted + 4 * converted + (k * converted if k != 4 else 0)})


def _offloaded(zero: dict[str, Any], key: str) -> bool:
    return zero.get(key, {}).get("device", "none") != "none"
