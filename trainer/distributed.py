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
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from trainer.errors import UserError


@dataclass(frozen=True)
class World:
    """Who this process is. `launcher`: "env" (RANK given), "slurm", "mpi" or "single"."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "single"


_world: World | None = None  # set by initialize


def initialize(timeout_seconds: int = 1800) -> World:
    """Find our place, complete the environment, set threads and device, and open the process group.

    Gloo carries CPU tensors and NCCL CUDA ones. A process without a launcher is a world of one. A second call
    changes nothing. Raises UserError for a contradictory environment.
    """
    global _world
    if _world is not None:
        return _world
    import torch
    import torch.distributed as dist

    _world = discover(os.environ)
    if _world.launcher == "mpi":
        address, port = _agree_over_mpi()
    else:
        address, port = _master(os.environ, _world)
    os.environ.update(
        RANK=str(_world.rank),
        WORLD_SIZE=str(_world.world_size),
        LOCAL_RANK=str(_world.local_rank),
        LOCAL_WORLD_SIZE=str(_world.local_world_size),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(threads_per_rank(os.environ, _world))
    backend = "gloo"
    if torch.cuda.is_available():
        # A site may show a task one GPU (its own) or all of its node's.
        torch.cuda.set_device(_world.local_rank if torch.cuda.device_count() > 1 else 0)
        backend = "cpu:gloo,cuda:nccl"
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    return _world


def discover(environment: Mapping[str, str]) -> World:
    """Read our place from the environment; changes nothing. Raises UserError naming contradictory variables."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        world = _read(environment, "env", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        _refuse_contradiction(environment, world)
        return world
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        local_size = environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]
        return _read(
            {**environment, "_LOCAL": local_size},
            "slurm",
            "SLURM_PROCID",
            "SLURM_NTASKS",
            "SLURM_LOCALID",
            "_LOCAL",
        )
    if "PMI_RANK" in environment:
        return _read(environment, "mpi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    if "OMPI_COMM_WORLD_RANK" in environment:
        prefix = "OMPI_COMM_WORLD_"
        names = (prefix + "RANK", prefix + "SIZE", prefix + "LOCAL_RANK", prefix + "LOCAL_SIZE")
        return _read(environment, "mpi", *names)
    return World()


def threads_per_rank(environment: Mapping[str, str], world: World) -> int:
    """Threads of one rank: as told by OMP_NUM_THREADS or Slurm, else this node's share of the usable cores.

    Without a limit every rank would start as many threads as there are cores, and they would fight over them.
    """
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        if environment.get(name, "").isdigit() and int(environment[name]) > 0:
            return int(environment[name])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // world.local_world_size)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without our place in it: for a program that starts a world of its own.

    What is left of a shell, an allocation or an srun step would make its ranks believe that they are somebody else.
    """
    names = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "LOCAL_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    prefixes = ("SLURM_", "PMI_", "PMIX_", "OMPI_", "MPI_LOCAL", "HYDI_")
    return {
        name: value
        for name, value in environment.items()
        if name not in names and not name.startswith(prefixes)
    }


def world() -> World:
    """Who we are; before `initialize` (an early error must be told once, not by every rank) as the launcher says."""
    return _world or discover(os.environ)


def is_main_process() -> bool:
    return world().rank == 0


def _alone() -> bool:
    return _world is None or _world.world_size == 1


def barrier() -> None:
    if not _alone():
        import torch.distributed as dist

        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank (a small picklable object; it comes from our own processes only)."""
    if _alone():
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if _alone():
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world().world_size
    dist.all_gather_object(values, value)
    return values


def raise_together(error: str | None) -> None:
    """If any rank has an error, every rank raises it: nobody is left waiting in a collective."""
    errors = [(rank, text) for rank, text in enumerate(gather_objects(error)) if text]
    if errors:
        rank, text = errors[0]
        raise UserError(text if rank == 0 else f"rank {rank}: {text}")


def shutdown() -> None:
    """Close the process group, if there is one."""
    global _world
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    _world = None


def free_port() -> int:
    """A TCP port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _read(environment: Mapping[str, str], launcher: str, *names: str) -> World:
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
    found = World(values[rank], values[size], values[local_rank], values[local_size], launcher)
    if not 0 <= found.rank < found.world_size:
        raise UserError(
            f"{rank}={found.rank} but {size}={found.world_size}: a rank is below the number of ranks"
        )
    return found


def _refuse_contradiction(environment: Mapping[str, str], found: World) -> None:
    """RANK set by hand (or left over in a shell) inside an srun step of another size would give N separate runs."""
    tasks = environment.get("SLURM_NTASKS") if "SLURM_STEP_ID" in environment else None
    if tasks and tasks.isdigit() and int(tasks) > 1 and int(tasks) != found.world_size:
        raise UserError(
            f"WORLD_SIZE={found.world_size} but SLURM_NTASKS={tasks}: unset RANK and WORLD_SIZE, "
            "or start one launcher task per node"
        )


def _master(environment: Mapping[str, str], found: World) -> tuple[str, int]:
    """Address and port of rank 0. On Slurm the port follows from the job id: two jobs on a node do not meet."""
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        return environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    if found.launcher == "slurm":
        job = int(environment["SLURM_JOB_ID"]) * 7 + int(environment["SLURM_STEP_ID"])
        return first_host(environment["SLURM_STEP_NODELIST"]), 20000 + job % 20000
    if found.world_size > 1:
        raise UserError("RANK and WORLD_SIZE are set but MASTER_ADDR and MASTER_PORT are not")
    return "127.0.0.1", free_port()


def first_host(nodelist: str) -> str:
    """First host of Slurm's compressed list: `gpu[03-07,12],login` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,]*)", nodelist)
    if not match:
        raise UserError(f"cannot read the node list {nodelist!r}")
    return match[1] + (match[2] or "") + match[3]


def _agree_over_mpi() -> tuple[str, int]:
    from mpi4py import MPI

    here = (socket.gethostname(), free_port()) if MPI.COMM_WORLD.Get_rank() == 0 else None
    host, port = MPI.COMM_WORLD.bcast(here, root=0)
    same_host = MPI.COMM_WORLD.allreduce(int(host == socket.gethostname())) == MPI.COMM_WORLD.Get_size()
    return ("127.0.0.1" if same_host else host), port


def agree(what: str, value: Any) -> None:
    """Refuse to go on if ranks see different things (another file, another code version). Raises UserError on all."""
    values = gather_objects(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            differing = [key for key in values[0] if values[0][key] != other.get(key)]
            raise UserError(f"{what}: rank {rank} differs from rank 0 in {', '.join(differing)}")
