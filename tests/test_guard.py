"Numbers that are not finite: stopped before they are applied, in every place they can come from; about 15 s of processor time"
import json
import math

import pytest
import torch
from transformers import TrainerCallback

import exact
from finetune_nb.checkpoint import damage, found
from finetune_nb.guard import NonFinite

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = exact.BASE | exact.METHODS["lora"] | exact.PASSES[1] | dict(save_steps=0, eval_steps=0, max_steps=6, log_steps=1)


def at_step(step, do):
    "Do something to the trainer when this step begins"
    class At(TrainerCallback):
        def __init__(self, trainer): self.trainer = trainer
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step + 1 == step: do(self.trainer)
    return lambda trainer: trainer.add_callback(At(trainer))


def poison_loss(trainer):
    inner = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: inner(*a, **k) * float("nan")


def poison_gradient(trainer):
    p = next(p for p in trainer.model.parameters() if p.requires_grad)
    p.register_hook(lambda g: torch.full_like(g, float("inf")))


def constant(trainer):
    "the loss is infinite though its gradient is not"
    inner = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: inner(*a, **k) + float("inf")


@pytest.mark.parametrize("fast", [True, False], ids=["shortcuts", "stock"])
@pytest.mark.parametrize("what", [poison_loss, poison_gradient, constant], ids=lambda f: f.__name__)
def test_stops_before_the_step(what, fast, tiny_model, tiny_rows, tmp_path):
    before, said = {}, []
    def change(trainer):
        at_step(4, lambda t: (before.update({n: p.detach().clone() for n, p in t.model.named_parameters()}), what(t)))(trainer)
        before["trainer"] = trainer
    with pytest.raises(NonFinite) as e: exact.run(SETTINGS | dict(fast_path=fast), tiny_model, tiny_rows, tmp_path / "run", change=change, say=said.append)
    trainer = before.pop("trainer")
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters()), "the step was applied"
    problem, = e.value.problems
    assert problem.place == "step 4" and "so it was not applied; it was made of row" in problem.problem and problem.fix
    path, = [p for _, p in found(tmp_path / "run" / "checkpoints")]
    assert path.name == "checkpoint-3" and not damage(path) and any("the weights are as after step 3; checkpoint-3 is saved" in s for s in said)
    logged = [json.loads(l) for l in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [l["step"] for l in logged if "loss" in l] == [1, 2, 3] and all(math.isfinite(l["loss"]) for l in logged)
    exact.run(SETTINGS, tiny_model, tiny_rows, tmp_path / "straight")
    exact.run(SETTINGS | dict(fast_path=fast), tiny_model, tiny_rows, tmp_path / "run", resume=True)
    if fast: assert exact.same(tmp_path / "straight", tmp_path / "run") == [], "the step that was unmade left something"


@pytest.mark.parametrize("rows", ["plain", "packed"])
def test_the_row_is_named(rows, tiny_model, tiny_rows, tmp_path):
    "a batch that holds the tokens of one row has no finite loss"
    from finetune_nb import job
    from finetune_nb.mask import encode
    from finetune_nb.recipe import make
    chosen = job.rows(make("stock", **SETTINGS, data=tiny_rows, model=tiny_model))[0].rows[3]
    text = lambda ids: " ".join(map(str, ids))
    def change(trainer):
        inner, wanted = trainer.compute_loss, text(encode(chosen, trainer.processing_class)["input_ids"])
        def poisoned(model, inputs, *a, **k):
            hit = any(wanted in text(ids) for ids in inputs["input_ids"].tolist())
            return inner(model, inputs, *a, **k) * (float("nan") if hit else 1.0)
        trainer.compute_loss = poisoned
    with pytest.raises(NonFinite) as e: exact.run(SETTINGS | exact.ROWS[rows] | dict(max_steps=12), tiny_model, tiny_rows, tmp_path, change=change)
    problem = e.value.problems[0]
    named = problem.problem.partition("made of row")[2].lstrip("s ").split(", ")
    assert str(chosen["row"]) in named and "?" not in named and len(named) <= (2 if rows == "plain" else 6)
    if rows == "plain": assert f"Look at row {chosen['row']}: it is not finite alone" in problem.fix


def test_held_out_batches_are_counted(tiny_model, tiny_rows, tmp_path):
    said = []
    def change(trainer):
        inner = trainer.compute_loss
        trainer.compute_loss = lambda model, inputs, *a, **k: inner(model, inputs, *a, **k) * (1.0 if model.training else float("nan"))
    exact.run(SETTINGS | dict(eval_steps=3, save_steps=3, best_at_end=True), tiny_model, tiny_rows, tmp_path, change=change, say=said.append)
    lines = [json.loads(l, parse_constant=lambda c: pytest.fail(f"{c} is not JSON")) for l in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    held = [l for l in lines if "eval_loss" in l]
    assert len(held) == 2 and all(l["eval_loss"] is None and l["eval_nonfinite_batches"] == 1 for l in held) and sum("is not finite in 1 of 1 batches, rows" in s for s in said) == 2


class Scaler:
    "A gradient scaler that has fallen to a scale"
    def __init__(self, scale): self.scale = scale
    def get_scale(self): return self.scale


@pytest.mark.parametrize("scale, stops", [(65536.0, False), (0.5, True)])
def test_a_gradient_scaler_may_skip_steps_until_its_scale_is_used_up(scale, stops, tiny_model, tiny_rows, tmp_path):
    trainer, _ = exact.built(SETTINGS, tiny_model, tiny_rows, tmp_path)
    trainer.accelerator.scaler, trainer.seen = Scaler(scale), ((torch.tensor(2.0), torch.tensor([0])),)
    trainer.create_optimizer_and_scheduler(6)
    ask = lambda loss: (setattr(trainer, "seen", ((torch.tensor(loss), torch.tensor([0])),)), trainer._get_grad_norm(trainer.model, torch.tensor(float("inf"))))
    if stops:
        with pytest.raises(NonFinite): ask(2.0)
    else:
        ask(2.0)
        with pytest.raises(NonFinite): ask(float("nan"))


def test_an_alarm_is_a_line_of_the_curve_and_said(tiny_model, tiny_rows, tmp_path):
    said = []
    def jump(trainer):
        inner = trainer.compute_loss
        trainer.compute_loss = lambda *a, **k: inner(*a, **k) * 50
    exact.run(SETTINGS | dict(max_steps=16, epochs=9.0, learning_rate=1e-4), tiny_model, tiny_rows, tmp_path, change=at_step(14, jump), say=said.append)
    lines = [json.loads(l) for l in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [l["step"] for l in lines if l.get("alarm") == "spike"][:1] == [14] and any("step 14: the loss jumped" in s for s in said)
