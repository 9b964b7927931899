"Checkpoints under damage and a full disk; about 10 s of processor time"
import os
import shutil
from collections import namedtuple

import pytest

import exact
from finetune_nb import checkpoint
from finetune_nb.checkpoint import MANIFEST, MARK, damage, found, newest
from finetune_nb.core import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
HARM = {"missing": None, "half": lambda b: b[:len(b) // 2], "zeroed": lambda b: bytes(len(b)), "flipped": lambda b: b[:len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1:]}
FILES = ("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "progress_0.json", MANIFEST, MARK)


@pytest.fixture(scope="module")
def saved(tiny_model, tiny_rows, tmp_path_factory):
    place = tmp_path_factory.mktemp("saved")
    exact.run(exact.BASE | exact.METHODS["lora"] | exact.PASSES[1] | dict(save_steps=2, max_steps=4), tiny_model, tiny_rows, place)
    return place / "checkpoints"


@pytest.mark.parametrize("how", HARM)
@pytest.mark.parametrize("name", FILES)
def test_harm_is_seen_and_the_older_one_taken(name, how, saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    harmed = tmp_path / "checkpoint-4" / name
    if HARM[how]: harmed.write_bytes(HARM[how](harmed.read_bytes()))
    else: harmed.unlink()
    path, skipped = newest(tmp_path)
    assert path.name == "checkpoint-2" and [p.name for p, _ in skipped] == ["checkpoint-4"] and skipped[0][1]
    if name not in (MANIFEST, MARK): assert name in skipped[0][1]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin", "sub/adapter_model.safetensors"])
def test_a_file_put_in_is_seen(name, saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-4" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "checkpoint-4" / name).write_bytes(b"\x80\x04")
    assert name in damage(tmp_path / "checkpoint-4") and newest(tmp_path)[0].name == "checkpoint-2"


def train(run, model, rows, **more): return exact.run(exact.BASE | exact.METHODS["lora"] | exact.PASSES[1] | dict(save_steps=1, max_steps=6), model, rows, run, **more)


def fails_from(step, times):
    "Saving fails in the middle of the optimizer's file, so many times"
    def change(trainer):
        inner, left = trainer._save_optimizer_and_scheduler, [times]
        def broken(output_dir):
            if trainer.state.global_step >= step and left[0]:
                left[0] -= 1
                (exact.Path(output_dir) / "optimizer.pt").write_bytes(b"half")
                raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 4 vs 0")
            inner(output_dir)
        trainer._save_optimizer_and_scheduler = broken
    return change


def test_one_failed_save_is_told_and_changes_nothing(tiny_model, tiny_rows, tmp_path):
    said = []
    train(tmp_path / "straight", tiny_model, tiny_rows)
    train(tmp_path / "full", tiny_model, tiny_rows, change=fails_from(3, 1), say=said.append)
    assert any("step 3 was not saved" in s for s in said) and exact.same(tmp_path / "straight", tmp_path / "full") == []
    assert [s for s, p in found(tmp_path / "full" / "checkpoints") if not damage(p)] == [6, 5]


def test_two_failed_saves_stop_and_the_last_two_stay(tiny_model, tiny_rows, tmp_path):
    with pytest.raises(UserError, match="took no checkpoint twice in a row"): train(tmp_path / "full", tiny_model, tiny_rows, change=fails_from(4, 9))
    place = tmp_path / "full" / "checkpoints"
    assert [s for s, p in found(place) if not damage(p)] == [3, 2] and not (place / "partial").exists()
    train(tmp_path / "straight", tiny_model, tiny_rows)
    train(tmp_path / "full", tiny_model, tiny_rows, resume=True)
    assert exact.same(tmp_path / "straight", tmp_path / "full") == []


def test_room_is_looked_for_before_anything_is_written(tiny_model, tiny_rows, tmp_path, monkeypatch):
    said, usage = [], namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: usage(1 << 30, 1 << 30, 4096))
    with pytest.raises(UserError, match="4.0 KiB free and a checkpoint takes about"): train(tmp_path / "full", tiny_model, tiny_rows, say=said.append)
    assert any("step 1 was not saved: the disk has 4.0 KiB free" in s for s in said) and not found(tmp_path / "full" / "checkpoints")


def test_what_is_not_the_disks_fault_is_not_swallowed(tiny_model, tiny_rows, tmp_path):
    def change(trainer): trainer._save_scaler = lambda output_dir: 1 / 0
    with pytest.raises(ZeroDivisionError): train(tmp_path / "run", tiny_model, tiny_rows, change=change)
