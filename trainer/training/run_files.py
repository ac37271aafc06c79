"""Small files of a run directory: settings, resolved ds_config, environment, and the model's files."""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from trainer.models import architecture, base_files
from trainer.runtime import distributed
from trainer.settings import TrainSettings
from trainer.storage import atomic_dir
from trainer.storage.manifest import RunFacts
from trainer.storage.run_directory import RunDirectory

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "safetensors", "numpy")


def write_run_files(
    settings: TrainSettings,
    run: RunDirectory,
    resolved: dict[str, Any],
    facts: RunFacts,
    config: Any,
    tokenizer: Any,
    is_resumed: bool,
) -> None:
    """Write settings, ds_config (`resolved`), environment (with `facts`) and model files (no weights). Call only on rank 0."""
    run.path.mkdir(parents=True, exist_ok=True)
    num_resumes = _num_resumes(run) + 1 if is_resumed else 0
    environment = {**describe_environment(), "num_resumes": num_resumes, **facts}
    atomic_dir.write_text(run.settings, yaml.safe_dump(asdict(settings), sort_keys=False))
    atomic_dir.write_text(run.ds_config, json.dumps(resolved, indent=1) + "\n")
    atomic_dir.write_text(run.environment, json.dumps(environment, indent=1) + "\n")
    write_model_files(run.model, settings.model_name_or_path, config, tokenizer)


def write_model_files(folder: Path, base_model: str, config: Any, tokenizer: Any) -> None:
    """Replace `folder` with the files that an export needs besides the weights.

    `base_model`: folder or Hub name of the pretrained model, "" if there is none. `tokenizer`: the tokenizer of the shards.
    """
    shutil.rmtree(folder, ignore_errors=True)
    base = base_files.base_folder(base_model) if base_model else None
    generation = base_files.generation_config(base, tokenizer)
    changes = {"use_cache": True, "eos_token_id": generation.get("eos_token_id")}
    config.__class__.from_dict(config.to_dict() | changes).save_pretrained(folder)
    with architecture.quiet_transformers():
        base_files.add_old_settings(folder / "config.json", base_files.published_settings(base))
    base_files.copy_tokenizer(base, tokenizer, folder)
    base_files.copy_licence_and_code(base, folder)
    atomic_dir.write_text(
        folder / "generation_config.json", json.dumps(generation, indent=2, sort_keys=True) + "\n"
    )
    # An export reads the weights' names and shapes from this record instead of importing transformers.
    architecture.record_architecture(folder, base_files.wrapper_type(base, config.model_type))


def remove_leftovers(run: RunDirectory) -> None:
    """Remove temporary files and directories that killed training processes left in the run directory.

    Must be called on rank 0 while this process holds the run's lock. Temporary files of locks, exports and evaluations are
    kept.
    """
    files = (run.settings, run.ds_config, run.environment, run.restarts, run.wandb_id)
    patterns = [".initial-*.tmp", ".probe-*.tmp", *(f".{path.name}.*.tmp" for path in files)]
    leftovers = [path for pattern in patterns for path in run.path.glob(pattern)]
    for path in [*leftovers, *run.checkpoints.glob(".step-*.tmp")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def code_fingerprint() -> dict[str, str]:
    """Return versions of packages and Python, and a digest of the trainer's code (including uncommitted changes)."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode())
        digest.update(path.read_bytes())
    versions = {name: version(name) for name in PACKAGES}
    return {**versions, "python": platform.python_version(), "trainer's code": digest.hexdigest()}


def processor_name() -> str:
    """Return the name of the processor, e.g. "AMD EPYC 7763 64-Core Processor"; on an unknown system its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _num_resumes(run: RunDirectory) -> int:
    """Return the recorded number of resumes; 0 if environment.json is missing or damaged, because it is only a record."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(run.environment.read_text(encoding="utf-8"))["num_resumes"])
    return 0


def describe_environment() -> dict[str, Any]:
    """Return versions, host, processor, launcher, command and code revision. These facts help to explain why two runs differ."""
    command = ["git", "-C", str(Path(__file__).parents[2]), "describe", "--always", "--dirty"]
    revision = subprocess.run(command, capture_output=True, text=True)
    return {
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": processor_name(),
        "threads_per_rank": torch.get_num_threads(),
        "launcher": distributed.environment().launcher,
        "slurm_job_id": os.environ.get("SLURM_JOB_ID", ""),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "code_revision": revision.stdout.strip(),
    }
