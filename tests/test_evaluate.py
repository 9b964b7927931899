"Evaluation: batching must not change a number, and no difference is claimed where there is none."
import json, logging, random, string, warnings

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetune_nb.compare_scores import Comparison, paired_losses, paired_shares
from finetune_nb.core import UserError
from finetune_nb.evaluate import Scores, answer_losses, evaluate, generate, interval, mean_interval, score_answer

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "A model this small is many times slower on several threads of a busy machine"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_tokenizer(template=CHATML, eos="<|im_end|>"):
    vocab = {t: i for i, t in enumerate(["<pad>", "<|im_start|>", "<|im_end|>", "\n", *map(chr, range(32, 127))])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token=eos,
                                        additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = template
    return tokenizer


def make_model(seed=0, **config):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=98, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                        initializer_range=0.4, **config)).float().eval()


def make_rows(n, seed=0, longest=60):
    rng = random.Random(seed)
    text = lambda k: "".join(rng.choices(string.ascii_letters + " ", k=k))
    return [{"prompt": [{"role": "user", "content": text(rng.randint(1, longest))}],
             "completion": [{"role": "assistant", "content": text(rng.randint(1, 20))}], "row": i + 1} for i in range(n)]


def encode(tokenizer, row):
    start = tokenizer(tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)).input_ids
    end = tokenizer(row["completion"][0]["content"] + "<|im_end|>").input_ids
    return {"input_ids": start + end, "labels": [-100] * len(start) + end}


@torch.no_grad()
def plain_answer(model, tokenizer, row, stop, max_new_tokens):
    "One row, one token at a time, no padding, no cache"
    ids = tokenizer(tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)).input_ids
    new = []
    while len(new) < max_new_tokens:
        token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token in stop: break
        new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True).strip()


# ---- generate ----

@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batches_and_padding_do_not_change_an_answer(batch_size):
    model, tokenizer, rows = make_model(), make_tokenizer(), make_rows(40)
    expected = [plain_answer(model, tokenizer, r, {2}, 16) for r in rows]
    assert len(set(expected)) > 30, "the model must answer differently for this test to mean anything"
    assert len({len(a) for a in expected}) > 1, "some answers must stop early"
    assert generate(model, tokenizer, rows, 16, batch_size) == expected


@pytest.mark.parametrize("wrap", [False, True])
def test_the_models_own_generation_settings_do_not_leak_in(caplog, monkeypatch, wrap):
    model, tokenizer, rows = make_model(), make_tokenizer(), make_rows(8)
    expected = [plain_answer(model, tokenizer, r, {2}, 12) for r in rows]
    if wrap: model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))  # starts as the identity
    model.generation_config.update(do_sample=True, temperature=0.3, top_p=0.5, top_k=7, repetition_penalty=1.9, max_length=30, min_p=0.2, suppress_tokens=[9])
    own = model.generation_config.to_dict()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    transformers.utils.logging.warning_once.cache_clear()  # an earlier test may have used up a warning
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        assert generate(model, tokenizer, rows, 12) == expected
    assert not caplog.records and model.generation_config.to_dict() == own


def test_stops_at_the_turns_end_though_eos_is_another_token():
    model, tokenizer, rows = make_model(), make_tokenizer(eos="<pad>"), make_rows(30)
    assert generate(model, tokenizer, rows, 16) == [plain_answer(model, tokenizer, r, {0, 2}, 16) for r in rows]


def test_stops_at_each_eos_of_the_generation_config():
    model, tokenizer, rows = make_model(), make_tokenizer(), make_rows(30)
    model.generation_config.eos_token_id = [40, 41, 42, 43, 44, 45]
    assert generate(model, tokenizer, rows, 16) == [plain_answer(model, tokenizer, r, {2, *range(40, 46)}, 16) for r in rows]


def test_a_model_without_a_chat_template_and_without_a_pad_token():
    model, tokenizer, rows = make_model(), make_tokenizer(template=None), make_rows(6)
    tokenizer.pad_token = None
    assert generate(model, tokenizer, rows, 8, 6) == generate(model, tokenizer, rows, 8, 1)


def test_measuring_leaves_model_and_tokenizer_as_they_were():
    model, tokenizer, rows = make_model(attention_dropout=0.5), make_tokenizer(), make_rows(5)
    tokenizer.padding_side = "right"
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    done = []
    first = generate(model, tokenizer, rows, 8, 2, progress=done.append)
    losses = answer_losses(model, [encode(tokenizer, r) for r in rows])
    assert done == [2, 4, 5]
    assert first == generate(model, tokenizer, rows, 8, 2) and losses == answer_losses(model, [encode(tokenizer, r) for r in rows])
    assert [m.training for m in model.modules()] == modes and tokenizer.padding_side == "right"
    model(torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss.backward()  # can still be trained


def test_no_rows():
    assert generate(make_model(), make_tokenizer(), []) == [] and answer_losses(make_model(), []) == []


# ---- losses ----

@torch.no_grad()
def plain_loss(model, row):
    logp = model(torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
    used = [i for i, label in enumerate(row["labels"]) if label != -100 and i]
    return sum(-logp[i - 1, row["labels"][i]].item() for i in used), len(used)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("wrap", ["plain", "no logits_to_keep", "peft"])
def test_losses_equal_a_direct_computation(batch_size, wrap):
    model, tokenizer = make_model(), make_tokenizer()
    encoded = [encode(tokenizer, r) for r in make_rows(25)]
    encoded.append({"input_ids": [5, 6, 7], "labels": [-100] * 3})  # nothing to count
    encoded.append({"input_ids": [5, 6, 7, 8], "labels": [5, 6, -100, 8]})  # the first token has no past
    expected = [plain_loss(model, r) for r in encoded]
    if wrap == "peft":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))  # starts as the identity
    if wrap == "no logits_to_keep":
        inner = model.forward
        model.forward = lambda input_ids, attention_mask, use_cache: inner(input_ids, attention_mask, use_cache=use_cache)
    found = answer_losses(model, encoded, batch_size)
    assert [t for _, t in found] == [t for _, t in expected]
    assert [s for s, _ in found] == pytest.approx([s for s, _ in expected], rel=1e-5, abs=1e-5)


# ---- scores of one answer ----

T, F, N = True, False, None
@pytest.mark.parametrize("answer, reference, valid_json, right_label, exact", [
    ('{"intent": "on", "n": 5}', '{"n":5,"intent":"on"}', T, T, T),  # order of names, spacing
    ('\n {"intent": "on"} \n', '{"intent": "on"}', T, T, T),  # white space is no text
    ('Sure: {"intent": "on"}', '{"intent": "on"}', F, F, F),
    ('{"intent": "on"} Done.', '{"intent": "on"}', F, F, F),
    ('```json\n{"intent": "on"}\n```', '{"intent": "on"}', F, F, F),
    ('{"intent": "on"}{"intent": "on"}', '{"intent": "on"}', F, F, F),
    ('[{"intent": "on"}]', '{"intent": "on"}', F, F, F),  # a list is no object
    ('"on"', '{"intent": "on"}', F, F, F),
    ("", '{"intent": "on"}', F, F, F),
    ('{"intent": "on", "intent": "on"}', '{"intent": "on"}', F, F, F),  # a name twice
    ('{"intent": "on", "a": {"b": 1, "b": 1}}', '{"intent": "on", "a": {"b": 1}}', F, F, F),
    ('{"intent": NaN}', '{"intent": null}', F, F, F),
    ('{"intent": -Infinity}', '{"intent": null}', F, F, F),
    ("{'intent': 'on'}", '{"intent": "on"}', F, F, F),  # Python, not JSON
    ('{"intent": "on",}', '{"intent": "on"}', F, F, F),
    ('{"intent": "off"}', '{"intent": "on"}', T, F, F),
    ('{"label": "on"}', '{"intent": "on"}', T, F, F),
    ('{}', '{"intent": null}', T, F, F),  # missing is not null
    ('{"intent": null}', '{"intent": null}', T, T, T),
    ('{"intent": "on", "a": {"x": [1, {"y": 2}]}}', '{"a": {"x": [1, {"y": 2}]}, "intent": "on"}', T, T, T),
    ('{"intent": "on", "a": [1, 2]}', '{"intent": "on", "a": [2, 1]}', T, T, F),  # the order of a list counts
    ('{"n": 5.0}', '{"n": 5}', T, N, T),
    ('{"n": 5e0}', '{"n": 5}', T, N, T),
    ('{"n": "5"}', '{"n": 5}', T, N, F),
    ('{"n": 0.1}', '{"n": 0.10}', T, N, T),
    ('{"n": 9007199254740993}', '{"n": 9007199254740992}', T, N, F),  # beyond what a float can tell apart
    ('{"n": 1}', '{"n": true}', T, N, F),
    ('{"n": 0}', '{"n": false}', T, N, F),
    ('{"intent": 1}', '{"intent": true}', T, F, F),
    ('{"n": "\\u00e9"}', '{"n": "é"}', T, N, T),
    (" Paris ", "Paris", N, N, T),
    ("paris", "Paris", N, N, F),
    ('[1, 2]', '[1,2]', N, N, F),  # a reference that is no object is text
    ('{"a": NaN}', '{"a": NaN}', N, N, T),
])
def test_score_answer(answer, reference, valid_json, right_label, exact):
    assert score_answer(answer, reference) == {"valid_json": valid_json, "right_label": right_label, "exact": exact}


@pytest.mark.parametrize("answer", ['{"a":' * 100_000, "[" * 100_000, '{"a": ' + "9" * 100_000 + "}", '{"a": 1e999999}', '{"a": "\\ud800"}', "\x00"])
def test_a_hostile_answer_is_only_wrong(answer):
    assert score_answer(answer, '{"intent": "on"}')["exact"] is False


def test_another_label_field():
    assert score_answer('{"kind": "a", "x": 1}', '{"kind": "a"}', "kind")["right_label"] is True


# ---- intervals, against published values ----

@pytest.mark.parametrize("k, n, low, high", [  # Newcombe 1998, Statistics in Medicine 17:857, table I, score method
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson(k, n, low, high):
    assert interval(k, n) == pytest.approx((low, high), abs=6e-5)


def test_newcombes_paired_interval_and_exact_mcnemar():
    before, after = [1] * 65 + [0] * 96, [1] * 59 + [0] * 6 + [1] * 16 + [0] * 80  # Cavo 2012 in Fagerland's tables
    found = paired_shares(before, after)
    assert (found["value"], found["low"], found["high"]) == pytest.approx((0.0621, 0.0046, 0.1186), abs=6e-5)
    assert found["p"] == pytest.approx(0.0525, abs=1e-4)
    back = paired_shares(after, before)
    assert (back["low"], back["high"]) == pytest.approx((-found["high"], -found["low"]))


@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_a_paired_interval_stays_within_the_possible(n):
    for before, after in [([0] * n, [1] * n), ([1] * n, [1] * n), ([0] * n, [0] * n)]:
        found = paired_shares(before, after)
        assert -1 <= found["low"] <= found["value"] <= found["high"] <= 1
        assert found["low"] < found["high"]


def test_the_bootstrap_covers_and_repeats():
    rng, hits = random.Random(0), 0
    for _ in range(100):
        tokens = [rng.randint(3, 30) for _ in range(60)]
        sums = [t * rng.gauss(2, 0.5) for t in tokens]
        low, high = mean_interval(sums, tokens)
        hits += low <= 2 <= high
        assert (low, high) == mean_interval(sums, tokens)
    assert 88 <= hits <= 100
    assert mean_interval([6.0], [3]) == (2.0, 2.0)


def test_longer_rows_weigh_more():
    low, high = mean_interval([10.0] * 50 + [1.0] * 50, [100] * 50 + [1] * 50)
    assert low < 510 / 5050 + 0.01 and high < 0.2  # not the mean of the rows' means, which is 0.55


def test_the_sign_flip_test_is_exact_with_few_rows():
    assert paired_losses([5, 5, 5], [1, 2, 3], [1, 1, 1])["p"] == 2 / 8
    assert paired_losses([5.0], [1.0], [1])["p"] == 1


# ---- comparisons ----

def make_scores(exact, loss, tokens=10):
    return Scores([{"row": i + 1, "prompt": f"q{i}", "reference": '{"intent": "on"}', "answer": "a", "valid_json": e, "right_label": e, "exact": e,
                    "loss": x, "tokens": tokens} for i, (e, x) in enumerate(zip(exact, loss))])


def test_identical_arms_are_not_told_apart():
    rng, calm = random.Random(1), 0
    for p in [0.1, 0.5, 0.9]:
        for _ in range(200):
            hard = [(p + rng.random()) / 2 for _ in range(100)]  # rows differ in how hard they are, on both sides alike
            draw = lambda: make_scores([rng.random() < h for h in hard], [None] * 100, tokens=0)
            calm += Comparison(draw(), draw()).verdict().startswith("No difference")
    assert calm >= 0.95 * 600


def test_identical_arms_are_not_told_apart_by_their_loss():
    rng, calm, pairs = random.Random(2), 0, 200
    for _ in range(pairs):
        draw = lambda: make_scores([None] * 40, [rng.gauss(2, 0.3) for _ in range(40)])
        calm += Comparison(draw(), draw()).verdict().startswith("No difference")
    assert calm >= 0.95 * pairs - 3 * (pairs * 0.05 * 0.95) ** 0.5  # this test errs in just 5 %: three standard errors are allowed


def test_a_real_gain_and_a_real_loss_are_seen():
    rng = random.Random(3)
    poor = make_scores([rng.random() < 0.4 for _ in range(100)], [2.0] * 100)
    good = make_scores([rng.random() < 0.8 for _ in range(100)], [1.0] * 100)
    assert Comparison(poor, good).verdict().startswith("Better") and Comparison(good, poor).verdict().startswith("Worse")


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_few_rows_claim_nothing(n):
    assert Comparison(make_scores([F] * n, [3.0] * n), make_scores([T] * n, [0.1] * n)).verdict().startswith("No difference can be shown")


def test_loss_decides_where_nothing_is_answered():
    before, after = make_scores([N] * 30, [2 + i / 100 for i in range(30)]), make_scores([N] * 30, [1 + i / 99 for i in range(30)])
    comparison = Comparison(before, after)
    assert list(comparison.changes) == ["loss"] and comparison.verdict().startswith("Better after than before (loss on 30 rows")


def test_losses_in_other_tokens_are_not_compared():
    comparison = Comparison(make_scores([F] * 9, [2.0] * 9, tokens=10), make_scores([T] * 9, [1.0] * 9, tokens=11))
    assert "loss" not in comparison.changes and "exact" in comparison.changes


def test_nothing_in_common():
    empty = Comparison(Scores([]), Scores([]))
    assert empty.table() == empty.samples() == [] and empty.verdict().startswith("Nothing to compare")
    assert "Nothing to compare" in empty._repr_markdown_()
    assert empty.plot().axes


@pytest.mark.parametrize("change", [{"row": 9}, {"prompt": "other"}, {"reference": "other"}])
def test_other_rows_are_refused(change):
    before, after = make_scores([F] * 3, [1.0] * 3), make_scores([T] * 3, [1.0] * 3)
    after.rows[1] = {**after.rows[1], **change}
    with pytest.raises(UserError, match="part at the 2. row"): Comparison(before, after)
    with pytest.raises(UserError, match="part at the 3. row"): Comparison(before, Scores(before.rows[:2]))


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("right", ["none", "some", "all", "text"])
def test_samples(n, right):
    rng = random.Random(n)
    exact = {"none": [F] * n, "some": [i % 2 == 0 for i in range(n)], "all": [T] * n, "text": [N] * n}[right]
    comparison = Comparison(make_scores([F] * n, [3.0] * n), make_scores(exact, [rng.random() for _ in range(n)]))
    samples = comparison.samples()
    assert samples == comparison.samples()
    assert len(samples) == min(n, 6) == len({s["row"] for s in samples})
    kinds = [s["kind"] for s in samples]
    assert [kinds.count(k) for k in ("best", "worst", "typical")] == [min(2, (n + 2 - k) // 3) for k in range(3)]
    assert set(samples[0]) == {"kind", "row", "prompt", "reference", "before", "after", "exact_after", "loss_before", "loss_after"}


def test_samples_follow_their_rule():
    exact = [T, T, T, F, F, F, T, T]
    drop = [0.1, 2.0, 1.5, 2.5, 0.2, 0.3, 0.9, 1.0]  # the fourth row is wrong after, however much its loss fell
    after = [3 - d for d in drop]
    picked = Comparison(make_scores([F] * 8, [3.0] * 8), make_scores(exact, after)).samples()
    assert [(s["kind"], s["row"]) for s in picked] == [("best", 2), ("best", 3), ("worst", 5), ("worst", 6), ("typical", 7), ("typical", 8)]


def test_text_from_rows_is_only_text_in_a_report():
    before = make_scores([F] * 6, [1.0] * 6)
    for r in before.rows: r["prompt"] = "<script>alert(1)</script> | a\n# b"
    after = Scores([{**r, "answer": "<img src=x onerror=y>" + "z" * 1000} for r in before.rows])
    report = Comparison(before, after)._repr_markdown_()
    assert "<script>" not in report and "<img" not in report and "z" * 400 not in report and "\n# b" not in report


def test_the_figure_draws_without_a_display(tmp_path):
    comparison = Comparison(make_scores([F] * 9, [2.0] * 9), make_scores([T] * 9, [1.0] * 9))
    comparison.plot().savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert len(comparison.plot().axes[0].patches) == 6


# ---- the whole ----

def test_evaluate_and_its_round_trip(capsys):
    model, tokenizer, rows = make_model(), make_tokenizer(), make_rows(7)
    rows[2]["completion"][0]["content"] = '{"intent": "on"}'
    rows.insert(4, {"text": "plain text", "row": 99})
    encoded = [encode(tokenizer, r) if "prompt" in r else {"input_ids": [5, 6, 7], "labels": [5, 6, 7]} for r in rows]
    scores = evaluate(model, tokenizer, rows, encoded, max_new_tokens=8, batch_size=3, progress_every=0, stage="before")
    assert Scores.from_json(json.loads(json.dumps(scores.to_json(), allow_nan=False))) == scores
    assert [r["row"] for r in scores.rows] == [1, 2, 3, 4, 99, 5, 6, 7]
    asked = [r for r in rows if "prompt" in r]
    assert [r["answer"] for r in scores.rows if r["row"] != 99] == generate(model, tokenizer, asked, 8)
    assert scores.rows[4]["answer"] is None and scores.rows[4]["exact"] is None and scores.rows[4]["tokens"] == 2
    assert {k: m["n"] for k, m in scores.metrics.items()} == {"valid_json": 1, "right_label": 1, "exact": 7, "loss": 8}
    assert scores.metrics["loss"]["value"] == pytest.approx(sum(s for s, _ in answer_losses(model, encoded)) / sum(t for _, t in answer_losses(model, encoded)))
    out = capsys.readouterr().out
    assert "before loss 8/8 100%" in out and "before answers 7/7 100%" in out
    assert "| loss |" in scores._repr_markdown_()
    assert Comparison(scores, scores).verdict().startswith("No difference seen")


def test_broken_weights_are_told():
    model, tokenizer, rows = make_model(), make_tokenizer(), make_rows(3)
    with torch.no_grad(): model.lm_head.weight[5] = float("nan")
    with pytest.raises(UserError, match="not a number on 3 of 3 rows"):
        evaluate(model, tokenizer, rows, [encode(tokenizer, r) for r in rows])


def test_importing_the_module_needs_no_torch():
    import subprocess, sys
    code = "import sys, finetune_nb.compare_scores; print([m for m in ('torch', 'transformers', 'scipy', 'numpy', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
