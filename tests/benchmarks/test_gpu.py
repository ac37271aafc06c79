"""Tests of the GPU benchmarks on a CPU: checks find faults, rows are kept, lists are complete."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from transformers import LlamaForCausalLM

from benchmarks import harness
from benchmarks.gpu import cases, facts, parity, parity_attention, run, study, table
from benchmarks.harness import Comparison, Contender, Unequal, python
from trainer.models import packed_attention, presets
from trainer.models.slot_attention import use_slot_attention
from trainer.models.tokenizer import load_tokenizer
from trainer.problems import stories
from trainer.study.study_file import load_study

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "benchmarks" / "gpu.sh"
EVERY_CASE = [case for tiny in (False, True) for case in (*cases.training(tiny), *cases.memory(tiny))]


def output(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_packed_attention_is_that_of_each_example_alone(capsys: pytest.CaptureFixture[str]) -> None:
    parity_attention.main()
    found = output(capsys)
    assert found["checks"] == 8 and found["failures"] == []
    parity.nothing_failed({"ours": found})


def test_attention_that_looks_across_examples_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    causal_mask = parity_attention.causal_pack_mask

    def of_one_example(lengths: Any, bounds: torch.Tensor) -> Any:
        return causal_mask([sum(lengths)], bounds[[0, -1]])

    monkeypatch.setattr(parity_attention, "causal_pack_mask", of_one_example)
    parity_attention.main()
    found = output(capsys)
    assert len(found["failures"]) == 8
    with pytest.raises(Unequal, match="off by"):
        parity.nothing_failed({"ours": found})


@pytest.mark.parametrize("groups", [4, 2])
def test_the_one_kernel_is_called_as_this_torch_wants_it(groups: int) -> None:
    """Shapes and keyword arguments; torch has no such kernel for a CPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query, key = torch.empty(1, 4, 10, 16), torch.empty(1, groups, 10, 16)
        bounds = torch.empty(3, dtype=torch.int32)
        out = packed_attention.varlen_attention(query, key, key, None, bounds, 6, bounds, 6)
    assert out.shape == (1, 10, 4, 16)


def test_the_one_kernel_is_called_as_torch_2_11_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no `enable_gqa` and takes fewer key-value heads as they are."""
    from torch.nn.attention import varlen

    def varlen_attn(
        query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
        return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:  # fmt: skip
        assert window_size == (-1, 0) and key.shape[1] == 2
        return query + 1

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    packed_attention._takes_enable_gqa.cache_clear()
    query, key = torch.zeros(1, 4, 10, 16), torch.zeros(1, 2, 10, 16)
    bounds = torch.tensor([0, 10])
    out = packed_attention.varlen_attention(query, key, key, None, bounds, 10, bounds, 10)
    packed_attention._takes_enable_gqa.cache_clear()
    assert out.shape == (1, 10, 4, 16) and bool((out == 1).all())


@pytest.mark.parametrize("user", ["packs", "slots"])
def test_attention_of_changing_lengths_is_not_cudnns(user: str) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    if user == "packs":
        packed_attention.register()
    else:
        with use_slot_attention(LlamaForCausalLM(cases.config("llama-2-7b", tiny=True))):
            pass
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def row(tmp_path: Path, gate: Any) -> tuple[bool, Path]:
    """Measure a contender that prints one number."""
    command = python("-c", "print('{\"speed\": 2.0}')")
    comparison = Comparison("work", "speed", "a second", [Contender("ours", command, peer=False)], gate)
    path = tmp_path / "rows" / "train-1.json"
    chosen = argparse.Namespace(tiny=True, rounds=1)
    return run.measured("train", comparison, chosen, path, 60.0), path


def test_a_row_is_kept_once_it_is_measured(tmp_path: Path) -> None:
    done, path = row(tmp_path, lambda outputs: None)
    kept = json.loads(path.read_text())
    assert done and kept["medians"] == {"ours": 2.0} and kept["device"] == facts.device()


def test_no_row_is_kept_where_the_numbers_are_wrong(tmp_path: Path) -> None:
    def gate(outputs: Any) -> None:
        raise Unequal("they differ")

    done, path = row(tmp_path, gate)
    assert not done and not path.exists()


@pytest.mark.parametrize(
    ("script", "told"),
    [("import time; time.sleep(60)", "no end within"), ("import sys; sys.exit(3)", "exit status 3")],
)
def test_a_peer_that_is_late_or_fails_does_not_cost_ours(tmp_path: Path, script: str, told: str) -> None:
    contenders = [
        Contender("ours", python("-c", "print('{\"speed\": 2.0}')"), peer=False),
        Contender("peer", python("-c", script)),
    ]
    comparison = Comparison("work", "speed", "a second", contenders, lambda outputs: outputs["ours"]["speed"])
    path = tmp_path / "rows" / "train-1.json"
    assert run.measured("train", comparison, argparse.Namespace(tiny=True, rounds=1), path, 3.0)
    kept = json.loads(path.read_text())
    assert kept["medians"]["ours"] == 2.0 and told in kept["rounds"][0]["peer"]["failed"]
    assert f"| work | 2 a second | peer: {kept['rounds'][0]['peer']['failed']} |" in table.markdown(
        [kept], facts.facts()
    )


def test_a_peer_is_not_waited_for_as_long_as_there_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute, or five times what ours took."""
    monkeypatch.setattr(harness, "MIN_PATIENCE_SECONDS", 1.0)
    contenders = [
        Contender("ours", python("-c", "print('{\"speed\": 2.0}')"), peer=False),
        Contender("peer", python("-c", "import time; time.sleep(600)")),
    ]
    comparison = Comparison("work", "speed", "a second", contenders, lambda outputs: None)
    path = tmp_path / "rows" / "train-1.json"
    assert run.measured("train", comparison, argparse.Namespace(tiny=True, rounds=1), path, 500.0)
    assert "no end within" in json.loads(path.read_text())["rounds"][0]["peer"]["failed"]


def test_ours_must_not_fail(tmp_path: Path) -> None:
    contenders = [Contender("ours", python("-c", "import sys; sys.exit(3)"), peer=False)]
    comparison = Comparison("work", "speed", "a second", contenders, lambda outputs: None)
    path = tmp_path / "rows" / "train-1.json"
    assert not run.measured("train", comparison, argparse.Namespace(tiny=True, rounds=1), path, 30.0)
    assert not path.exists()


def test_no_speed_without_parity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "MATERIALS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["run", "train", "--tiny"])
    with pytest.raises(SystemExit, match="numbers before speed"):
        run.main()
    for comparison in run.comparisons("parity", True):
        path = run.row_path("parity", comparison, True)
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(json.dumps({"device": "another GPU"}))
    assert not run.has_passed_parity(True), "parity of another device does not count"


def test_the_table_has_every_kind_of_row() -> None:
    common = {"device": "NVIDIA H200", "unit": "real tokens/s", "notes": ""}
    ours = {"mfu": 0.451, "peak_bytes": 20e9, "predicted_bytes": 21e9}
    measured = {
        **common, "work": "train gpt2", "medians": {"ours": 1e5, "TRL": 2e4, "TRL, whole": 1e-9},
        "ratios": {"TRL": 5.0, "TRL, whole": 1e14}, "ratio_to_best_peer": 5.0,
        "rounds": [{"ours": ours, "TRL": {"attention": "sdpa"}, "TRL, whole": {"failed": "out of memory"}}],
    }  # fmt: skip
    refused = {
        **common, "work": "train 7b", "medians": {"ours": 0.0}, "ratios": {}, "ratio_to_best_peer": None,
        "rounds": [{"ours": {"refused": "1.9 GB are missing"}}],
    }  # fmt: skip
    text = table.markdown([measured, refused], facts.facts())
    assert (
        "| train gpt2 | 100,000 real tokens/s | TRL: 20,000 (sdpa)<br>TRL, whole: out of memory | **5.00x** | 45.1% "
        "| 20.0 GB, 21.0 GB (+5%) |" in text
    )
    assert "| train 7b | not tried: 1.9 GB are missing |" in text


@pytest.mark.parametrize("case", EVERY_CASE, ids=lambda case: f"{case.name}-{case.accumulation}")
def test_a_case_survives_the_command_line(case: cases.Case) -> None:
    assert cases.parse(case.flags()) == case


@pytest.mark.parametrize("part", run.PARTS)
def test_every_contender_is_a_module_that_is_there(part: str) -> None:
    for tiny in (False, True):
        works = []
        for comparison in run.comparisons(part, tiny):
            works.append(comparison.work)
            for contender in comparison.contenders:
                assert importlib.util.find_spec(contender.command[2])
        assert works and len(set(works)) == len(works)


def test_of_7b_on_one_h200_stage_3_fits_and_stage_1_does_not() -> None:
    from trainer.planning import accelerators, memory, plan, workload
    from trainer.settings import PlanSettings

    every = [*cases.training(False), *cases.memory(False)]
    found = {case.stage: case for case in every if case.shape == "llama-2-7b" and not case.checkpointing}
    fits, trace = {}, None
    for stage, case in found.items():
        settings = PlanSettings(
            config_name=case.shape, config_overrides=f"vocab_size={cases.VOCABULARY}", bf16=True, gpu="h200",
            deepspeed=str(REPOSITORY / f"ds_configs/zero{stage}.json"), max_steps=1,
            per_device_train_batch_size=case.packs, gradient_accumulation_steps=case.accumulation,
        )  # fmt: skip
        work = workload.estimate_workload(settings, 1)
        trace = trace or memory.trace_micro_batch(work, bf16=True, checkpointing=False, cuda=True)
        hardware = accelerators.find_hardware(settings)
        planned = plan.plan_with_trace(settings, hardware, work, trace, process_bytes=0)
        fits[stage] = planned.fits
    assert fits == {3: True, 1: False}


def test_the_list_of_packages_is_complete() -> None:
    """gpu.sh brings pinned packages and all that they need, except what a CUDA image of torch has."""
    text = SCRIPT.read_text(encoding="utf-8")
    needed = {canonical(name) for name in re.search(r"NEEDED=\((.*?)\)", text, re.DOTALL)[1].split()}  # type: ignore[index]
    pinned = {canonical(line.split("==")[0]) for line in lines(REPOSITORY / "constraints.txt")}
    assert needed <= pinned
    image = re.search(r"^IMAGE='(.*)'$", text, re.MULTILINE)[1]  # type: ignore[index]
    for name in needed - {"mpi4py"}:
        for requirement in map(Requirement, metadata.requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                inside = re.match(image, f"{requirement.name.lower()}==1")
                assert inside or canonical(requirement.name) in needed, f"{name} needs {requirement}"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if "==" in line]


def test_the_script_explains_itself() -> None:
    done = subprocess.run([SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2
    for word in ("wheels", "--tiny", "75", *run.PARTS, "study"):
        assert word in done.stdout


def test_the_scaling_study_spans_the_sizes_and_leaves_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    content = yaml.safe_load(study.STUDY.read_text(encoding="utf-8"))
    found = load_study(content, study.STUDY)
    tokenizer = load_tokenizer("stories")
    from trainer.models.load import num_parameters

    counts = [
        num_parameters(presets.student_config(f"stories-{name}", len(tokenizer)))
        for name in reversed(content["models"])
    ]
    assert len(counts) >= 5 and counts == sorted(counts)
    assert 0.5e6 < counts[0] < 2e6 and 250e6 < counts[-1] < 350e6
    for name, count in zip(reversed(content["models"]), counts, strict=True):
        assert 0.8 < count / (float(name.removesuffix("m")) * 1e6) < 1.25
    assert {run.name.split(".")[1] for run in found.runs if run.evaluations} == {
        "answer_only", "cot", "socratic", "iterative_interleaved",
    }  # fmt: skip
    longest, written = 0, 0
    for problem in stories.generate_problems("test", seed=1, num_problems=150, min_steps=8, max_steps=8):
        steps = "".join(f"{step.question}\n{step.solution}\n" for step in problem.steps)
        solution = len(tokenizer(f"{steps}#### {problem.answer}")["input_ids"])
        longest = max(longest, solution + len(tokenizer(problem.question)["input_ids"]))
        written = max(written, solution)
    assert longest < content["train"]["pack_length"]
    assert written < 0.9 * content["evaluate"]["max_new_tokens"]


def test_the_tiny_study_is_the_study_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "MATERIALS", tmp_path)
    monkeypatch.chdir(REPOSITORY)
    path = study.tiny_study()
    found = load_study(yaml.safe_load(path.read_text(encoding="utf-8")), path)
    assert found.name == path.stem and len(found.runs) == 4
    assert all(run.train.max_steps == 4 for run in found.runs if run.train)
    assert all(str(run.directory.path).startswith(str(tmp_path)) for run in found.runs)
