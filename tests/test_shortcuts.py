"The shortcuts change the time a training takes and nothing else: not a loss, not a weight, on no architecture"
import random

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import TrainerCallback

from conftest import ROOMS, THINGS, VERBS, losses, saved_weights, train_here, write_rows
from finetune_nb import job, train
from finetune_nb.frozen import GROUP
from finetune_nb.lengths import common_start, row_lengths
from finetune_nb.models import load_tokenizer
from finetune_nb.recipe import make

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def both(tiny_model, tiny_rows, tmp_path):
    "Train the same recipe with shortcuts and without: [(trainer, what was said, saved weights)]"
    def run(make_model=None, **changes):
        base = dict(model=tiny_model, data=tiny_rows, max_steps=4, batch_size=4, accumulation=1, learning_rate=1e-2, dtype="float32", threads=1, log_steps=1, eval_steps=2, save_steps=0, best_at_end=False,
                    lora_r=4, lora_alpha=8, lora_dropout=0.0, gradient_checkpointing=False, packing=False, compare=False, warmup=0.25, eval_fraction=0.2, tracker="none")
        out = []
        for fast in (True, False):
            said, folder = [], tmp_path / f"fast-{fast}"
            trainer, *_ = train_here(make("stock", **base | changes | dict(fast_path=fast)), folder, said.append, make_model() if make_model else None)
            out.append((trainer, "\n".join(s for s in said if s.startswith(("shortcut", "frozen layers", "rows are padded")) and " left" not in s), saved_weights(folder / "adapter")))
        return out
    return run


def same(both, tolerance=1e-4):
    "The same losses at every step, and the same weights at the end"
    (fast, _, mine), (stock, said, theirs) = both
    a, b = losses(fast), losses(stock)
    assert not said, "stock TRL was asked for and shortcuts were used"
    assert len(a) == len(b) > 5 and len(set(b)) > 5, b
    assert all(abs(x - y) <= tolerance * y for x, y in zip(a, b)), f"with shortcuts {a}\nwithout        {b}"
    assert mine.keys() == theirs.keys() and mine
    for k in mine: assert torch.allclose(mine[k].float(), theirs[k].float(), atol=tolerance), f"{k} differs by {(mine[k] - theirs[k]).abs().max():.1e}"


HEAD, END, STORED = "head computes answer tokens only", "no padding", "frozen layers are computed once"
SETTINGS = {
    "all layers": (dict(), [HEAD, END], [STORED]),
    "last layers, the others stored": (dict(lora_layers=2), [HEAD, END, STORED], []),
    "last layers, the others stored, by length": (dict(lora_layers=1, group_by_length=True), [HEAD, END, STORED], []),
    "last layers, dropout": (dict(lora_layers=2, lora_dropout=0.05), [HEAD], []),
    "accumulation": (dict(accumulation=2, max_steps=4, lora_layers=2), [HEAD, STORED], []),
    "checkpointing": (dict(gradient_checkpointing=True), [HEAD], [STORED]),
    "checkpointing, last layers, accumulation": (dict(gradient_checkpointing=True, lora_layers=2, accumulation=2, max_steps=4), [HEAD], [STORED]),
    "by length": (dict(group_by_length=True), [HEAD, END], []),
    "every token trained": (dict(train_on="all"), [HEAD], []),
    "a common beginning": (dict(system="You switch what is in a house. Answer in JSON.", lora_layers=2), [HEAD, STORED], []),
    "every weight": (dict(method="full", optimizer="sgd", learning_rate=0.2), [HEAD], [STORED]),
    "every weight, checkpointing": (dict(method="full", optimizer="sgd", learning_rate=0.2, gradient_checkpointing=True), [HEAD], [STORED]),
    "head trained whole": (dict(modules_to_save="lm_head", lora_layers=2, learning_rate=1e-3), [HEAD], [STORED]),
    "embedding trained whole": (dict(modules_to_save="embed_tokens", lora_layers=2, learning_rate=1e-3), [HEAD], [STORED]),
    "bias trained": (dict(lora_bias="all", lora_layers=2), [HEAD], [STORED]),
    "rows cut": (dict(max_length=85, cut_answers=True, system="You switch what is in a house."), [HEAD], []),
    "eager attention": (dict(attention="eager", lora_layers=2), [HEAD], []),
    "best at the end": (dict(eval_steps=1, save_steps=1, best_at_end=True, learning_rate=0.05, lora_layers=2), [HEAD, STORED], []),
    "a batch of one": (dict(batch_size=1, lora_layers=2), [HEAD, STORED], []),
    "packed": (dict(packing=True, max_length=128), ["none, because sequences are packed"], [HEAD, END, STORED]),
}


@pytest.mark.parametrize("changes, used, unused", SETTINGS.values(), ids=SETTINGS)
def test_same_training(changes, used, unused, both):
    found = both(**changes)
    same(found)
    assert all(u in found[0][1] for u in used) and not any(u in found[0][1] for u in unused), found[0][1]


SIZES = dict(vocab_size=332, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=256, initializer_range=0.2,
             bos_token_id=1, eos_token_id=2, pad_token_id=0)
MOE = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
NEOX = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")} | dict(hidden_dropout=0.0, attention_dropout=0.0)
GPT2 = dict(vocab_size=332, n_embd=32, n_layer=3, n_head=2, n_positions=256, initializer_range=0.2, bos_token_id=1, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
# kind: configuration, what must not be used (its reason is told), what must be used
ARCHITECTURES = {
    "qwen2": ("Qwen2", SIZES, [], [HEAD, STORED]),
    "qwen3": ("Qwen3", SIZES, [], [HEAD, STORED]),
    "mistral, short window": ("Mistral", SIZES | dict(sliding_window=8), [END], [HEAD]),
    "gemma": ("Gemma", SIZES, [], [HEAD]),
    "gemma2": ("Gemma2", SIZES | dict(final_logit_softcapping=5.0, attn_logit_softcapping=5.0, query_pre_attn_scalar=16, sliding_window=16), [HEAD], []),
    "gemma3": ("Gemma3Text", SIZES | dict(query_pre_attn_scalar=16, sliding_window=16, layer_types=["sliding_attention", "full_attention", "sliding_attention"]), [STORED], [HEAD]),
    "granite, scaled head and embedding": ("Granite", SIZES | dict(logits_scaling=4.0, embedding_multiplier=6.0, residual_multiplier=0.5, attention_multiplier=0.2), [HEAD], []),
    "cohere, scaled head": ("Cohere", {k: v for k, v in SIZES.items() if k != "head_dim"} | dict(logit_scale=0.25), [HEAD], []),
    "gpt_neox": ("GPTNeoX", NEOX, [], [HEAD]),
    "gpt_neox, dropout": ("GPTNeoX", NEOX | dict(hidden_dropout=0.2), [END, STORED], [HEAD]),
    "gpt2": ("GPT2", GPT2, [STORED], [HEAD]),
    "gpt2, dropout": ("GPT2", GPT2 | dict(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2), [END, STORED], [HEAD]),
    "phi, dropout of the embedding": ("Phi", SIZES | dict(embd_pdrop=0.2, resid_pdrop=0.0), [END, STORED], [HEAD]),
    "opt, dropout without a module": ("OPT", dict(vocab_size=332, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=2, word_embed_proj_dim=32, max_position_embeddings=256, dropout=0.2, init_std=0.2,
                                                 bos_token_id=1, eos_token_id=2, pad_token_id=0), [END, STORED], [HEAD]),
    "falcon": ("Falcon", {k: v for k, v in SIZES.items() if k not in ("intermediate_size", "head_dim", "num_key_value_heads")}, [STORED], [HEAD]),
    "falcon, alibi": ("Falcon", {k: v for k, v in SIZES.items() if k not in ("intermediate_size", "head_dim", "num_key_value_heads")} | dict(alibi=True), [END, STORED], []),
    "bloom": ("Bloom", dict(vocab_size=332, hidden_size=32, n_layer=3, n_head=2, initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0), [END, STORED], []),
    "llama, dropout in attention": ("Llama", SIZES | dict(attention_dropout=0.2), [END, STORED], [HEAD]),
    "mixtral": ("Mixtral", SIZES | MOE, [HEAD, END, STORED], []),
    "olmoe": ("Olmoe", SIZES | MOE, [HEAD, END, STORED], []),
    "deepseek, experts without an auxiliary loss": ("DeepseekV3", {k: v for k, v in SIZES.items() if k != "head_dim"} | dict(num_key_value_heads=2, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1,
                                                    moe_intermediate_size=32, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8), [], [HEAD]),
    "mamba, no attention": ("Mamba", dict(vocab_size=332, hidden_size=32, num_hidden_layers=3, state_size=8, bos_token_id=1, eos_token_id=2, pad_token_id=0), [END], []),
}


TARGETS = dict(Mamba=dict(lora_targets="x_proj"))  # peft does not adapt its other layers


def architecture(kind, config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**config))


@pytest.mark.parametrize("method", ["last layer", "every weight"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_same_training_or_told_why_not(name, method, both):
    kind, config, unused, used = ARCHITECTURES[name]
    # SGD, because Adam makes full steps of the rounding errors of weights without influence, such as the bias of attention keys
    changes = dict(method="full", optimizer="sgd", learning_rate=0.2) if method == "every weight" else dict(lora_layers=1, **TARGETS.get(kind, {}))
    found = both(lambda: architecture(kind, config), **changes)
    told = found[0][1]
    same(found)
    assert not any(u in told for u in unused), told
    assert all(u in told for u in used if u != STORED or method == "last layer"), told
    for line in told.splitlines():
        if "none" in line or "was tried" in line: assert "because" in line or " and " in line, line
    assert told, "nothing was said about shortcuts"


def test_a_difference_that_does_not_show_before_training(both):
    "A soft cap of the logits changes nothing while they are small, and much once they have grown"
    config = SIZES | dict(final_logit_softcapping=2.0, query_pre_attn_scalar=16, initializer_range=0.002)
    same(both(lambda: architecture("Gemma2", config), method="full", learning_rate=0.02, max_steps=8), tolerance=1e-3)


class Count(TrainerCallback):
    "How many rows are stored after each step"
    def __init__(self, trainer): self.trainer, self.stored = trainer, []
    def on_step_end(self, *args, **kwargs): self.stored.append(len(self.trainer.stored))


def many_rows(count):
    "Requests of different length, no two alike"
    say = lambda n: f"{VERBS[n % 3]} the {THINGS[n // 3 % 3]} in the {ROOMS[n // 9 % 3]} at {n} o'clock" + ", please" * (n % 5)
    return [{"prompt": [{"role": "user", "content": say(n)}], "completion": [{"role": "assistant", "content": f"{THINGS[n // 3 % 3]} {n}"}]} for n in range(count)]


@pytest.fixture
def many(tiny_model, tmp_path):
    "(trainer, recipe) for 64 rows to train and 16 held out, the lower layers stored"
    data = str(write_rows(tmp_path / "many.jsonl", many_rows(80)))
    def run(**changes):
        base = dict(model=tiny_model, data=data, batch_size=8, accumulation=1, epochs=2.0, learning_rate=1e-2, dtype="float32", threads=1, log_steps=1, eval_steps=0, save_steps=0, best_at_end=False, lora_layers=2, lora_r=4, lora_alpha=8,
                    lora_dropout=0.0, gradient_checkpointing=False, packing=False, compare=False, eval_fraction=0.2, tracker="none", seed=5)
        recipe = make("stock", **base | changes)
        _, choices = job.check(recipe, say=lambda line: None)
        found, held = job.rows(recipe)
        trainer = train.build(recipe, choices, job.model(recipe, choices), load_tokenizer(recipe.model), found.rows, held.rows, tmp_path / "run", say=lambda line: None)
        assert (len(trainer.train_dataset), len(trainer.eval_dataset), len(trainer.stored)) == (64, 16, 0), "nothing is stored before it is needed"
        return trainer, recipe
    return run


@pytest.mark.parametrize("changes", [dict(), dict(batch_size=16), dict(batch_size=4, accumulation=4), dict(batch_size=1, max_steps=40)], ids=str)
def test_a_step_of_the_first_pass_stores_its_own_rows_and_no_others(changes, many, tmp_path):
    "Fails if a library takes rows in another order than `first_pass` says; the weights would still be right"
    trainer, recipe = many(**changes)
    trainer.add_callback(count := Count(trainer))
    train.learn(trainer, recipe, tmp_path / "run", say=lambda line: None)
    rows = recipe.batch_size * recipe.accumulation
    assert count.stored == [min(-(-(k + 1) * rows // GROUP) * GROUP, 64) for k in range(trainer.state.max_steps)]


@pytest.mark.parametrize("changes", [dict(), dict(group_by_length=True), dict(lora_dropout=0.1)], ids=str)
def test_each_row_is_computed_once(changes, many, tmp_path):
    trainer, recipe = many(eval_steps=3, **changes)
    inner, computed = trainer.stored.compute, []
    trainer.stored.compute = lambda numbers: computed.extend(numbers) or inner(numbers)
    train.learn(trainer, recipe, tmp_path / "run", say=lambda line: None)
    assert sorted(computed) == list(range(80)) and trainer.stored.keys() == set(range(80))


def test_storing_in_the_middle_of_a_step_leaves_no_trace(many):
    "neither in the random numbers, nor in the mode, nor in gradients"
    trainer, _ = many(lora_dropout=0.1)
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(8)]))
    trainer.model.train()
    found = []
    for _ in range(2):  # the first time rows are missing, the second time they are there
        torch.manual_seed(1)
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        assert all(m.training for m in trainer.model.modules())
        found.append((torch.get_rng_state(), [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]))
    (state, first), (again, second) = found
    assert torch.equal(state, again) and first and all(torch.equal(a, b) for a, b in zip(first, second))


def test_common_start_and_lengths_read_from_columns():
    "against row by row, on random rows, also where a table is a part of another"
    r = random.Random(0)
    def slow(rows):
        first, limit = rows[0]["input_ids"], min(next((i for i, l in enumerate(r["labels"]) if l != -100), len(r["labels"])) for r in rows) - 1
        for r in rows: limit = min(limit, next((i for i, (a, b) in enumerate(zip(first, r["input_ids"])) if a != b), limit))
        return max(limit, 0)
    for _ in range(100):
        start, rows = [r.randrange(3) for _ in range(r.randrange(1, 6))], []
        for _ in range(r.choice([1, 3, 2500])):
            ids = (start if r.random() < 0.9997 else start[:1]) + [r.randrange(3) for _ in range(r.randrange(1, 4))]
            prompt = r.randrange(min(len(start), len(ids) - 1), len(ids) + 1)
            rows.append(dict(input_ids=ids, labels=[-100] * prompt + ids[prompt:]))
        data = Dataset.from_list(rows)
        some = sorted(r.sample(range(len(rows)), max(1, len(rows) // 2)))
        for table, seen in ((data, rows), (data.select(some), [rows[i] for i in some]), (data.select(range(len(rows) // 3, len(rows))), rows[len(rows) // 3:])):
            assert row_lengths(table) == ([len(x["input_ids"]) for x in seen], [sum(l != -100 for l in x["labels"]) for x in seen])
            assert common_start([table]) == slow(seen) and common_start([data, table]) == slow(rows + seen)
