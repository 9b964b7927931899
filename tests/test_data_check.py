"The data check: planted problems of every kind are found with their rows, planted leaks are flagged, different rows stay different, and nothing personal is printed"
import json
import random
import re
import string
import subprocess
import sys

import pytest
from hypothesis import given, settings, strategies as st

from conftest import CHATML, make_tokenizer, write_rows
from finetune_nb import content, data_check, data_report, duplicates, labels, similar, tokens
from finetune_nb.core import UserError
from finetune_nb.data import Data, split
from finetune_nb.rowfile import fingerprint

SILENT = dict(say=lambda line: None)


def chat(asked, answer="Yes.", n=1, system=""):
    first = [{"role": "system", "content": system}] if system else []
    return {"prompt": first + [{"role": "user", "content": asked}], "completion": [{"role": "assistant", "content": answer}], "row": n}


WORDS = sorted({w for t in """the of and to in a is that for it was on with as by at from or an this which be not are but had his her they you were all one there we when can said more if will
up out about who them then no so what into him has some could time these two first than now only its people over other new do may after also made did many before must through years where much way
down little long great men good world come day great house work water small night book young door river money music letter garden winter teacher summer animal window kitchen mountain""".split() for w in [t]})


def sentence(rng, n=14): return " ".join(rng.choices(WORDS, k=n))


# ---- duplicates and leaks

def case(t, rng): return "".join(c.upper() if rng.random() < 0.5 else c for c in t)
def punctuation(t, rng): return ", ".join(t.split()[:3]) + "! " + " ".join(t.split()[3:]) + "?!"
def spacing(t, rng): return "  " + re.sub(" ", lambda m: rng.choice(["  ", "\n", "\t", "\u00a0"]), t) + "\n"


def swap(t, rng):
    w = t.split()
    i, j = rng.sample(range(len(w)), 2)
    w[i], w[j] = w[j], w[i]
    return " ".join(w)


def wide(t, rng): return "".join(chr(ord(c) + 0xFEE0) if c.isalpha() and c.isascii() else c for c in t)
def one_word(t, rng): return " ".join([*t.split()[:-1], "zebra"])
def longer(t, rng): return sentence(rng, 30) + " " + t + " " + sentence(rng, 30)


CHANGES = [case, punctuation, spacing, swap, wide, one_word, longer]


@pytest.mark.parametrize("change", CHANGES)
def test_a_planted_leak_is_flagged_and_only_it(change):
    rng = random.Random(change.__name__)
    train = [chat(sentence(rng, rng.randrange(14, 30)), n=i) for i in range(1, 301)]
    held = [chat(change(train[i]["prompt"][0]["content"], rng), n=900 + i) for i in range(0, 300, 10)] + [chat(sentence(rng, 20), n=999) for _ in range(30)]
    found = duplicates.leaked_rows(train, held)
    assert sorted(found) == list(range(30))
    assert [found[i].row for i in range(30)] == [train[i]["row"] for i in range(0, 300, 10)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(WORDS), min_size=10, max_size=40), st.lists(st.sampled_from(CHANGES[:5]), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_any_mix_of_small_changes_is_flagged(words, changes, rng):
    asked = " ".join(words)
    for change in changes: asked = change(asked, rng)
    assert duplicates.leaked_rows([chat(" ".join(words), n=5), chat("Something else entirely", n=6)], [chat(asked)])[0].row == 5


def test_really_different_rows_stay_different():
    rng = random.Random(3)
    rows = [chat(sentence(rng), sentence(rng, 8), n) for n in range(3000)]
    found = duplicates.sizes(rows)
    assert (found.rows, found.unique, found.effective, found.largest) == (3000, 3000, 3000, [])


def test_near_duplicates_are_counted_once():
    rng = random.Random(4)
    rows = [chat(sentence(rng), sentence(rng, 8), n) for n in range(400)]
    copies = [chat(one_word(r["prompt"][0]["content"], rng), r["completion"][0]["content"], 400 + i) for i, r in enumerate(rows[:150])]
    found = duplicates.sizes(rows + copies + rows[:50])
    assert (found.rows, found.unique, found.effective) == (600, 550, 400)
    assert all(found.cluster[i] == found.cluster[400 + i] for i in range(150)) and found.cluster[:50] == found.cluster[-50:]


@pytest.mark.parametrize("template, answer, values", [
    ("Write a greeting for {}", "Dear {}, welcome to our club!", ["Ada Lovelace", "Bob", "Grace", "Linus", "Guido van Rossum", "Alan"]),
    ("Order {} has not arrived yet", "Sorry to hear that order {} is late.", ["1", "22", "4711", "99.5", "3,141"]),
    ("Switch on the {}, please", '{{"intent": "on", "name": "{}"}}', ["kitchen lamp", "heater", "tv", "radio", "old garden pump"]),
])
def test_a_template_with_other_values_is_one_example(template, answer, values):
    rows = [chat(template.format(v), answer.format(v), i) for i, v in enumerate(values)]
    assert (duplicates.sizes(rows).unique, duplicates.sizes(rows).effective) == (len(values), 1)


TEMPLATES = ["Turn on the {d} in the {r}", "Switch the {d} off", "Is the {d} in the {r} on?", "Set a timer for {n} minutes named {t}", "Play {m} by {a}", "Call {p} at {n}", "What is the weather in {c} on {w}",
             "Remind me to {t} on {w}", "Book a table for {n} at {p} on {w}", "Translate {m} for {p}", "Send {p} a message saying {t}", "Add {t} to the {l} list"]
VALUES = dict(d="ceiling light, desk lamp, fan, heater, coffee machine", r="kitchen, living room, attic, guest room", n=", ".join(map(str, range(60))), t="buy milk, pizza, call mom back, laundry, water the plants", m="yesterday, blue in green, hey jude",
              a="the beatles, miles davis, queen", p="anna, john smith, maria, dr brown", c="paris, new york, rome, san francisco", w="monday, tuesday, friday", l="shopping, todo")


def test_five_thousand_rows_of_twelve_templates():
    rng, rows = random.Random(0), []
    for i in range(5000):
        slots = {k: rng.choice(VALUES[k].split(", ")) for k in re.findall(r"{(\w)}", TEMPLATES[i % 12])}
        rows.append(chat(TEMPLATES[i % 12].format(**slots), json.dumps({"intent": f"intent {'abcdefghijkl'[i % 12]}"} | slots), i))
    found = duplicates.sizes(rows)
    assert found.unique > 800 and 10 <= found.effective <= 14, found


def test_text_that_people_wrote_stays_different():
    "What Python's library says about its functions: few of thousands repeat another, and those that do share most of their words"
    import ast, sysconfig
    from pathlib import Path
    rows, seen = [], set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            said = ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else None
            if said and len(said) > 30 and said not in seen: rows.append(chat(f"What does {node.name} do?", said, len(rows)))
            seen.add(said)
    found = duplicates.sizes(rows)
    assert len(rows) > 1500 and found.effective > 0.88 * found.unique and found.largest[0][0] < 30, found.largest


@pytest.mark.parametrize("rows", [
    [chat(f"{a} * {b} =", str(a * b)) for a in range(2, 12) for b in range(a, 12)],
    [chat(f"{'Read the review and say in one word, good or bad, what its writer thinks of the film. ' * 2}{w} {v}", "good") for w in WORDS[:8] for v in WORDS[-6:]],
    [chat(f"Translate: {w} {v}", f"{v[::-1]} {w[::-1]}") for w in WORDS[:8] for v in WORDS[-6:]],
    [chat(f"東京の天気は{a}ですか、それとも{b}ですか", f"{a}") for a, b in zip("晴雨曇雪風雷霧霜", "山川海空森町村駅")],
], ids=["sums", "one long instruction", "short questions", "Japanese"])
def test_rows_that_share_a_form_but_not_their_content(rows):
    found = duplicates.sizes(rows)
    assert found.effective > 0.9 * len(rows) if "東京" not in rows[0]["prompt"][0]["content"] else found.effective >= 1


def test_the_same_rows_give_the_same_clusters_in_another_process(tmp_path):
    "Nothing depends on Python's salted hash"
    code = "import random; from finetune_nb import similar; r = random.Random(1); t = [' '.join(r.choices('abcdefghijklmnop', k=9)) for _ in range(400)]; print(similar.clusters(similar.bags(t)).tolist())"
    first, second = (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": s}, check=True).stdout for s in ("1", "2"))
    assert first == second and len(set(json.loads(first))) < 400


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from(list("abcdef")), min_size=1, max_size=12), min_size=2, max_size=8))
def test_similarity_is_that_of_the_definition(lists):
    from collections import Counter
    bag = similar.bags([" ".join(w) for w in lists])
    import numpy as np
    i, j = (np.array(x) for x in zip(*[(a, b) for a in range(len(lists)) for b in range(len(lists))]))
    for a, b, s in zip(i, j, similar.jaccard(bag, i, bag, j)):
        x, y = Counter(lists[a]), Counter(lists[b])
        assert s == pytest.approx((x & y).total() / (x | y).total())


def test_split_without_groups_keeps_near_prompts_together():
    rng = random.Random(5)
    rows = [chat(sentence(rng, 15), n=i) for i in range(100)]
    rows += [chat(swap(r["prompt"][0]["content"], rng), n=100 + i) for i, r in enumerate(rows)]
    sides = [split(Data("a", rows, "messages", ""), 0.2, seed=1) for _ in range(2)]
    train, held = sides[0]
    assert not duplicates.leaked_rows(train, held) and len(held) == 40 and held.rows == sides[1][1].rows
    assert {r["row"] % 100 for r in held.rows} & {r["row"] % 100 for r in train.rows} == set()


# ---- tokens and the mask

def test_packing_is_trls():
    import pyarrow
    from trl.data_utils import _pack_bfd
    rng = random.Random(6)
    for length, most in ((64, 60), (100, 130), (32, 32)):
        lengths = [rng.randrange(1, most) for _ in range(700)]
        table = pyarrow.table({"input_ids": [[0] * n for n in lengths]})
        assert tokens.packed(lengths, length) == len(_pack_bfd(table, length))


GATES = {
    "no answer": (CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] != 'assistant' else '' }}"), "loses its answer"),
    "no end": (CHATML.replace("<|im_end|>", ""), "would not stop"),
    "two starts": ("<|im_start|>" + CHATML, "twice"),
    "no system": (CHATML.replace("for m in messages", "for m in messages if m['role'] != 'system'"), "loses its system message"),
    "no thinking": (CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}"), "often the thinking"),
    "prompt changes": (CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ '' if loop.last else ' ' }}"), "rewrites earlier turns"),
}


@pytest.mark.parametrize("template, said", GATES.values(), ids=GATES)
def test_every_gate_stops(template, said):
    rows = [chat("Why?", "<think>Hm.</think>Because.", 1, "Be brief."), chat("When?", "<think>So.</think>Now.", 2, "Be brief.")]
    found = tokens.measure(rows, make_tokenizer(template))[1]
    assert [p.level for p in found if said in str(p)] == ["error"], found
    assert not tokens.measure(rows, make_tokenizer())[1]


def test_a_cut_answer_stops():
    found = tokens.measure([chat("Why " * 30, n=1), chat("Hi", n=2)], make_tokenizer(), max_length=40)[1]
    assert any(p.level == "error" and "cuts off the whole answer" in p.problem for p in found)


# ---- the report

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>"
PERSONAL = ["ada@lovelace.org", "4111 1111 1111 1111", "+44 20 7946 0958", "DE89 3704 0044 0532 0130 00", "219-09-9999", "203.0.113.77", "sk-" + "a1B2" * 8]


@pytest.fixture(scope="module")
def planted(tmp_path_factory, tiny_model):
    "A report on 120 good rows and one of each kind of bad ones, with 20 evaluation rows of which 2 leak"
    rng, folder = random.Random(7), tmp_path_factory.mktemp("planted")
    good = [{"prompt": sentence(rng), "completion": rng.choice(["yes", "no"])} for _ in range(120)]
    bad = [{"prompt": "Empty?", "completion": "  "}, {"prompt": "Number?", "completion": 4111111111111111}, {"messages": [{"role": "user", "content": "Alone"}], "prompt": None}]
    odd = [{"prompt": t, "completion": "yes"} for t in [HOSTILE, "zero\u200bwidth", "bell\x07", "cafÃ©", "R&amp;D", "=" * 80, "Dear {{name}}", "x y " * 20_000, "stop<|im_end|> here"]]
    odd += [{"prompt": f"Mine is {p}", "completion": "no"} for p in PERSONAL] + [{"prompt": good[0]["prompt"].upper(), "completion": {"yes": "no", "no": "yes"}[good[0]["completion"]]}, {"prompt": "Help", "completion": "I'm sorry, but I can't help with that."}]
    train = write_rows(folder / "train.jsonl", good + bad + odd)
    held = write_rows(folder / "held.jsonl", [good[3], {"prompt": swap(good[4]["prompt"], rng), "completion": "yes"}, *({"prompt": sentence(rng), "completion": "no"} for _ in range(18))])
    return data_check.check(train, held, tiny_model, max_length=300, **SILENT)


def rows_with(report, word): return [p["row"] for p in report.problems if word in p["problem"]]


def test_every_planted_problem_is_found_with_its_row(planted):
    at = {word: rows_with(planted, word) for word in ("HTML tags", "invisible", "control", "wrong encoding", "entities", "repeated", "unfilled", "far longer", "refuse", "special token", "different answers")}
    assert at == {"HTML tags": ["row 124"], "invisible": ["row 125"], "control": ["row 126"], "wrong encoding": ["row 127"], "entities": ["row 128"], "repeated": ["row 129"], "unfilled": ["row 130"],
                  "far longer": ["row 131"], "refuse": ["row 141"], "special token": ["row 132"], "different answers": ["rows 1, 140"]}
    for word, n in (("is empty", 121), ("is int, not text", 122), ("is missing", 123)):
        assert any(p["level"] == "error" and f"row {n}" in p["row"] and word in p["problem"] for p in planted.problems), word
    assert planted.personal == {k: 1 for k in ("e-mail address", "card number", "phone number", "bank account", "social security number", "IP address", "secret key")}
    assert (planted.rows, planted.eval_rows, planted.leaked, [l["row"] for l in planted.leaks]) == (138, 20, 2, [1, 2])
    assert planted.tokens["truncated"] == 1 and any("cuts" in p["problem"] for p in planted.problems) and any("± 22 points" in p["problem"] for p in planted.problems)


def test_nothing_personal_is_printed_and_nothing_runs(planted):
    shown = "\n".join([json.dumps(planted.to_json()), str(planted), planted._repr_html_(), planted._repr_markdown_(), data_report.page(planted)])
    assert not [p for p in [*PERSONAL, "4111111111111111"] if p in shown]
    for html in (planted._repr_html_(), planted._repr_markdown_(), data_report.page(planted)):
        assert "<script" not in html and "<img src=x" not in html
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", data_report.page(planted)), "the page would fetch something"


def test_report_round_trip(planted):
    again = data_report.DataReport.from_json(json.loads(json.dumps(planted.to_json())))
    assert again == planted and again.to_json() == planted.to_json()
    assert {"rows", "unique", "effective", "near_duplicates", "leaked", "tokens", "trained_tokens", "truncated", "problems"} <= planted.to_json().keys()
    assert {"p50", "p95", "max"} <= planted.tokens.keys() and all({"row", "problem", "fix"} <= p.keys() for p in planted.problems)


def test_hostile_name_and_labels_are_escaped():
    rows = [chat(f"{w} {i}", HOSTILE[:30] if i % 2 else "$\\frac{x$ |`", i) for i, w in enumerate(WORDS[:60])]
    report = data_check.check(Data(HOSTILE, rows, "messages", fingerprint(rows)), model="", **SILENT)
    assert report.labels["field"] == "answer"
    for shown in (report._repr_html_(), report._repr_markdown_(), data_report.page(report)): assert "<script" not in shown and "<img src=x" not in shown
    assert data_report.png(report)[:4] == b"\x89PNG"


BAD = {
    "missing": ("nothing.jsonl", None, "does not exist"),
    "a picture": ("a.png", None, "of a kind that is not read"),
    "empty": ("empty.jsonl", None, "holds no rows"),
    "no usable row": ("broken.jsonl", None, "has no row that can be used"),
    "columns": ("columns.jsonl", None, "fit no known shape"),
    "not UTF-8": ("latin.csv", None, "is not UTF-8"),
    "the same file": ("good.jsonl", "good.jsonl", "is the training data too"),
    "the same file by another name": ("good.jsonl", "link.jsonl", "is the training data too"),
    "eval missing": ("good.jsonl", "no.jsonl", "no.jsonl"),
}


@pytest.mark.parametrize("file, held, said", BAD.values(), ids=BAD)
def test_bad_input_is_a_user_error_with_a_fix(tmp_path, file, held, said):
    write_rows(tmp_path / "good.jsonl", [{"text": "one"}, {"text": "two"}])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "good.jsonl")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    (tmp_path / "broken.jsonl").write_text("{\n{\n")
    write_rows(tmp_path / "columns.jsonl", [{"foo": 1, "bar": 2}])
    (tmp_path / "latin.csv").write_bytes("text\nna\u00efve\n".encode("latin-1"))
    with pytest.raises(UserError, match=re.escape(said)) as e: data_check.check(tmp_path / file, tmp_path / held if held else None, model="", **SILENT)
    assert all(p.fix for p in e.value.problems)


def test_all_mistakes_at_once(tmp_path):
    with pytest.raises(UserError) as e: data_check.check(tmp_path / "a.jsonl", tmp_path / "b.jsonl", "no such model", **SILENT)
    assert len(e.value.problems) == 3


def test_all_of_the_evaluation_leaks(tmp_path):
    rows = [{"prompt": w * 3, "completion": "x"} for w in WORDS[:20]]
    report = data_check.check(write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", rows[:9]), "", **SILENT)
    assert report.leaked == report.eval_rows == 9 and any("trained on too" in p["problem"] for p in report.stops)


def test_a_missing_package_is_a_note(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "py3langid", None)
    report = data_check.check(write_rows(tmp_path / "a.jsonl", [{"text": sentence(random.Random(1))}]), model="", **SILENT)
    assert report.languages == {} and any("pip install py3langid" in n for n in report.notes)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)).filter(lambda t: t[0].strip() and t[1].strip()), min_size=1, max_size=12))
def test_any_text_gives_a_report(pairs):
    rows = [chat(a, b, i) for i, (a, b) in enumerate(pairs, 1)]
    report = data_check.check(Data("any", rows, "messages", ""), model="", **SILENT)
    assert 1 <= report.effective <= report.unique <= report.rows == len(rows)
    data_report.page(report)


def test_files_and_answer(tmp_path, tiny_model):
    found, shown = data_check.answer(write_rows(tmp_path / "a.jsonl", [{"text": sentence(random.Random(i))} for i in range(30)]), model=tiny_model, out=tmp_path / "out", **SILENT)
    assert found["rows"] == 30 and sorted(p.name for p in (tmp_path / "out").iterdir()) == ["data.html", "data.json", "data.png"] and "page: " in shown
    assert data_report.DataReport.from_json(json.loads((tmp_path / "out/data.json").read_text())).rows == 30


def test_pipeline(tmp_path):
    "The notebook runs under papermill, and refuses a parameter it does not know"
    import papermill
    from finetune_nb.runs import pipeline
    from papermill.exceptions import PapermillExecutionError
    file = write_rows(tmp_path / "a.jsonl", [{"text": sentence(random.Random(i))} for i in range(9)])
    go = lambda **given: papermill.execute_notebook(str(pipeline("data")), str(tmp_path / "out.ipynb"), dict(data=str(file), model="") | given, kernel_name="python3", progress_bar=False)
    go(out=str(tmp_path / "report"))
    assert (tmp_path / "report/data.html").exists()
    with pytest.raises(PapermillExecutionError, match="Did you mean 'max_length'"): go(max_lenght=3)


def test_needs_no_torch():
    heavy = "{'torch', 'transformers', 'peft', 'trl', 'datasets', 'sklearn', 'cleanlab'}"
    code = f"import sys; from finetune_nb import data_check as d; d.check(d.Data('a', [dict(text='one', row=1)], 'text', ''), model=''); print(*sorted({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
