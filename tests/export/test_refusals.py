"""Invalid checkpoints are rejected with a message that names the file; existing files are kept."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.export.conftest import REPOSITORY, rewrite_manifest
from trainer.errors import UserError
from trainer.export.convert import convert, parse_size
from trainer.settings import ConvertSettings
from trainer.storage import atomic_dir

Copy = Callable[[str], Path]
ZERO1 = "gpt2-zero1-fp32-2ranks"
ZERO3 = "gpt2-zero3-bf16-2ranks"
RANK_1 = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def check_rejected(checkpoint: Path, pattern: str, **settings: Any) -> str:
    with pytest.raises(UserError, match=pattern) as error:
        convert(ConvertSettings(str(checkpoint), **settings))
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    assert not (run / "export").exists()
    assert not list(run.glob(".export*"))
    return str(error.value)


def test_unfinished_checkpoint(checkpoint_copy: Copy) -> None:
    checkpoint = checkpoint_copy(ZERO1)
    (checkpoint / atomic_dir.MANIFEST).unlink()
    check_rejected(checkpoint, "is not finished")
    check_rejected(checkpoint.parent.parent, "holds no finished checkpoint")


@pytest.mark.parametrize("name", [ZERO1, ZERO3])
def test_missing_rank_file_is_named(name: str, checkpoint_copy: Copy) -> None:
    checkpoint = checkpoint_copy(name)
    (file,) = checkpoint.glob("*zero_pp_rank_1_mp_rank_00_optim_states.pt")
    file.unlink()
    check_rejected(checkpoint, f"{file.name} is missing although the manifest lists it")
    rewrite_manifest(checkpoint)
    check_rejected(checkpoint, f"{file.name} is missing; the manifest says ZeRO stage . on 2 ranks")


def test_world_size_other_than_the_manifests(checkpoint_copy: Copy) -> None:
    checkpoint = checkpoint_copy(ZERO1)
    rewrite_manifest(checkpoint, world_size=1)
    check_rejected(
        checkpoint, f"{RANK_1} does not belong to this checkpoint: the manifest says ZeRO stage 1 on 1 rank"
    )
    (checkpoint / RANK_1).unlink()
    rewrite_manifest(checkpoint)
    check_rejected(checkpoint, "model_states.pt was written by 2 ranks, but the manifest says 1")


def test_stage_other_than_the_manifests(checkpoint_copy: Copy) -> None:
    checkpoint = checkpoint_copy(ZERO1)
    rewrite_manifest(checkpoint, zero_stage=3)
    check_rejected(checkpoint, "zero_pp_rank_0_mp_rank_00_model_states.pt is missing")


def test_flipped_bytes_in_the_weights_of_any_rank(checkpoint_copy: Copy) -> None:
    checkpoint = checkpoint_copy(ZERO1)
    file = checkpoint / RANK_1
    content = torch.load(file, weights_only=False)  # our own file
    (partition,) = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    data = bytearray(file.read_bytes())
    position = data.index(partition.detach().numpy().tobytes()) + partition.nbytes // 2
    data[position] ^= 0x10
    file.write_bytes(data)
    check_rejected(checkpoint, f"{RANK_1} is corrupt: the checksum of .* differs")


def test_flipped_byte_in_the_description(checkpoint_copy: Copy) -> None:
    checkpoint = checkpoint_copy(ZERO1)
    file = checkpoint / "mp_rank_00_model_states.pt"
    data = bytearray(file.read_bytes())
    data[data.index(b"transformer.h.0.ln_1.weight") + 3] ^= 0x01
    file.write_bytes(data)
    check_rejected(checkpoint, f"{file.name} is corrupt")


def test_truncated_file(checkpoint_copy: Copy) -> None:
    checkpoint = checkpoint_copy(ZERO3)
    (file,) = checkpoint.glob("*pp_rank_0_*optim_states.pt")
    os.truncate(file, file.stat().st_size - 1000)
    check_rejected(checkpoint, f"{file.name} has .* bytes, the manifest says")
    rewrite_manifest(checkpoint)
    check_rejected(checkpoint, f"{file.name} is corrupt or not a torch file")


def test_verify_also_checks_digests_of_optimizer_states(checkpoint_copy: Copy) -> None:
    checkpoint = checkpoint_copy(ZERO1)
    file = checkpoint / RANK_1
    content = torch.load(file, weights_only=False)
    moments = content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg_sq"]
    data = bytearray(file.read_bytes())
    data[data.index(moments.numpy().tobytes()) + 100] ^= 0x01
    file.write_bytes(data)
    check_rejected(checkpoint, f"{RANK_1} is corrupt", verify=True)
    convert(ConvertSettings(str(checkpoint)))  # the moments of Adam are not part of the model


class _MaliciousObject:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", RANK_1])
def test_malicious_pickle_is_rejected_and_not_executed(
    name: str, checkpoint_copy: Copy, tmp_path: Path
) -> None:
    checkpoint = checkpoint_copy(ZERO1)
    marker = tmp_path / "executed"
    content = torch.load(checkpoint / name, weights_only=False)
    content["lr_scheduler"] = _MaliciousObject(f"touch {marker}")
    torch.save(content, checkpoint / name)
    rewrite_manifest(checkpoint)
    message = check_rejected(checkpoint, "is refused: it asks for (posix|nt).system")
    assert name in message and not marker.exists()
    torch.load(checkpoint / name, weights_only=False)  # the attack works with an unrestricted load
    assert marker.exists()


def test_malicious_bare_pickle_is_rejected(checkpoint_copy: Copy, tmp_path: Path) -> None:
    checkpoint = checkpoint_copy(ZERO1)
    marker = tmp_path / "executed"
    (checkpoint / RANK_1).write_bytes(pickle.dumps(_MaliciousObject(f"touch {marker}")))
    rewrite_manifest(checkpoint)
    check_rejected(checkpoint, f"{RANK_1} is corrupt or not a torch file")
    assert not marker.exists()


def test_compressed_zip_entry_is_rejected(checkpoint_copy: Copy, tmp_path: Path) -> None:
    checkpoint = checkpoint_copy(ZERO1)
    with (
        zipfile.ZipFile(checkpoint / RANK_1) as old,
        zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    shutil.move(tmp_path / "packed", checkpoint / RANK_1)
    rewrite_manifest(checkpoint)
    check_rejected(checkpoint, RANK_1)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"n_layer": 3}, "has no parameter transformer.h.2.ln_1.weight"),
        ({"n_layer": 1}, "holds transformer.h.1.ln_1.weight, but the GPT2LMHeadModel"),
        (
            {"n_positions": 17},
            r"transformer.wpe.weight has shape \(16, 12\), but .*config.json makes it \(17, 12\)",
        ),
        ({"model_type": "no-such-model"}, "transformers cannot build this model"),
    ],
)
def test_checkpoint_that_does_not_fit_its_config(change: dict, pattern: str, checkpoint_copy: Copy) -> None:
    checkpoint = checkpoint_copy(ZERO3)
    path = checkpoint / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    check_rejected(checkpoint, "config.json has .* bytes, the manifest says")
    rewrite_manifest(checkpoint)
    check_rejected(checkpoint, pattern)


def test_weights_that_config_ties_but_training_did_not(checkpoint_copy: Copy) -> None:
    checkpoint = checkpoint_copy("qwen2-zero3-fp32-2ranks")
    path = checkpoint / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    rewrite_manifest(checkpoint)
    check_rejected(checkpoint, "lm_head.weight was trained apart from the weight that .* ties it to")


def test_weights_tied_in_training_but_not_in_config_are_written_twice(checkpoint_copy: Copy) -> None:
    from safetensors.torch import load_file

    checkpoint = checkpoint_copy(ZERO1)
    path = checkpoint / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    rewrite_manifest(checkpoint)
    weights = load_file(convert(ConvertSettings(str(checkpoint), verify=True)) / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"])


def test_existing_exports(checkpoint_copy: Copy, capsys: pytest.CaptureFixture) -> None:
    checkpoint = checkpoint_copy(ZERO1)
    settings = ConvertSettings(str(checkpoint.parent.parent))
    export = convert(settings)
    before = {path: path.stat().st_mtime_ns for path in export.iterdir()}
    assert convert(settings) == export and "already exported" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in export.iterdir()} == before
    with pytest.raises(UserError, match="another export_dtype; --overwrite replaces"):
        convert(ConvertSettings(str(checkpoint), dtype="bf16"))
    rewrite_manifest(checkpoint, step=3)
    with pytest.raises(UserError, match="another checkpoint_digest; --overwrite replaces"):
        convert(settings)
    convert(ConvertSettings(str(checkpoint), dtype="bf16", overwrite=True))
    assert atomic_dir.read_manifest(export)["facts"]["step"] == 3
    assert json.loads((export / "config.json").read_text())["dtype"] == "bfloat16"
    atomic_dir.verify_digests(export)
    os.truncate(export / "model.safetensors", 100)
    with pytest.raises(UserError, match=r"has 100 bytes.*--overwrite to write the export again"):
        convert(ConvertSettings(str(checkpoint), dtype="bf16"))
    assert [path.name for path in export.parent.iterdir() if path.name.startswith(".")] == []


def test_other_folder_is_never_overwritten(checkpoint_copy: Copy, tmp_path: Path) -> None:
    checkpoint = checkpoint_copy(ZERO1)
    other_file = tmp_path / "other" / "thesis.tex"
    other_file.parent.mkdir()
    other_file.write_text("chapter 1")
    for overwrite in (False, True):
        check_rejected(checkpoint, "is not an export", output_dir=str(other_file.parent), overwrite=overwrite)
    assert other_file.read_text() == "chapter 1"


def test_newest_valid_checkpoint_of_a_run(checkpoint_copy: Copy, capsys: pytest.CaptureFixture) -> None:
    old = checkpoint_copy(ZERO1)
    newer = old.with_name("step-000010")
    shutil.copytree(old, newer)
    unfinished = old.with_name("step-000011")
    unfinished.mkdir()
    run = old.parent.parent
    export = convert(ConvertSettings(str(run)))
    assert atomic_dir.read_manifest(export)["facts"]["checkpoint"] == str(newer)
    os.truncate(newer / RANK_1, 10)
    convert(ConvertSettings(str(run), overwrite=True))
    assert atomic_dir.read_manifest(export)["facts"]["checkpoint"] == str(old)
    assert "trying the checkpoint before it" in capsys.readouterr().out


def test_dry_run_writes_nothing(checkpoint_copy: Copy, capsys: pytest.CaptureFixture) -> None:
    checkpoint = checkpoint_copy(ZERO3)
    convert(ConvertSettings(str(checkpoint), dry_run=True, dtype="fp32"))
    shown = capsys.readouterr().out
    assert "model.safetensors, 28 tensors" in shown and "are free there" in shown
    assert [path.name for path in checkpoint.parent.parent.iterdir()] == ["checkpoints"]


def test_checkpoint_outside_a_run_needs_an_output_dir(checkpoint_copy: Copy, tmp_path: Path) -> None:
    alone = checkpoint_copy(ZERO1).rename(tmp_path / "alone")
    with pytest.raises(UserError, match="give output_dir"):
        convert(ConvertSettings(str(alone)))
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        atomic_dir.verify_digests(convert(ConvertSettings(str(alone), str(tmp_path / name))))


def test_full_disk_is_detected_before_writing(tmp_path: Path) -> None:
    from trainer.export.convert import _check_disk
    from trainer.export.safetensors_writer import OutputShard

    with pytest.raises(UserError, match=r"\d+ bytes are missing"):
        header = range(shutil.disk_usage(tmp_path).free + (1 << 40))
        _check_disk(tmp_path / "not" / "there" / "yet", [OutputShard("model.safetensors", (), header)])


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5KB", 1500), ("7B", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "0GB", "-1GB", "5GiB", "nanGB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UserError, match="max_shard_size"):
        parse_size(text)


def test_killed_converter_leaves_nothing_visible(checkpoint_copy: Copy) -> None:
    checkpoint = checkpoint_copy(ZERO1)
    run = checkpoint.parent.parent
    command = [sys.executable, str(REPOSITORY / "tools" / "convert_checkpoint.py"), str(run)]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    try:
        while not (staged := list(run.glob(".export.*.tmp"))):  # it exists while transformers is imported
            assert process.poll() is None
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert staged[0].is_dir() and not (run / "export").exists()
    atomic_dir.verify_digests(convert(ConvertSettings(str(run))))


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Exporting 400 MB of weights needs less than 128 MB; measured in a separate process."""
    file = tmp_path / "mp_rank_00_model_states.pt"
    module = {f"layer.{number}.weight": torch.randn(10_000_000) for number in range(10)}
    torch.save({"module": module, "buffer_names": [], "optimizer": None, "dp_world_size": 1}, file)
    del module
    code = """
import resource, sys, torch
from pathlib import Path
from trainer.export import safetensors_writer
from trainer.zero import layout
from trainer.zero.checksum_reader import ChecksumReader
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
folder = Path(sys.argv[1])
torch.zeros(10).to(torch.bfloat16)
before = peak()
stored = layout.locate_weights(layout.open_files(folder, 0, 1, "fp32"))
for dtype in (torch.float32, torch.bfloat16):
    (shard,) = safetensors_writer.split_into_shards(stored.tensors, dtype, 10**10, {})
    with ChecksumReader() as reader:
        files = safetensors_writer.write(shard, folder / f"{dtype}", reader, lambda num_bytes: None)
        reader.verify_checksums()
    assert (folder / f"{dtype}").stat().st_size == files["bytes"] == shard.num_bytes
print((peak() - before) // 10**6)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(result.stdout) < 128
    file.unlink()
