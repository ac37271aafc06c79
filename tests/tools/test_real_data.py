"""The README's tour on GSM8K with GPT-2's tokenizer and a small GPT-2 of random weights, by the commands a user types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import REPOSITORY
from trainer.storage.run_directory import RunDirectory, StudyDirectory

BIN = Path(sys.executable).parent


def command(*arguments: str) -> str:
    """Run one command of the tour; it must end well. Returns what the user saw."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        list(arguments), cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def tour(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a trained run and its export."""
    folder = tmp_path_factory.mktemp("tour")
    tokenizer, data = str(shared_data / "gpt2-tokenizer"), str(shared_data / "gsm8k")
    prepare = (
        "python",
        "tools/prepare_shards.py",
        "--data",
        "gsm8k",
        "--data_path",
        data,
        "--tokenizer_name",
        tokenizer,
    )
    command(*prepare, "--split", "test_socratic", "--output_dir", f"{folder}/shards/train")
    command(*prepare, "--split", "test", "--max_problems", "21", "--output_dir", f"{folder}/shards/test")
    run = f"{folder}/runs/mine/gsm8k.socratic.gpt2-tiny.s0"
    seen = command(
        *("deepspeed", "--num_gpus", "2", "tools/train.py", "--train_shards", f"{folder}/shards/train"),
        *(
            "--method",
            "socratic",
            "--config_name",
            tokenizer,
            "--config_overrides",
            "n_layer=2,n_embd=64,n_head=2",
        ),
        *("--model_label", "gpt2-tiny", "--deepspeed", "ds_configs/zero2.json", "--learning_rate", "1e-3"),
        *("--max_steps", "4", "--save_steps", "2", "--output_dir", run),
    )
    assert "finished at step 4/4" in seen
    assert "layout: packed" in seen
    command("python", "tools/convert_checkpoint.py", run, "--verify")
    return folder


def test_export_loads_with_transformers_and_generates(tour: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = RunDirectory(tour / "runs/mine/gsm8k.socratic.gpt2-tiny.s0").export
    model = AutoModelForCausalLM.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert model.config.n_layer == 2
    assert model.lm_head.weight is model.transformer.wte.weight
    prompt = tokenizer("Natalia sold clips to 48 of her friends.\n", return_tensors="pt")
    assert (
        model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1]
        == prompt["input_ids"].shape[1] + 3
    )


def test_every_launcher_evaluates_to_the_same_predictions(tour: Path) -> None:
    export = str(RunDirectory(tour / "runs/mine/gsm8k.socratic.gpt2-tiny.s0").export)
    arguments = ("tools/evaluate.py", "--model_name_or_path", export, "--shards", f"{tour}/shards/test")
    arguments += ("--max_new_tokens", "24", "--batch_size", "4")
    launchers = {
        "default": ("deepspeed", "--num_gpus", "2"),
        "mpiexec": ("mpiexec", "-n", "2", "python"),
        "alone": ("python",),
    }
    predictions = []
    for name, launcher in launchers.items():
        output = () if name == "default" else ("--output_dir", f"{tour}/{name}")
        command(*launcher, *arguments, *output)
        where = tour / name
        if name == "default":
            run = RunDirectory(tour / "runs/mine/gsm8k.socratic.gpt2-tiny.s0")
            where = run.evaluation(run.evaluation_names()[0]).path
        predictions.append((where / "predictions.jsonl").read_text(encoding="utf-8"))
        results = json.loads((where / "results.json").read_text(encoding="utf-8"))
        assert results["num_problems"] == 21
        assert results["world_size"] == (1 if name == "alone" else 2)
    assert predictions[0] == predictions[1] == predictions[2]
    ids = [json.loads(line)["id"] for line in predictions[0].splitlines()]
    assert ids == [f"gsm8k-test-{index:06d}" for index in range(21)]

    command("python", "tools/plot_scaling.py", f"{tour}/runs/mine")
    report = StudyDirectory(tour / "runs/mine").report
    assert "gpt2-tiny" in (report / "index.html").read_text(encoding="utf-8")
    assert (report / "results.csv").read_text(encoding="utf-8").count("gpt2-tiny") >= 1
