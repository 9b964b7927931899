"A rehearsal changes nothing but the number of rows at once, and that only when memory runs out"
import json
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from conftest import losses, saved_weights, write_rows
from finetune_nb import job, train
from finetune_nb.core import UserError
from finetune_nb.frozen import seconds_left
from finetune_nb.hardware import machine
from finetune_nb.models import load_tokenizer
from finetune_nb.past import past_error, past_rehearsals
from finetune_nb.recipe import make
from finetune_nb.rehearse import rehearse
from test_shortcuts import many_rows
from test_time_cost import shapes_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def built(tiny_model, tiny_rows, tmp_path, monkeypatch):
    "(trainer, recipe, folder) of a short run on the tiny model, with a cache of its own"
    monkeypatch.setenv("FINETUNE_NB_CACHE", str(tmp_path / "cache"))
    def make_one(folder="run", **changes):
        base = dict(model=tiny_model, data=tiny_rows, max_steps=4, batch_size=4, accumulation=1, learning_rate=1e-2, dtype="float32", threads=1, log_steps=1, eval_steps=2, save_steps=0, best_at_end=False,
                    lora_r=4, lora_alpha=8, lora_dropout=0.1, gradient_checkpointing=False, packing=False, compare=False, warmup=0.25, eval_fraction=0.2, tracker="none")
        recipe = make("stock", **base | changes)
        _, choices = job.check(recipe, say=lambda line: None)
        rows, held = job.rows(recipe)
        return train.build(recipe, choices, job.model(recipe, choices), load_tokenizer(recipe.model), rows.rows, held.rows, tmp_path / folder, say=lambda line: None), recipe, tmp_path / folder
    return make_one


def quiet(line): pass


def only(rows):
    "A layer's hook that stands in for a card which holds only so many rows"
    def hook(module, args, kwargs):
        if len(kwargs["input_ids"]) > rows: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.56 GiB")
    return lambda trainer: trainer.model.get_base_model().model.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("change", [dict(fast_path=False), dict(lora_dropout=0.0, lora_layers=2), dict(method="full", learning_rate=1e-3), dict(accumulation=2, batch_size=2, group_by_length=True, save_steps=2, best_at_end=True),
                                    dict(method="qlora", max_steps=2, eval_steps=0), dict(method="qlora", quantization="int8", max_steps=2, eval_steps=0), dict(dtype="bfloat16", max_steps=2)],
                         ids=["stock", "shortcuts", "full", "accumulation, best at end", "nf4", "int8", "bfloat16"])
def test_same_bits_with_and_without(built, change):
    results = []
    for name in ("with", "without"):
        trainer, recipe, folder = built(name, **change)
        if name == "with":
            before = sorted(p.name for p in folder.rglob("*"))
            r = rehearse(trainer, recipe, say=quiet, least=0)
            assert 5 <= len(r.step_seconds) <= 20 and r.notes == []
            assert sorted(p.name for p in folder.rglob("*")) == before, "the rehearsal left files in the run folder"
        train.fit(trainer, recipe, folder, say=quiet)
        results.append((losses(trainer), trainer._total_train_tokens, saved_weights(folder / "adapter"), [json.loads(l)["step"] for l in open(folder / "metrics.jsonl")]))
    (first, tokens, weights, logged), (second, tokens2, weights2, logged2) = results
    assert (first, tokens, logged) == (second, tokens2, logged2)
    assert weights.keys() == weights2.keys() and all(torch.equal(v, weights2[k]) for k, v in weights.items())


def test_storing_is_outside_of_the_steps_and_part_of_the_estimate(built, tmp_path):
    "what it stored is whole groups, kept for the run, or rows that are forgotten"
    trainer, recipe, _ = built(lora_dropout=0.0, lora_layers=2, max_steps=40, batch_size=2, eval_steps=2, eval_batch_size=2, data=str(write_rows(tmp_path / "many.jsonl", many_rows(160))))
    frozen, inner = trainer.stored, trainer.stored.compute
    def slow(numbers):
        time.sleep(0.2)
        found = inner(numbers)
        frozen.seconds += 1e4
        return found
    frozen.compute = slow
    r = rehearse(trainer, recipe, say=quiet, least=0)
    assert max(r.step_seconds[1:]) < 0.2 and r.eval_seconds < 0.2, "storing was counted as part of a step"
    assert trainer.stored is frozen and frozen, "what the rehearsal stored of whole groups is of use to the run"
    assert all(set(g) <= frozen.keys() or not set(g) & frozen.keys() for g in (*frozen.training, *frozen.held))
    left = seconds_left(frozen, 80, True)
    assert left > 1e4 and left == pytest.approx(r.estimate.seconds, rel=1e-2), "storing that is still to come belongs to the time of the run"


def test_out_of_memory_halves_the_rows_at_once_and_keeps_the_step(built):
    said, results = [], []
    for rows in (2, 100):
        trainer, recipe, folder = built(f"only-{rows}", fast_path=False, lora_dropout=0.0, batch_size=8, max_steps=2, eval_batch_size=4)
        hook = only(rows)(trainer)
        r = rehearse(trainer, recipe, say=said.append, least=0)
        if rows == 2:
            assert (r.asked, r.batch_size, r.accumulation, r.eval_batch_size) == ((8, 1), 2, 4, 2)
            assert (trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps, trainer.args.per_device_eval_batch_size) == (2, 4, 2)
            assert sum("a step still sees 8 rows" in s for s in said) == 2 and "4 held-out rows at once become 2" in " ".join(r.notes)
        train.fit(trainer, recipe, folder, say=quiet)
        hook.remove()
        results.append((losses(trainer), trainer.state.global_step, trainer._total_train_tokens))
    (halved, steps, tokens), (whole, steps2, tokens2) = results
    assert (steps, tokens) == (steps2, tokens2)
    assert halved == pytest.approx(whole, rel=1e-4)


def test_one_row_that_does_not_fit_ends_with_advice(built):
    trainer, recipe, _ = built(fast_path=False)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    hook = only(0)(trainer)
    with pytest.raises(UserError, match="does not hold one row of .* tokens.*(gradient_checkpointing|max_length)"): rehearse(trainer, recipe, say=quiet, least=0)
    hook.remove()
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters()) and trainer.optimizer is None
    assert past_rehearsals() == []


def test_other_failures_are_not_taken_for_memory(built):
    trainer, recipe, _ = built(fast_path=False)
    def broken(*args, **kwargs): raise RuntimeError("shape mismatch")
    trainer.compute_loss = broken
    with pytest.raises(RuntimeError, match="shape mismatch"): rehearse(trainer, recipe, say=quiet, least=0)


def test_ctrl_c_leaves_no_trace(built):
    trainer, recipe, folder = built(fast_path=False)
    before, files = {n: p.clone() for n, p in trainer.model.named_parameters()}, sorted(folder.rglob("*"))
    calls = []
    def late(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
        return type(trainer).compute_loss(trainer, *args, **kwargs)
    trainer.compute_loss = late
    with pytest.raises(KeyboardInterrupt): rehearse(trainer, recipe, say=quiet, least=0)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in trainer.model.named_parameters())
    assert sorted(folder.rglob("*")) == files and trainer.args.max_steps == 4


def test_short_runs_are_not_rehearsed(built):
    trainer, recipe, _ = built(fast_path=False)
    said = []
    assert rehearse(trainer, recipe, say=said.append) is None and "fewer than 15 steps" in said[0]


@dataclass
class Settings:
    "What a rehearsal reads of memory.Setup"
    method: str = "lora"
    rank: int = 4
    target_modules: tuple = ()
    adapted_layers: int = 0
    checkpointing: str = "none"
    device: str = "cpu"
    batch: int = 99
    length: int = 9999
    padded: bool = False


def test_predicted_against_measured_is_kept(built, monkeypatch):
    "With a planner that always says 3 GB, the list holds its error"
    trainer, recipe, _ = built(fast_path=False)
    asked, says = [], SimpleNamespace(low=2e9, expected=3e9, high=4e9)
    planner = SimpleNamespace(setup=lambda recipe, machine, shapes: Settings(), plan=lambda shapes, setup, card=None: asked.append(setup) or SimpleNamespace(ram=says))
    monkeypatch.setitem(sys.modules, "finetune_nb.memory", planner)
    r = rehearse(trainer, recipe, shapes_of(trainer.model.get_base_model()), machine(), say=quiet, least=0)
    assert (asked[0].batch, asked[0].length, asked[0].padded) == (4, r.longest, True), "the prediction is for the step that was rehearsed"
    error = 3e9 / r.peak["ram"] - 1
    assert past_error()["ram"] == dict(count=1, middle=pytest.approx(error), worst=pytest.approx(error))
    assert r.estimate.flops > 0 and r.to_json()["errors"]["ram"] == pytest.approx(error)


@pytest.mark.parametrize("name", ["t4", "a100 80gb"])
def test_advice_names_a_change_even_where_the_plan_said_that_it_fits(name):
    from finetune_nb.cards import card
    from finetune_nb.known import known
    from finetune_nb.memory import Setup
    from finetune_nb.rehearse import _advice
    advice = _advice(known("llama-3.1-8b"), Setup(), card(name), 4096, True)
    assert "fits as it is" not in advice and ("change this" in advice or "nothing makes it fit" in advice)
