"""Checks that need several ranks. run_checks.py starts `python -m trainer.doctor.rank_checks GROUP...` once per rank."""

import dataclasses
import json
import socket
import statistics
import sys
import time

from trainer.doctor.check_result import FAIL, OK, CheckResult, ok_if
from trainer.runtime import distributed, terminal

GROUPS = ("clock", "network", "parity")
RESULTS_PREFIX = "doctor-findings: "  # prefix of the line on stdout that has the results as JSON
_MAX_SKEW_SECONDS = 1.0
_SMALL, _LARGE = 1, 8 * 2**20  # number of fp32 elements in an all-reduce
_NUM_ROUNDS = {_SMALL: 20, _LARGE: 3}
_MAX_LATENCY_SECONDS, _MIN_BANDWIDTH = 5e-3, 50e6  # bandwidth in bytes/s


def check_ranks(groups: list[str]) -> list[CheckResult]:
    """Collective. Return the results of the checks in `groups`, equal on all ranks. Requires `distributed.initialize`."""
    results = [check() for group, check in (("clock", clocks), ("network", network)) if group in groups]
    if "parity" in groups:
        from trainer.doctor import gradient_parity

        results += gradient_parity.check_gradients()
    return results


def clocks() -> CheckResult:
    distributed.barrier()
    times = distributed.gather_objects((time.time(), socket.gethostname()))
    early, late = min(times), max(times)
    skew = late[0] - early[0]
    num_hosts = len({host for _, host in times})
    detail = f"{skew * 1000:.1f} ms between {len(times)} ranks on {num_hosts} machine(s)"
    if skew > _MAX_SKEW_SECONDS:
        detail += f": {late[1]} is ahead of {early[1]}"
    remedy = "synchronise the clocks (chrony); time limits and timestamps in logs depend on them"
    return ok_if(skew <= _MAX_SKEW_SECONDS, "clock", "skew", detail, remedy)


def network() -> CheckResult:
    """Check the sum, latency and bandwidth of all-reduces, with the backend that training uses."""
    import torch
    import torch.distributed as dist

    environment = distributed.environment()
    world_size = environment.world_size
    if world_size == 1:
        return CheckResult("network", "all-reduce", OK, "one rank: nothing is sent")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = {}  # number of elements -> median duration on the slowest rank
    for elements in (_SMALL, _LARGE):
        durations = []
        for _ in range(_NUM_ROUNDS[elements]):
            numbers = torch.full((elements,), float(environment.rank + 1), device=device)
            distributed.barrier()
            start = time.perf_counter()
            dist.all_reduce(numbers)
            error = float((numbers - world_size * (world_size + 1) / 2).abs().max())
            durations.append(time.perf_counter() - start)
            if any(distributed.gather_objects(error)):
                detail = f"a sum over {world_size} ranks is wrong"
                remedy = "the network or its library corrupts data: do not train here"
                return CheckResult("network", "all-reduce", FAIL, detail, remedy)
        seconds[elements] = max(distributed.gather_objects(statistics.median(durations)))
    # In a ring all-reduce of n bytes (4 per element), each of W ranks sends 2 (W-1)/W * n bytes.
    bandwidth = 4 * _LARGE * 2 * (world_size - 1) / world_size / seconds[_LARGE]
    latency = seconds[_SMALL]
    detail = f"{latency * 1e6:,.0f} us, {bandwidth / 1e6:,.0f} MB/s a rank, {world_size} ranks ({device})"
    is_fast = latency <= _MAX_LATENCY_SECONDS and bandwidth >= _MIN_BANDWIDTH
    remedy = "slow: check the interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) and the load of the cores"
    return ok_if(is_fast, "network", "all-reduce", detail, remedy)


def main(groups: list[str]) -> None:
    """Run the checks in this rank. Rank 0 prints one line: RESULTS_PREFIX, then the results as JSON."""
    distributed.initialize(timeout_seconds=120)
    results = [dataclasses.asdict(result) for result in check_ranks(groups)]
    if distributed.is_main_process():
        print(RESULTS_PREFIX + json.dumps(results), flush=True)
    distributed.barrier()


if __name__ == "__main__":
    terminal.run_main(lambda: main(sys.argv[1:]))
