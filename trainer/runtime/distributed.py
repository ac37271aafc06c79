"""Distributed environment of this process (rank, world size, local rank) and collectives on Python objects.

Supports the deepspeed launcher and torchrun (RANK, ...), mpiexec/mpirun (MPICH, Open MPI), srun, and a single process.
Other modules must not derive ranks from RANK, SLURM_*, PMI_* or OMPI_*. `initialize` must set RANK, MASTER_ADDR and similar
variables before DeepSpeed reads them. Otherwise, DeepSpeed uses MPI discovery (wrong local rank if a host runs several
slurmd) and port 29500 (which two jobs on a node cannot share).
"""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trainer.errors import UserError
from trainer.runtime import malloc, process_group


@dataclass(frozen=True)
class DistributedEnvironment:
    """Global and local rank and world size of a process. `launcher`: "env" (RANK is set), "slurm", "mpi" or "single"."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "single"


# Environment variables that hold rank, world size, local rank and local world size, in this order.
_MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
_OPEN_MPI = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))

_environment: DistributedEnvironment | None = None  # set by initialize


def initialize(timeout_seconds: int = 1800) -> DistributedEnvironment:
    """Open the process group (Gloo for CPU tensors, NCCL for CUDA tensors). Return the distributed environment.

    Also set torch's launcher variables (RANK, ...), the number of threads, malloc's options and the CUDA device.
    `timeout_seconds` limits collectives. Without a launcher, the world size is 1. A second call has no effect. Raises UserError
    for contradictory launcher variables, a missing srun, a port in use, a failed rendezvous, or a GPU that ranks share.
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
    names = ("rank", "world_size", "local_rank", "local_world_size")
    os.environ.update({name.upper(): str(getattr(_environment, name)) for name in names})
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
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
    """Return the index of this rank's GPU among the GPUs that are visible to the rank.

    A launcher may make all GPUs of the node visible to each rank, or only one. The index of a single GPU is 0.
    """
    return local_rank % num_visible


def _check_one_gpu_per_rank(gpu_uuid: str) -> None:
    """Collective. Raise UserError if two ranks share a GPU, because they would hang in NCCL or run out of memory."""
    ranks: dict[str, int] = {}
    for rank, gpu in enumerate(gather_objects(gpu_uuid)):
        if ranks.setdefault(gpu, rank) != rank:
            raise UserError(
                f"ranks {ranks[gpu]} and {rank} have the same GPU ({gpu}): fewer GPUs than ranks on a node; "
                "ask for one GPU for each task (Slurm: --gpus-per-task=1, or --gpus-per-node as many as tasks)"
            )


def environment_from_launcher(variables: Mapping[str, str]) -> DistributedEnvironment:
    """Return the distributed environment that `variables` describe. Raises UserError if they are contradictory."""
    if "RANK" in variables and "WORLD_SIZE" in variables:
        result = _read_environment(variables, "env", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        _check_consistent(variables, result)
        return result
    if "SLURM_STEP_ID" in variables and "SLURM_PROCID" in variables:
        variables = {**variables, "_LOCAL": str(_num_tasks_on_this_node(variables))}
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in variables else "SLURM_NTASKS"
        return _read_environment(variables, "slurm", "SLURM_PROCID", tasks, "SLURM_LOCALID", "_LOCAL")
    for mpi_names in (_MPICH, _OPEN_MPI):
        if mpi_names[0] in variables:
            return _read_environment(variables, "mpi", *mpi_names)
    return DistributedEnvironment()


def _num_tasks_on_this_node(variables: Mapping[str, str]) -> int:
    """Return the number of tasks that the srun step runs on this node. `4(x2),1` means 4, 4 and 1 tasks on three nodes."""
    counts: list[int] = []
    for item in variables.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if not match:
            raise UserError(f"cannot read SLURM_STEP_TASKS_PER_NODE={item!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    node = variables.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else counts[0]


def num_job_restarts(variables: Mapping[str, str]) -> int:
    """Return the number of times that Slurm has restarted this job after preemption, requeue or node failure."""
    count = variables.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdigit() else 0


def seconds_left_of_job(variables: Mapping[str, str]) -> float | None:
    """Return the seconds until the time limit of the Slurm job; None outside a job, or if the limit is not known."""
    if "SLURM_JOB_ID" not in variables:
        return None
    end = variables.get("SLURM_JOB_END_TIME", "")  # set by Slurm 23.02 and later
    if end.isdigit():
        return int(end) - time.time()
    output = _scontrol_show("job", variables["SLURM_JOB_ID"])
    match = re.search(r"\bEndTime=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", output)
    return datetime.fromisoformat(match[1]).timestamp() - time.time() if match else None


def _scontrol_show(entity: str, name: str) -> str:
    """Return scontrol's description of a job or node, or "" if scontrol is missing (in a container) or hangs."""
    command = ["scontrol", "--oneliner", "show", entity, name]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def threads_per_rank(variables: Mapping[str, str], environment: DistributedEnvironment) -> int:
    """Return a rank's number of CPU threads: OMP_NUM_THREADS, else SLURM_CPUS_PER_TASK, else an equal share of the cores.

    torch's default, one thread per core on every rank, would oversubscribe the cores.
    """
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        if variables.get(name, "").isdigit() and int(variables[name]) > 0:
            return int(variables[name])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // environment.local_world_size)


def without_launcher_variables(variables: Mapping[str, str], keep: tuple[str, ...] = ()) -> dict[str, str]:
    """Return `variables` without the variables of launchers and Slurm, for the start of a separate distributed program.

    If the program inherited RANK, SLURM_PROCID etc. from this process, its rank numbers would be wrong. `keep`: names of
    variables that are kept.
    """
    names = {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "LOCAL_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
    prefixes = ("SLURM_", "PMI_", "PMIX_", "OMPI_", "MPI_LOCAL", "HYDI_")
    removed = {name for name in variables if name in names or name.startswith(prefixes)} - set(keep)
    return {name: value for name, value in variables.items() if name not in removed}


def environment() -> DistributedEnvironment:
    """Return this process's distributed environment. Before `initialize`, read it from the launcher's variables."""
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
    """Collective. Return rank 0's value on every rank. The value must be small and picklable."""
    if _is_single_process():
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_objects(value: Any) -> list[Any]:
    """Collective. Return on every rank the list of all ranks' values, in rank order."""
    if _is_single_process():
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * environment().world_size
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Collective. Return whether `flag` is True on any rank. Takes one small all-reduce on the CPU."""
    if _is_single_process():
        return flag
    import torch
    import torch.distributed as dist

    flags = torch.tensor([float(flag)])
    dist.all_reduce(flags)
    return float(flags) > 0


def raise_on_all_ranks(error: str | None) -> None:
    """Collective. Raise UserError on every rank if any rank passes an `error`, so that no rank hangs in a later collective."""
    for rank, text in enumerate(gather_objects(error)):
        if text:
            raise UserError(text if rank == 0 else f"rank {rank}: {text}")


@contextlib.contextmanager
def errors_on_all_ranks(describe: Callable[[OSError], str] = str) -> Iterator[None]:
    """Collective. Context manager that raises UserError on every rank if its block raises UserError or OSError on any rank.

    `describe` returns the message for an OSError. The block must contain no collectives.
    """
    error = None
    try:
        yield
    except UserError as problem:
        error = str(problem)
    except OSError as problem:
        error = describe(problem)
    raise_on_all_ranks(error)


def is_communication_failure(error: Exception) -> bool:
    """Return whether `error` means that a collective failed because a rank has exited or timed out."""
    if "torch.distributed" not in sys.modules:
        return False
    import torch.distributed as dist

    # Gloo has no exception class of its own, but Gloo's messages contain this path.
    return isinstance(error, dist.DistError) or "/gloo/transport/" in str(error)


def shutdown() -> None:
    """Destroy the process group and finalize MPI, if they are open. No communication is possible afterwards."""
    global _environment
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
    if "mpi4py.MPI" in sys.modules:  # without MPI_Finalize, mpiexec reports a failure
        from mpi4py import MPI

        if MPI.Is_initialized() and not MPI.Is_finalized():
            MPI.Finalize()
    _environment = None


def _read_environment(variables: Mapping[str, str], launcher: str, *names: str) -> DistributedEnvironment:
    rank, size, local_rank, local_size = names
    # torchrun sets LOCAL_WORLD_SIZE, deepspeed sets LOCAL_SIZE. If neither is set, assume a single node.
    defaults = {local_size: variables.get("LOCAL_SIZE", variables.get(size)), local_rank: variables.get(rank)}
    values = {}
    for name in names:
        text = variables.get(name, defaults.get(name))
        try:
            values[name] = int(text or "")
        except ValueError:
            raise UserError(
                f"{name}={text!r} in the environment is not a number ({launcher} launch)"
            ) from None
    if not 0 <= values[rank] < values[size]:
        raise UserError(
            f"{rank}={values[rank]} but {size}={values[size]}: a rank must be less than the world size"
        )
    return DistributedEnvironment(
        values[rank], values[size], values[local_rank], values[local_size], launcher
    )


def _check_consistent(variables: Mapping[str, str], environment: DistributedEnvironment) -> None:
    """Raise UserError if RANK or WORLD_SIZE contradicts the srun step, e.g. if they are inherited from a shell.

    With wrong values, the tasks would form separate runs or wait forever. Two cases are valid: the rank of each task is
    Slurm's task number, or each node has one task, which is a launcher that starts the ranks of the node.
    """
    tasks_text = variables.get("SLURM_STEP_NUM_TASKS", variables.get("SLURM_NTASKS", ""))
    if "SLURM_STEP_ID" not in variables or not tasks_text.isdigit() or int(tasks_text) == 1:
        return
    num_tasks, task = int(tasks_text), variables.get("SLURM_PROCID", "")
    is_torchrun = "TORCHELASTIC_RUN_ID" in variables
    by_launcher = is_torchrun or environment.world_size == num_tasks * environment.local_world_size
    if environment.world_size != num_tasks and not (by_launcher and environment.local_world_size > 1):
        raise UserError(
            f"WORLD_SIZE={environment.world_size} but SLURM_NTASKS={num_tasks}: unset RANK and WORLD_SIZE, "
            "or start one launcher task per node"
        )
    if environment.world_size == num_tasks and task != str(environment.rank) and not is_torchrun:
        raise UserError(
            f"RANK={environment.rank} but SLURM_PROCID={task}: RANK was left over in the environment; "
            "unset RANK and WORLD_SIZE, srun sets what is needed"
        )


def _check_started_by_srun(variables: Mapping[str, str], environment: DistributedEnvironment) -> None:
    """Raise UserError if a Slurm job with several tasks starts this process without srun, so that only one rank would run."""
    num_tasks = variables.get("SLURM_NTASKS", "")
    if environment.launcher == "single" and num_tasks.isdigit() and int(num_tasks) > 1:
        raise UserError(
            f"SLURM_NTASKS={num_tasks}, but this process was not started by srun and would run alone; "
            "write srun before the command, or unset SLURM_NTASKS"
        )


def _master_address(variables: Mapping[str, str], environment: DistributedEnvironment) -> tuple[str, int]:
    """Return address and port of rank 0. On Slurm, the port depends on the job id, so that two jobs can share a node."""
    if "MASTER_ADDR" in variables and "MASTER_PORT" in variables:
        return variables["MASTER_ADDR"], int(variables["MASTER_PORT"])
    if environment.launcher == "slurm":
        # A restarted job uses another port, because ranks of the previous start that exit slowly may still hold the old port.
        job = int(variables["SLURM_JOB_ID"]) * 7 + int(variables["SLURM_STEP_ID"])
        port = 20000 + (job + 13 * num_job_restarts(variables)) % 20000
        return _node_address(first_host(variables["SLURM_STEP_NODELIST"])), port
    if environment.world_size > 1:
        raise UserError("RANK and WORLD_SIZE are set but MASTER_ADDR and MASTER_PORT are not")
    return "127.0.0.1", process_group.free_port()


def _node_address(node: str) -> str:
    """Return `node` if it resolves, else its address in Slurm's node table. Raises UserError if the table has no address."""
    with contextlib.suppress(OSError):
        socket.getaddrinfo(node, None)
        return node
    match = re.search(r"\bNodeAddr=(\S+)", _scontrol_show("node", node))
    if not match:
        raise UserError(f"the node name {node} does not resolve, and scontrol gives no address for it")
    return match[1]


def first_host(nodelist: str) -> str:
    """Return the first host of a compressed Slurm node list: `gpu[03-07,12],login` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,]*)", nodelist)
    if not match:
        raise UserError(f"cannot read the node list {nodelist!r}")
    return match[1] + (match[2] or "") + match[3]


def _master_address_over_mpi() -> tuple[str, int]:
    MPI = process_group.initialize_mpi()
    address = (socket.gethostname(), process_group.free_port()) if MPI.COMM_WORLD.Get_rank() == 0 else None
    host, port = MPI.COMM_WORLD.bcast(address, root=0)
    same_host = MPI.COMM_WORLD.allreduce(int(host == socket.gethostname())) == MPI.COMM_WORLD.Get_size()
    return ("127.0.0.1" if same_host else host), port


def assert_same_on_all_ranks(name: str, values: dict[str, Any]) -> None:
    """Collective. Raise UserError on all ranks if one of `values` differs between ranks. The message begins with `name`."""
    values_by_rank = gather_objects(values)
    first = values_by_rank[0]
    for rank, other in enumerate(values_by_rank):
        if other != first:
            differing = [key for key in first if first[key] != other.get(key)]
            raise UserError(f"{name}: rank {rank} differs from rank 0 in {', '.join(differing)}")
