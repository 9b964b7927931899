"A training that was stopped and gone on with ends with the bits and the curve of one that was not; about 60 s of processor time"
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import exact
from finetune_nb.checkpoint import MARK, about, damage, found
from finetune_nb.core import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
COVERING = exact.pairs()


@pytest.fixture
def run(tiny_model, tiny_rows, tmp_path): return lambda name, resume=False, stop=0, override=(), change=None, dropout=0.0, say=lambda line: None, **values: exact.run(exact.BASE | exact.METHODS["lora"] | exact.PASSES[1] | values, tiny_model, tiny_rows, tmp_path / name, resume, stop, override, change, dropout=dropout, say=say)


def test_every_pair_of_settings_meets():
    met = {(a, c[a], b, c[b]) for c in COVERING for a in exact.AXES for b in exact.AXES if a < b}
    assert len(met) == sum(len(exact.AXES[a]) * len(exact.AXES[b]) for a in exact.AXES for b in exact.AXES if a < b) and len(COVERING) < 16


@pytest.mark.parametrize("c", COVERING, ids=lambda c: "-".join(map(str, c.values())))
def test_gone_on_with_is_as_if_never_stopped(c, tiny_model, tiny_rows, tmp_path):
    assert exact.interrupted_equals_straight(c, tiny_model, tiny_rows, tmp_path) == []


def test_frozen_layers_are_stored_in_another_order(run, tmp_path):
    "a run that goes on in the middle of the first pass stores other rows first; which are computed together stays"
    together = []
    def watched(trainer):
        inner = trainer.stored.compute
        trainer.stored.compute = lambda numbers: together.append(tuple(numbers)) or inner(numbers)
    settings = dict(max_rows=0, lora_dropout=0.0, lora_layers=2, save_steps=0, eval_steps=3, epochs=2.0, fast_path=True, change=watched)
    whole = run("straight", **settings)
    straight = list(together)
    assert whole.stored.keys() == set(range(len(whole.train_dataset) + len(whole.eval_dataset))) and len(straight) == 3
    for step in (8, 10): run("broken", resume=step > 8, stop=step, **settings)
    together.clear()
    last = run("broken", resume=True, **settings)
    assert together != straight and sorted(together) == sorted(straight)
    assert exact.same(tmp_path / "straight", tmp_path / "broken") == []
    assert all(torch.equal(v, last.stored[i]) for i, v in whole.stored.items())


def test_stopped_again_and_again_with_the_best_at_the_end(run, tmp_path):
    "the held-out loss is made to rise, so that the first checkpoint is the best"
    def rising(trainer):
        inner = trainer.compute_loss
        trainer.compute_loss = lambda model, *a, **k: inner(model, *a, **k) * (1 if model.training else 1 + trainer.state.global_step)
    settings = dict(lora_dropout=0.1, best_at_end=True, eval_steps=1, save_steps=1, keep_checkpoints=1, change=rising)
    trainer = run("straight", **settings)
    for step in (1, 2, 4, 7): run("broken", resume=step > 1, stop=step, **settings)
    run("broken", resume=True, **settings)
    assert exact.same(tmp_path / "straight", tmp_path / "broken") == []
    place, last = tmp_path / "broken" / "checkpoints", trainer.state.max_steps
    assert [s for s, p in found(place) if not damage(p)] == [last, last - 1, 1], "the newest two and the best are kept, whatever keep_checkpoints says"
    assert exact.weights(tmp_path / "broken")["adapter_model.safetensors"] == (place / "checkpoint-1" / "adapter_model.safetensors").read_bytes()


def test_killed_after_the_last_step_only_saves(run, tmp_path):
    "all steps done, the last checkpoint there, the adapter not: not one step more is trained"
    run("straight", max_steps=6)
    os.rename(tmp_path / "straight", tmp_path / "broken")
    run("straight", max_steps=6)
    for p in (tmp_path / "broken" / "adapter").iterdir(): p.unlink()
    trainer = run("broken", resume=True, max_steps=6)
    assert trainer.state.global_step == 6 and exact.same(tmp_path / "straight", tmp_path / "broken") == []


def test_other_data_settings_and_worlds_are_refused_by_name(run, tiny_rows, tmp_path):
    run("broken", stop=3)
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(Path(tiny_rows).read_text().splitlines(keepends=True)[1:]))
    for changes, names in ((dict(learning_rate=1e-3), ["learning_rate"]), (dict(data=str(fewer)), ["rows", "held_rows"]), (dict(packing=True), ["rows", "held_rows", "packing"]), (dict(lora_r=8), ["lora_r"]), (dict(seed=1), ["seed"])):
        with pytest.raises(UserError) as e: run("broken", resume=True, **changes)
        assert set(names) <= {p.place for p in e.value.problems} and all(p.fix for p in e.value.problems), e.value
    with pytest.raises(UserError, match="names nothing that can be allowed"): run("broken", resume=True, lora_r=8, override=["lora_r"])
    trainer = run("broken", resume=True, learning_rate=1e-3, override=["learning_rate"])
    rates = [l["learning_rate"] for l in trainer.state.log_history if "learning_rate" in l and l["step"] > 3]
    assert max(rates) < 1.1e-3, "the learning rate that was allowed is not the one that was used"


def test_a_checkpoint_is_everything_and_no_pickle_of_arguments(run, tmp_path):
    run("run", stop=3)
    path = tmp_path / "run" / "checkpoints" / "checkpoint-3"
    names = {p.name for p in path.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "progress_0.json", "metrics.jsonl", "manifest.json", MARK} <= names and "training_args.bin" not in names
    facts = about(path)["facts"]
    assert len(facts["must"]["rows"]) == len(facts["must"]["base"]) == 64 and facts["must"]["world"] == 1 and facts["may"]["torch"] and facts["fixed"]["method"] == "lora"


def test_an_older_one_is_taken_and_told(run, tmp_path):
    said = []
    run("straight", save_steps=2)
    run("broken", stop=5, save_steps=2)
    newest = tmp_path / "broken" / "checkpoints" / "checkpoint-5"
    (newest / "optimizer.pt").write_bytes(b"")
    run("broken", resume=True, save_steps=2, say=said.append)
    assert any("checkpoint-5 is skipped: optimizer.pt has 0 of" in s for s in said) and any("going on from checkpoint-4" in s for s in said)
    assert exact.same(tmp_path / "straight", tmp_path / "broken") == []


def test_nothing_that_verifies_is_not_a_silent_start(run, tmp_path):
    run("broken", stop=2)
    (tmp_path / "broken" / "checkpoints" / "checkpoint-2" / "scheduler.pt").unlink()
    with pytest.raises(UserError, match="override start"): run("broken", resume=True)
    run("straight")
    run("broken", resume=True, override=["start"])
    assert exact.same(tmp_path / "straight", tmp_path / "broken") == []


def test_transformers_itself_can_go_on_from_it(run, tmp_path):
    from transformers.trainer_utils import get_last_checkpoint
    trainer = run("run", save_steps=2)
    last = get_last_checkpoint(trainer.args.output_dir)
    assert Path(last).name == f"checkpoint-{trainer.state.max_steps}" and json.loads((Path(last) / "trainer_state.json").read_text())["global_step"] == trainer.state.max_steps


STOPPED = """
import sys; sys.path.insert(0, sys.argv[4])
import torch; torch.set_num_threads(1)
import exact
values = exact.BASE | exact.METHODS["lora"] | exact.PASSES[1] | dict(epochs=500.0, save_steps=0, eval_steps=0, log_steps=1)
try: exact.run(values, *sys.argv[1:4], say=lambda line: print(line, flush=True))
except KeyboardInterrupt as e: print("interrupted", e, flush=True); sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_leaves_a_checkpoint(number, tiny_model, tiny_rows, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", STOPPED, tiny_model, tiny_rows, tmp_path / "run", Path(__file__).parent], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if line.startswith("train "): break
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    path, = [p for _, p in found(tmp_path / "run" / "checkpoints")]
    assert process.returncode == 130 and f"{number.name}: stopping after this step" in out and f"{path.name} is saved: resume the run" in out, out[-2000:] + err[-2000:]
    assert not damage(path) and not (tmp_path / "run" / "adapter").exists()
