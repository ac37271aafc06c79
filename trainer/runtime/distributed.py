"""The only file that knows RANK, SLURM_*, PMI_*, OMPI_*: who we are among the processes, whoever started them.

Works the same under the deepspeed launcher and torchrun (RANK, ...), mpiexec/mpirun (MPICH, Open MPI), srun, and
for a single process. The environment is completed *before* DeepSpeed looks at it: left alone it falls into MPI
discovery, whose local rank is wrong with several slurmd on one host, and into port 29500, which collides as soon
as two jobs share a node.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trainer.errors import UserError
from trainer.runtime import malloc, process_group


@dataclass(frozen=True)
class DistributedEnvironment:
    """Who this process is. `launcher`: "env" (RANK given), "slurm", "mpi" or "single"."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "single"


_environment: DistributedEnvironment | None = None  # set by initialize


def initialize(timeout_seconds: int = 1800) -> DistributedEnvironment:
    """Find our place, complete the environment, set threads, memory and device, and open the process group.

    Gloo carries CPU tensors and NCCL CUDA ones. A process without a launcher is a world of one. A second call
    changes nothing. Raises UserError for a contradictory environment, a taken port, or ranks that do not meet.
    """
    global _environment
    if _environment is not None:
        return _environment
    import torch
    import torch.distributed as dist

    _environment = environment_from_launcher(os.environ)
    _check_started_by_srun(os.environ, _environment)
    if _environment.launcher == "mpi":
        address, port = _master_address_over_mpi()
    else:
        address, port = _master_address(os.environ, _environment)
    os.environ.update(
        RANK=str(_environment.rank),
        WORLD_SIZE=str(_environment.world_size),
        LOCAL_RANK=str(_environment.local_rank),
        LOCAL_WORLD_SIZE=str(_environment.local_world_size),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(threads_per_rank(os.environ, _environment))
    malloc.tune_glibc_malloc()
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(device_index(_environment.local_rank, torch.cuda.device_count()))
        backend = "cpu:gloo,cuda:nccl"
    if not dist.is_initialized():
        process_group.init_process_group(backend, _environment.rank, _environment.world_size, timeout_seconds)
    if torch.cuda.is_available():
        _check_one_gpu_per_rank(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
    return _environment


def device_index(local_rank: int, num_visible: int) -> int:
    """A site may show a task one GPU (its own), a few, or all of its node's: the number among those it sees."""
    return local_rank % num_visible


def _check_one_gpu_per_rank(identity: str) -> None:
    """Collective. Two ranks on one GPU would hang in NCCL or run out of memory."""
    owners: dict[str, int] = {}
    for rank, device in enumerate(gather_objects(identity)):
        if device in owners:
            raise UserError(
                f"ranks {owners[device]} and {rank} have the same GPU ({device}): fewer GPUs than ranks on a node; "
                "ask for one GPU for each task (Slurm: --gpus-per-task=1, or --gpus-per-node as many as tasks)"
            )
        owners[device] = rank


def environment_from_launcher(environment: Mapping[str, str]) -> DistributedEnvironment:
    """Read our place from the environment; changes nothing. Raises UserError naming contradictory variables."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        world = _read_environment(environment, "env", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        _check_consistent(environment, world)
        return world
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
        names = ("SLURM_PROCID", tasks, "SLURM_LOCALID", "_LOCAL")
        return _read_environment(
            {**environment, "_LOCAL": str(tasks_on_this_node(environment))}, "slurm", *names
        )
    if "PMI_RANK" in environment:
        return _read_environment(
            environment, "mpi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"
        )
    if "OMPI_COMM_WORLD_RANK" in environment:
        prefix = "OMPI_COMM_WORLD_"
        names = (prefix + "RANK", prefix + "SIZE", prefix + "LOCAL_RANK", prefix + "LOCAL_SIZE")
        return _read_environment(environment, "mpi", *names)
    return DistributedEnvironment()


def tasks_on_this_node(environment: Mapping[str, str]) -> int:
    """Tasks of this srun step here, from Slurm's compressed list: node 2 of `4(x2),1` has 1."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise UserError(f"cannot read SLURM_STEP_TASKS_PER_NODE={part!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    node = environment.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else counts[0]


def restarts_of_job(environment: Mapping[str, str]) -> int:
    """How often Slurm has started this job again (preempted, requeued, node lost); 0 without Slurm."""
    count = environment.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdigit() else 0


def seconds_left_of_job(environment: Mapping[str, str]) -> float | None:
    """Seconds until the wall-clock limit of our Slurm job; None if there is no job, or nobody to tell."""
    if "SLURM_JOB_ID" not in environment:
        return None
    end = environment.get("SLURM_JOB_END_TIME", "")  # Slurm 23.02 and later
    if end.isdigit():
        return int(end) - time.time()
    told = _scontrol_show("job", environment["SLURM_JOB_ID"])
    match = re.search(r"\bEndTime=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", told)
    return datetime.fromisoformat(match[1]).timestamp() - time.time() if match else None


def _scontrol_show(kind: str, name: str) -> str:
    """What Slurm knows of a job or a node; "" in a container without its commands (--signal still tells the time)."""
    command = ["scontrol", "--oneliner", "show", kind, name]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def threads_per_rank(environment: Mapping[str, str], world: DistributedEnvironment) -> int:
    """Threads of one rank: as told by OMP_NUM_THREADS or Slurm, else this node's share of the usable cores.

    Without a limit every rank would start as many threads as there are cores, and they would fight over them.
    """
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        if environment.get(name, "").isdigit() and int(environment[name]) > 0:
            return int(environment[name])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // world.local_world_size)


def without_launcher_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without our place in it: for a program that starts a world of its own.

    What is left of a shell, an allocation or an srun step would make its ranks believe that they are somebody else.
    """
    places = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    names = (*places, "MASTER_ADDR", "MASTER_PORT")
    prefixes = ("SLURM_", "PMI_", "PMIX_", "OMPI_", "MPI_LOCAL", "HYDI_")
    return {
        name: value
        for name, value in environment.items()
        if name not in names and not name.startswith(prefixes)
    }


def environment() -> DistributedEnvironment:
    """Who we are; before `initialize` (an early error must be told once, not by every rank) as the launcher says."""
    return _environment or environment_from_launcher(os.environ)


def is_main_process() -> bool:
    return environment().rank == 0


def _is_single_process() -> bool:
    return _environment is None or _environment.world_size == 1


def barrier() -> None:
    if not _is_single_process():
        import torch.distributed as dist

        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank (a small picklable object; it comes from our own processes only)."""
    if _is_single_process():
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if _is_single_process():
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * environment().world_size
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Collective. Whether the flag is set on any rank; one small reduction on the CPU."""
    if _is_single_process():
        return flag
    import torch
    import torch.distributed as dist

    flags = torch.tensor([float(flag)])
    dist.all_reduce(flags)
    return float(flags) > 0


def raise_on_all_ranks(error: str | None) -> None:
    """If any rank has an error, every rank raises it: nobody is left waiting in a collective."""
    errors = [(rank, text) for rank, text in enumerate(gather_objects(error)) if text]
    if errors:
        rank, text = errors[0]
        raise UserError(text if rank == 0 else f"rank {rank}: {text}")


def is_communication_failure(error: Exception) -> bool:
    """Whether a collective failed because a rank is gone, or does not answer. (Gloo has no exception of its own.)"""
    if "torch.distributed" not in sys.modules:
        return False
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "/gloo/transport/" in str(error)


def shutdown() -> None:
    """Close the process group and leave MPI's world, if there is one of either. Nothing may be said to others after."""
    global _environment
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
    if "mpi4py.MPI" in sys.modules:  # or mpiexec takes the end of a process for a fault
        from mpi4py import MPI

        if MPI.Is_initialized() and not MPI.Is_finalized():
            MPI.Finalize()
    _environment = None


def _read_environment(environment: Mapping[str, str], launcher: str, *names: str) -> DistributedEnvironment:
    rank, size, local_rank, local_size = names
    values = {}
    for name in names:
        text = environment.get(name)
        if text is None and name == local_size:
            # torchrun and deepspeed set LOCAL_WORLD_SIZE / LOCAL_SIZE; by hand it may be missing: assume one node.
            text = environment.get("LOCAL_SIZE", environment.get(size))
        elif text is None and name == local_rank:
            text = environment.get(rank)
        try:
            values[name] = int(text or "")
        except ValueError:
            raise UserError(
                f"{name}={text!r} in the environment is not a number ({launcher} launch)"
            ) from None
    found = DistributedEnvironment(
        values[rank], values[size], values[local_rank], values[local_size], launcher
    )
    if not 0 <= found.rank < found.world_size:
        raise UserError(
            f"{rank}={found.rank} but {size}={found.world_size}: a rank is below the number of ranks"
        )
    return found


def _check_consistent(environment: Mapping[str, str], found: DistributedEnvironment) -> None:
    """RANK set by hand, or left over in a shell, inside an srun step: N separate runs, or ranks waiting for ever.

    Right are one task a rank with Slurm's own numbers, and one launcher task a node.
    """
    tasks_text = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", ""))
    if "SLURM_STEP_ID" not in environment or not tasks_text.isdigit() or int(tasks_text) == 1:
        return
    tasks, task = int(tasks_text), environment.get("SLURM_PROCID", "")
    by_launcher = "TORCHELASTIC_RUN_ID" in environment or found.world_size == tasks * found.local_world_size
    if found.world_size != tasks and not (by_launcher and found.local_world_size > 1):
        raise UserError(
            f"WORLD_SIZE={found.world_size} but SLURM_NTASKS={tasks}: unset RANK and WORLD_SIZE, "
            "or start one launcher task per node"
        )
    if found.world_size == tasks and task != str(found.rank) and "TORCHELASTIC_RUN_ID" not in environment:
        raise UserError(
            f"RANK={found.rank} but SLURM_PROCID={task}: RANK was left over in the environment; "
            "unset RANK and WORLD_SIZE, srun sets what is needed"
        )


def _check_started_by_srun(environment: Mapping[str, str], found: DistributedEnvironment) -> None:
    """A tool started in a batch script without srun would be alone, and the job's other tasks idle."""
    tasks = environment.get("SLURM_NTASKS", "")
    if found.launcher == "single" and tasks.isdigit() and int(tasks) > 1:
        raise UserError(
            f"SLURM_NTASKS={tasks}, but this process was not started by srun and would be alone; "
            "write srun before the command, or unset SLURM_NTASKS"
        )


def _master_address(environment: Mapping[str, str], found: DistributedEnvironment) -> tuple[str, int]:
    """Address and port of rank 0. On Slurm the port follows from the job id: two jobs on a node do not meet."""
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        return environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    if found.launcher == "slurm":
        # A restarted job takes another port: the old one may still be held by ranks that take long to die.
        job = int(environment["SLURM_JOB_ID"]) * 7 + int(environment["SLURM_STEP_ID"])
        port = 20000 + (job + 13 * restarts_of_job(environment)) % 20000
        return _node_address(first_host(environment["SLURM_STEP_NODELIST"])), port
    if found.world_size > 1:
        raise UserError("RANK and WORLD_SIZE are set but MASTER_ADDR and MASTER_PORT are not")
    return "127.0.0.1", process_group.free_port()


def _node_address(node: str) -> str:
    """A node's name, or, where names of nodes are not names of hosts, the address Slurm itself uses."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        pass
    match = re.search(r"\bNodeAddr=(\S+)", _scontrol_show("node", node))
    if not match:
        raise UserError(f"the node name {node} does not resolve, and scontrol does not tell its address")
    return match[1]


def first_host(nodelist: str) -> str:
    """First host of Slurm's compressed list: `gpu[03-07,12],login` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,]*)", nodelist)
    if not match:
        raise UserError(f"cannot read the node list {nodelist!r}")
    return match[1] + (match[2] or "") + match[3]


def _master_address_over_mpi() -> tuple[str, int]:
    from mpi4py import MPI

    here = (socket.gethostname(), process_group.free_port()) if MPI.COMM_WORLD.Get_rank() == 0 else None
    host, port = MPI.COMM_WORLD.bcast(here, root=0)
    same_host = MPI.COMM_WORLD.allreduce(int(host == socket.gethostname())) == MPI.COMM_WORLD.Get_size()
    return ("127.0.0.1" if same_host else host), port


def assert_same_on_all_ranks(what: str, value: Any) -> None:
    """Refuse to go on if ranks see different things (another file, another code version). Raises UserError on all."""
    values = gather_objects(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            differing = [key for key in values[0] if values[0][key] != other.get(key)]
            raise UserError(f"{what}: rank {rank} differs from rank 0 in {', '.join(differing)}")
