"Operations against torch's own counter, and steps and tokens against what TRL's trainer really does"
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from types import SimpleNamespace

from conftest import make_llama
from finetune_nb.recipe import make
from finetune_nb.shapes import Shapes, Weight
from finetune_nb.time_cost import flops, schedule

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, attention_bias=False, mlp_bias=False, vocab_size=2048)


def shapes_of(model):
    "Shapes of a Llama, read from the model itself"
    c, weights = model.config, {}
    for name, p in model.named_parameters():
        name = ".".join("*" if part.isdigit() else part for part in name.split("."))
        kind = "attention" if "attn" in name else "mlp" if "mlp" in name else "head" if "lm_head" in name else "embedding" if "embed" in name else "norm"
        weights.setdefault(name, []).append((tuple(p.shape), kind))
    linear = lambda kind: kind in ("attention", "mlp", "head")
    return Shapes("test", "llama", tuple(Weight(n, found[0][0], found[0][1], len(found), linear(found[0][1])) for n, found in weights.items()), c.hidden_size, c.num_hidden_layers,
                  c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.intermediate_size, c.vocab_size)


CASES = {"full": dict(method="full"), "lora": {}, "checkpointing": dict(checkpointing="nonreentrant"), "last two blocks": dict(adapted_layers=2), "some targets": dict(target_modules=("q_proj", "v_proj")),
         "large rank": dict(rank=64), "full with checkpointing": dict(method="full", checkpointing="nonreentrant")}


@pytest.mark.parametrize("change", CASES.values(), ids=CASES)
def test_flops_are_what_torch_counts(change):
    from peft import LoraConfig, get_peft_model
    setup = SimpleNamespace(**dict(method="lora", rank=8, target_modules=(), adapted_layers=0, checkpointing="none") | change)
    model = make_llama(**SIZES)
    shapes = shapes_of(model)
    assert shapes.total == sum(p.numel() for p in model.parameters())
    model.set_attn_implementation("eager")
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    layers = list(range(8 - setup.adapted_layers, 8)) if setup.adapted_layers else None
    if setup.method != "full": model = get_peft_model(model, LoraConfig(r=setup.rank, target_modules=list(setup.target_modules) or every, layers_to_transform=layers))
    if setup.checkpointing != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    rows, length = 2, 32
    ids = torch.randint(3, 2048, (rows, length))
    with FlopCounterMode(display=False) as counter: model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    predicted = flops(shapes, setup, [length] * rows).total
    saved = setup.method == "full" and setup.checkpointing == "nonreentrant"  # torch stops recomputing a block before its last product, which nothing in it needs
    assert counter.get_total_flops() == pytest.approx(predicted, rel=0.06 if saved else 0.015)


@pytest.mark.parametrize("change", [dict(batch_size=4, accumulation=3), dict(batch_size=5, accumulation=1, epochs=1.5), dict(batch_size=2, max_steps=3, accumulation=2)], ids=str)
def test_steps_and_tokens_are_what_the_trainer_does(change, tiny_model, tiny_rows, tmp_path):
    from conftest import train_here
    recipe = make("stock", **dict(model=tiny_model, data=tiny_rows, epochs=2.0, dtype="float32", threads=1, save_steps=0, best_at_end=False, lora_r=4, lora_dropout=0.0, gradient_checkpointing=False, packing=False,
                                  fast_path=False, compare=False, eval_fraction=0.2, tracker="none", eval_steps=0) | change)
    trainer, _, encoded = train_here(recipe, tmp_path)
    plan = schedule(recipe, [len(e["input_ids"]) for e in encoded])
    assert plan.steps == trainer.state.global_step
    assert plan.tokens == pytest.approx(trainer._total_train_tokens, rel=1e-9 if plan.passes == round(plan.passes) else 0.2)  # part of a pass is a random part
