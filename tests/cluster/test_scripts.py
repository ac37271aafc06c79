"""Batch scripts against golden files. To update them: UPDATE_GOLDEN=1 pytest tests/cluster/test_scripts.py"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.cluster import jobs, scripts
from trainer.cluster.config import ClusterConfig, parse_cluster_config
from trainer.cluster.scripts import JobPaths
from trainer.errors import UserError
from trainer.study import stages
from trainer.study.study_file import Study

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = REPOSITORY / "tests" / "golden" / "sbatch"
PATHS = JobPaths(Path("/home/me/socratic trainer"), Path("tools"), Path("slurm"), Path("runs/tiny/slurm"))
CONFIGS = {
    "cpu": "PARTITION=low\nTASKS_PER_NODE=1\n",
    "gpu": (
        "PARTITION=gpu\nCPU_PARTITION=cpu\nACCOUNT=abc123\nQOS=long\nCONSTRAINT=nvlink&ib\nGPUS_PER_NODE=4\n"
        "GPU_TYPE=h100\nCPUS_PER_TASK=12\nMEMORY_PER_NODE=400G\nCPU_MEMORY=32G\nTIME_LIMIT=1-00:00:00\n"
        "MAX_RUNNING=3\nMODULES=cuda/12.4 gcc/13\nSCRATCH=/scratch/me\n"
    ),
    "apptainer": "PARTITION=gpu\nGPUS_PER_NODE=2\nGPU_BINDING=task\nCONTAINER=/images/trainer.sif\nVENV=\n",
    "pyxis": "PARTITION=gpu\nGPUS_PER_NODE=2\nCONTAINER=nvcr.io/pytorch:26.01\nCONTAINER_RUNTIME=pyxis\nVENV=\n",
}


def all_scripts(config: ClusterConfig, study: Study) -> str:
    """Return all scripts of a study in one text."""
    planned = jobs.make_jobs(stages.study_stages(study), set(), {}, study.name)
    return "\n".join(f"### {batch.kind}\n{scripts.script_text(batch, config, PATHS)}" for batch in planned)


@pytest.fixture
def study(values: dict[str, Any], make_study: Callable[[dict[str, Any]], Study]) -> Study:
    values["train"]["wandb_project"] = "it's $HOME; rm -rf *"
    return make_study(values)


@pytest.mark.parametrize("name", CONFIGS)
def test_scripts_are_as_before(name: str, study: Study) -> None:
    text, golden = all_scripts(parse_cluster_config(CONFIGS[name], name), study), GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CONFIGS)
def test_bash_parses_every_script(name: str, study: Study) -> None:
    for script in all_scripts(parse_cluster_config(CONFIGS[name], name), study).split("### ")[1:]:
        done = subprocess.run(["bash", "-n"], input=f"# {script}", text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_settings_reach_the_tool_unchanged(study: Study, tmp_path: Path) -> None:
    """Run the lines that set the arguments: the shell must not expand quotes, dollars or stars in settings."""
    planned = jobs.make_jobs(stages.study_stages(study), set(), {}, study.name)
    train = next(batch for batch in planned if batch.kind == "train")
    body = scripts.script_text(train, ClusterConfig(), PATHS).partition("case")[2].partition("esac")[0]
    show = 'printf "%s\\n" "$log" "${arguments[@]}"'
    for index, stage in zip(train.indices, train.stages, strict=True):
        done = subprocess.run(
            ["bash", "-euc", f"case{body}esac\n{show}"],
            env={"SLURM_ARRAY_TASK_ID": str(index), "HOME": "/root"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines() == [str(stage.log), *stages.to_flags(stage.settings)]


def test_no_secret_gets_into_a_script(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    text = all_scripts(ClusterConfig(), study)
    assert "0123456789abcdef" not in text and "WANDB_API_KEY" not in text


@pytest.mark.parametrize(
    ("ranks", "per_node", "layout"), [(1, 4, (1, 1)), (3, 4, (1, 3)), (4, 4, (1, 4)), (16, 4, (4, 4))]
)
def test_ranks_fill_as_few_nodes_as_they_can(ranks: int, per_node: int, layout: tuple[int, int]) -> None:
    assert scripts.nodes_and_ranks(ranks, ClusterConfig(gpus_per_node=per_node)) == layout


def test_ranks_that_do_not_fill_nodes_are_refused() -> None:
    with pytest.raises(
        UserError, match="num_ranks 6 does not fill nodes of GPUS_PER_NODE 4; take a multiple"
    ):
        scripts.nodes_and_ranks(6, ClusterConfig(gpus_per_node=4))
    with pytest.raises(UserError, match="nodes of TASKS_PER_NODE 2"):
        scripts.nodes_and_ranks(3, ClusterConfig(tasks_per_node=2))


def test_a_log_folder_slurm_cannot_write_to_is_refused(study: Study) -> None:
    planned = jobs.make_jobs(stages.study_stages(study), set(), {}, study.name)
    paths = JobPaths(Path("/home/me"), Path("tools"), Path("slurm"), Path("my runs/tiny/slurm"))
    with pytest.raises(UserError, match="my runs/tiny/slurm: a batch script cannot write there"):
        scripts.script_text(planned[0], ClusterConfig(), paths)
