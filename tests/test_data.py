"Data from every kind of file, every bad row, the split, and the loss mask against TRL's own"
import csv
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from finetune_nb.core import UserError
from finetune_nb.data import SHAPES, Data, clusters, messages_text, prompt_key, read, save, split
from finetune_nb.rowfile import fingerprint

QA = [("Capital of France?", "Paris, \"the\" capital."), ("2+2?", "4"), ("Größe, in\nzwei Zeilen?", "Ja; naïve 😀")]
WANTED = [{"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}], "row": i} for i, (q, a) in enumerate(QA, 1)]
say = lambda role, content: {"role": role, "content": content}
U, A = say("user", "Hi"), say("assistant", "Hello")

ROWS = {
    "messages": lambda q, a: {"messages": [say("user", q), say("assistant", a)]},
    "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "prompt-completion": lambda q, a: {"prompt": q, "completion": a},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "prompt-response": lambda q, a: {"prompt": q, "response": a},
    "instruction-response": lambda q, a: {"instruction": q, "response": a},
    "question-answer": lambda q, a: {"question": q, "answer": a},
    "input-output": lambda q, a: {"input": q, "output": a},
}


# ---- writing one list of rows in every kind of file

def write_lines(path, rows): path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
def write_list(path, rows): path.write_text(json.dumps(rows), encoding="utf-8")
def write_data(path, rows): path.write_text(json.dumps({"version": 1, "data": rows}), encoding="utf-8")


def write_table(path, rows):
    with open(path, "w", newline="", encoding="utf-8-sig") as f:
        out = csv.DictWriter(f, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        out.writeheader()
        out.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in r.items()} for r in rows)


def write_parquet(path, rows):
    import pyarrow, pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_saved(path, rows):
    from datasets import Dataset
    Dataset.from_list(rows).save_to_disk(path)


def write_parts(path, rows):
    from datasets import Dataset, DatasetDict
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])}).save_to_disk(path)


FILES = {"a.jsonl": write_lines, "a.ndjson": write_lines, "a.json": write_list, "b.json": write_data, "a.csv": write_table, "a.tsv": write_table,
         "a.parquet": write_parquet, "saved": write_saved, "parts": write_parts}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("shape", ROWS)
def test_every_shape_in_every_file_gives_the_same_rows(tmp_path, file, shape):
    FILES[file](tmp_path / file, [ROWS[shape](q, a) for q, a in QA])
    data = read(tmp_path / file)
    assert (data.rows, data.shape, data.sha256) == (WANTED, shape, fingerprint(WANTED))
    assert data.name == file and not data.problems


@pytest.mark.parametrize("file", FILES)
def test_plain_text_in_every_file(tmp_path, file):
    FILES[file](tmp_path / file, [{"text": q} for q, _ in QA])
    data = read(tmp_path / file)
    assert data.rows == [{"text": q, "row": i} for i, (q, _) in enumerate(QA, 1)] and data.shape == "text"


def test_every_shape_is_tested(): assert {*ROWS, "text"} == set(SHAPES)


@pytest.mark.parametrize("file", ["a.jsonl", "a.csv", "a.parquet"])
def test_prompt_and_completion_as_messages(tmp_path, file):
    FILES[file](tmp_path / file, [{"prompt": [say("user", q)], "completion": [say("assistant", a)]} for q, a in QA])
    assert read(tmp_path / file).rows == WANTED


# ---- what is decided, and said

def reading(tmp_path, rows, **options):
    write_lines(tmp_path / "train.jsonl", rows)
    return read(tmp_path / "train.jsonl", **options)


def test_one_row_an_answer(tmp_path):
    data = reading(tmp_path, [{"messages": [say("system", "S"), U, A, say("user", "And?"), say("assistant", "So."), say("user", "Bye")]}])
    assert [[m["content"] for m in r["prompt"]] for r in data.rows] == [["S", "Hi"], ["S", "Hi", "Hello", "And?"]]
    assert [r["row"] for r in data.rows] == [1, 1]
    assert data.notes == ["1 conversation with several answers became 2 rows, one per answer", "1 conversation ended with a user turn, which was left out"]


def test_answers_in_the_prompt_are_context(tmp_path):
    data = reading(tmp_path, [{"prompt": [U, A, say("user", "And?")], "completion": "So."}])
    assert len(data) == 1 and len(data.rows[0]["prompt"]) == 3


def test_system_message(tmp_path):
    rows = [{"messages": [U, A]}, {"messages": [say("system", "Own"), U, A]}, {"messages": [say("system", ""), U, A]}, {"messages": [U, A], "system": "Column"}]
    data = reading(tmp_path, rows, system="Given")
    assert [r["prompt"][0] for r in data.rows] == [say("system", s) for s in ("Given", "Own", "Given", "Column")]
    assert "2 rows kept the system message of their own" in data.notes
    assert [len(r["prompt"]) for r in reading(tmp_path, rows).rows] == [1, 2, 1, 2]
    assert "plain text" in reading(tmp_path, [{"text": "x"}], system="Given").notes[0]


def test_alpaca_input_and_dolly_context(tmp_path):
    assert reading(tmp_path, [{"instruction": "Sum up", "input": "A text", "output": "T"}]).rows[0]["prompt"] == [say("user", "Sum up\n\nA text")]
    assert reading(tmp_path, [{"instruction": "Sum up", "context": "A text", "response": "T"}]).rows[0]["prompt"] == [say("user", "Sum up\n\nA text")]


def test_aliases_and_ignored_columns_are_said(tmp_path):
    data = reading(tmp_path, [{"question": "q", "answer": "a", "id": 1}, {"question": "q", "answer": "a", "score": 2}])
    assert data.notes == ["Column 'question' was read as the prompt and 'answer' as the completion", "Ignored columns: id, score"]
    assert reading(tmp_path, [{"messages": [U, {**A, "weight": 0}]}]).notes == ["Ignored columns: weight (in messages)"]


def test_groups(tmp_path):
    data = reading(tmp_path, [{"text": "a", "group": "g"}, {"text": "b", "template": 7}, {"text": "c", "group": None}])
    assert [r.get("group") for r in data.rows] == ["g", "7", None]


def test_max_rows(tmp_path):
    rows = [{"text": str(i)} for i in range(300)]
    assert len(reading(tmp_path, rows, max_rows=250)) == 250
    assert reading(tmp_path, rows, max_rows=2).notes == ["Only the first 2 rows were read"]
    assert reading(tmp_path, rows, max_rows=300).notes == []


def test_jsonl_is_read_no_further_than_asked(tmp_path):
    (tmp_path / "big.jsonl").write_bytes(b'{"text": "ok"}\n' * 200 + b"\xff not json\n")
    assert len(read(tmp_path / "big.jsonl", max_rows=150)) == 150


def test_spreadsheets(tmp_path):
    (tmp_path / "eu.csv").write_bytes("\ufeffprompt;completion\r\nWas, bitte?;\"Dies; das\"\r\n".encode())
    assert read(tmp_path / "eu.csv").rows == [{"prompt": [say("user", "Was, bitte?")], "completion": [say("assistant", "Dies; das")], "row": 1}]
    (tmp_path / "long.csv").write_text("prompt,completion\nq," + "x" * 200_000 + "\n")
    assert len(read(tmp_path / "long.csv").rows[0]["completion"][0]["content"]) == 200_000


def test_parts_of_a_dataset(tmp_path):
    write_parts(tmp_path / "parts", [{"text": "a"}, {"text": "b"}])
    assert len(read(tmp_path / "parts", split="test")) == 1
    with pytest.raises(UserError, match="Did you mean 'test'"): read(tmp_path / "parts", split="tset")


def test_hub(tmp_path, monkeypatch):
    import datasets
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or datasets.Dataset.from_list([{"text": "x"}]))
    data = read("owner/name", split="test")
    assert (data.name, len(data), asked) == ("owner/name", 1, [(("owner/name",), {"split": "test"})])

    def fails(*a, **k): raise ConnectionError("no route\nlong text")
    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(UserError, match="could not be loaded from the hub") as e: read("owner/name")
    assert "ConnectionError: no route" in str(e.value) and "long text" not in str(e.value)
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="does not exist"): read("data/train")


# ---- every mistake has a place and a fix

LINES = {
    "not an object": ("[1, 2]", "row 2: is not an object", 'Write {"prompt"'),
    "invalid JSON": ('{"prompt": "q", "completion": ', "row 2: is not valid JSON", "complete JSON object"),
    "deep JSON": ("[" * 100_000, "row 2: is not valid JSON", "complete JSON object"),
    "wrong encoding": ('{"prompt": "q", "completion": "\u00e9"}'.encode("latin-1"), "row 2: is not UTF-8: byte 0xE9 at position 32", "Save the file as UTF-8"),
    "missing answer": ('{"prompt": "q"}', "row 2, completion: is missing", "Write the text"),
    "null answer": ('{"prompt": "q", "completion": null}', "row 2, completion: is missing", "Write the text"),
    "empty answer": ('{"prompt": "q", "completion": ""}', "row 2, completion: is empty", "leave the row out"),
    "blank answer": ('{"prompt": "q", "completion": " \\n\\u00a0"}', "row 2, completion: is empty", "leave the row out"),
    "number": ('{"prompt": "q", "completion": 4}', "row 2, completion: is int, not text (got 4)", "text in quotes"),
    "not a number": ('{"prompt": "q", "completion": NaN}', "row 2, completion: is float, not text", "text in quotes"),
    "object": ('{"prompt": "q", "completion": {"a": 1}}', "row 2, completion: is dict, not text", "text in quotes"),
    "empty prompt": ('{"prompt": "", "completion": "a"}', "row 2, prompt: is empty", "leave the row out"),
    "half an emoji": ('{"prompt": "q", "completion": "\\ud83d"}', "row 2, completion: holds half of a character", "Write the character"),
    "half an emoji in the group": ('{"prompt": "q", "completion": "a", "group": "\\ud83d"}', "row 2, group: holds half of a character", "Write the character"),
    "message not an object": ('{"prompt": ["q"], "completion": "a"}', "row 2, prompt message 1: is not an object", 'Write {"role"'),
    "odd role": ('{"prompt": [{"role": ["user"], "content": "q"}], "completion": "a"}', "row 2, prompt message 1: has the unknown role", "Did you mean 'user'"),
}


@pytest.mark.parametrize("line, place, fix", LINES.values(), ids=LINES)
def test_bad_line(tmp_path, line, place, fix):
    good = b'{"prompt": "q", "completion": "a"}\n'
    (tmp_path / "train.jsonl").write_bytes(good + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good)
    with pytest.raises(UserError) as e: read(tmp_path / "train.jsonl")
    assert f"train.jsonl {place}" in str(e.value) and fix in str(e.value) and len(e.value.problems) == 1
    data = read(tmp_path / "train.jsonl", strict=False)
    assert [r["row"] for r in data.rows] == [1, 3] and [p.level for p in data.problems] == ["warning"]
    assert "1 of 3 rows could not be used and were left out" in data.notes


CHATS = {
    "two users": ([U, U, A], "message 2: has the role 'user' where 'assistant' is due", "alternate"),
    "assistant first": ([A, U, A], "message 1: has the role 'assistant' where 'user' is due", "Begin with user"),
    "late system": ([U, say("system", "s"), A], "message 2: has the role 'system' where 'assistant' is due", "alternate"),
    "system then assistant": ([say("system", "s"), A], "message 2: has the role 'assistant' where 'user' is due", "Begin with user"),
    "unknown role": ([U, say("asistant", "x")], "message 2: has the unknown role 'asistant'", "Did you mean 'assistant'?"),
    "no role": ([{"content": "x"}, A], "message 1: has the unknown role 'None'", "Choose one of"),
    "tool": ([U, say("tool", "x")], "message 2: is a tool call or a tool's result", "Leave the row out"),
    "function": ([U, say("function", "x")], "message 2: is a tool call or a tool's result", "Leave the row out"),
    "tool call": ([U, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}], "message 2: is a tool call", "Leave the row out"),
    "no answer": ([U], "has no assistant turn", "Add the answer"),
    "only system": ([say("system", "s")], "has no assistant turn", "Add the answer"),
    "only an empty system": ([say("system", "")], "has no assistant turn", "Add the answer"),
    "null content": ([U, say("assistant", None)], "message 2: is missing", "Write the text"),
    "number": ([U, say("assistant", 3.5)], "message 2: is float, not text (got 3.5)", "text in quotes"),
    "parts": ([U, say("assistant", [{"type": "text", "text": "x"}])], "message 2: is list, not text", "text in quotes"),
    "empty": ([], "holds no list of messages", 'Write [{"role"'),
    "not a list": ("hello", "holds no list of messages", 'Write [{"role"'),
    "null": (None, "holds no list of messages", 'Write [{"role"'),
    "not messages": (["hello"], "message 1: is not an object", 'Write {"role"'),
}


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("chat, place, fix", CHATS.values(), ids=CHATS)
def test_bad_chat(tmp_path, column, chat, place, fix):
    if column == "conversations" and isinstance(chat, list):
        chat = [{{"role": "from", "content": "value"}.get(k, k): v for k, v in m.items()} if isinstance(m, dict) else m for m in chat]
    with pytest.raises(UserError) as e: reading(tmp_path, [{column: chat}])
    assert place in str(e.value) and fix in str(e.value) and "train.jsonl row 1" in str(e.value)


SOURCES = {
    "empty file": ("a.jsonl", b"", "a.jsonl: holds no rows", "at least one row"),
    "blank lines": ("a.jsonl", b"\n \n", "a.jsonl: holds no rows", "at least one row"),
    "empty list": ("a.json", b"[]", "a.json: holds no rows", "at least one row"),
    "only a header": ("a.csv", b"prompt,completion\n", "a.csv: holds no rows", "at least one row"),
    "empty csv": ("a.csv", b"", "a.csv: holds no rows", "at least one row"),
    "one object": ("a.json", b'{"prompt": "q", "completion": "a"}', "a.json: holds no list of rows", '{"data": [row'),
    "lines named json": ("a.json", b'{"text": "q"}\n{"text": "q"}', "a.json: is not valid JSON", "name the file .jsonl"),
    "json encoding": ("a.json", b'[{"text": "\xe9"}]', "a.json: is not UTF-8: byte 0xE9 at position 12", "UTF-8"),
    "utf-16": ("a.csv", "text\nhello\n".encode("utf-16"), "a.csv: is not UTF-8: byte 0xFF at position 1", "UTF-8"),
    "csv encoding": ("a.csv", b"text\n\xe9\n", "a.csv: is not UTF-8: byte 0xE9 at position 6", "UTF-8"),
    "csv fields": ("a.csv", b"prompt,completion\na,b,c\n", "a.csv row 1: has more fields than the first line names", "quotes"),
    "csv short": ("a.csv", b"prompt,completion\na\n", "a.csv row 1, completion: is missing", "Write the text"),
    "csv quote": ("a.csv", b'prompt,completion\na,b\na,"b\nc,d\n', "a.csv row 2: is not valid CSV", "Close every quote"),
    "parquet": ("a.parquet", b"PAR1 not really", "a.parquet: could not be read as Parquet", "complete"),
    "other kind": ("a.txt", b"hello", "a.txt: is of a kind that is not read", "Save it as JSONL"),
    "columns": ("a.csv", b"Promt,Completion\na,b\n", "a.csv: has the columns 'Completion', 'Promt'", "Rename 'Promt' to 'prompt' and 'Completion' to 'completion'"),
    "unlike columns": ("a.csv", b"x,y\na,b\n", "a.csv: has the columns 'x', 'y'", "to 'prompt' and the one with the answer to 'completion'"),
    "one column": ("a.csv", b"sentence\na\n", "a.csv: has the columns 'sentence'", "Rename"),
    "numbers": ("a.json", b"[1, 2]", "a.json row 1: is not an object", "Write"),
}


@pytest.mark.parametrize("file, content, place, fix", SOURCES.values(), ids=SOURCES)
def test_bad_source(tmp_path, file, content, place, fix):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError) as e: read(tmp_path / file)
    assert place in str(e.value) and fix in str(e.value)


def test_missing_file_and_folder(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "x"}')
    with pytest.raises(UserError, match="does not exist. Did you mean 'train.jsonl'?"): read(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match="There is no data file"): read(tmp_path / "none" / "train.jsonl")
    with pytest.raises(UserError, match="no dataset was saved in it. Name a file in it: train.jsonl"): read(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="could not be read as a saved dataset"): read(tmp_path / "broken")


def test_many_bad_rows_are_told_at_once_and_capped(tmp_path):
    with pytest.raises(UserError) as e: reading(tmp_path, [{"text": ""}] * 30)
    assert len(e.value.problems) == 21 and "11 more problems" in str(e.value.problems[-1])
    data = reading(tmp_path, [{"text": ""}] * 30 + [{"text": "x"}], strict=False)
    assert len(data) == 1 and len(data.problems) == 21 and {p.level for p in data.problems} == {"warning"}
    with pytest.raises(UserError, match="no row that can be used"): reading(tmp_path, [{"text": ""}], strict=False)


# ---- split, overlap, save

def made(rows): return Data("made.jsonl", rows, "text", fingerprint(rows))


def test_split_keeps_prompts_groups_and_conversations_together():
    rng = random.Random(0)
    rows = [{"text": f"t{rng.randrange(60)}", "row": i // 2 + 1, **({"group": f"g{rng.randrange(30)}"} if i % 5 == 0 else {})} for i in range(100)]
    train, held = split(made(rows), 0.2, seed=3)
    for key in (prompt_key, lambda r: r["row"], lambda r: r.get("group", id(r))): assert not {key(r) for r in train.rows} & {key(r) for r in held.rows}
    assert sorted(map(json.dumps, train.rows + held.rows)) == sorted(map(json.dumps, rows))
    assert len(held) <= 20


def test_split_follows_its_seed():
    rows = [{"text": f"sentence {i}", "row": i} for i in range(1, 101)]
    halves = [split(made(rows), 0.25, seed=s) for s in (1, 1, 2)]
    assert halves[0][1].rows == halves[1][1].rows != halves[2][1].rows
    assert [len(h[1]) for h in halves] == [25] * 3 and halves[0][0].sha256 != halves[0][1].sha256
    assert len(split(made(rows), 0.25, 1, max_eval_rows=7)[1]) == 7
    assert len(split(made(rows[:3]), 0.1, 1)[1]) == 1


@pytest.mark.parametrize("rows", [[], [{"text": "a", "row": 1}], [{"text": "A", "row": 1}, {"text": "a ", "row": 2}], [{"text": str(i), "row": i, "group": "g"} for i in range(9)]], ids=["none", "one", "same prompt", "one group"])
def test_split_leaves_no_side_empty(rows):
    with pytest.raises(UserError, match="cannot be split"): split(made(rows), 0.5, 1)


def test_clusters_of_many_rows_are_quick():
    rows = [{"text": f"t{i}", "row": i, "group": "one"} for i in range(50_000)]
    assert len(clusters(rows)) == 1


text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda s: s.strip())
turns = st.lists(st.tuples(text, text), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(turns, st.none() | text, st.none() | text, st.integers(1, 10**6)), min_size=1, max_size=5))
def test_saved_rows_read_back_equal(tmp_path_factory, chats):
    rows = []
    for pairs, system, group, number in chats:
        messages = [say("system", system)] * (system is not None) + [m for q, a in pairs for m in (say("user", q), say("assistant", a))]
        rows.append({"prompt": messages[:-1], "completion": messages[-1:], "row": number, **({"group": group} if group is not None else {})})
    path = save(rows, tmp_path_factory.mktemp("kept") / "rows.jsonl")
    back = read(path)
    assert back.rows == rows and back.sha256 == fingerprint(rows) and not back.notes


anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), v, max_size=3), max_leaves=8)


def data_or_user_error(path, **options):
    try: assert all({"row"} < set(r) for r in read(path, **options).rows)
    except UserError as e: assert all(p.place and p.problem and p.fix for p in e.problems)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([*SHAPES.values(), ("group", "text"), ("system", "messages"), ("row", "text"), ("instruction", "input", "output")]), st.data())
def test_any_values_give_rows_or_a_user_error(tmp_path_factory, columns, draw):
    rows = draw.draw(st.lists(st.fixed_dictionaries({c: anything for c in columns}), min_size=1, max_size=3))
    write_list(path := tmp_path_factory.getbasetemp() / "any.json", rows)
    data_or_user_error(path, system="S")
    data_or_user_error(path, strict=False)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["any.jsonl", "any.json", "any.csv", "any.tsv", "any.parquet"]), st.binary() | st.text().map(str.encode) | st.binary().map(lambda b: b"prompt,completion\n" + b))
def test_any_bytes_give_rows_or_a_user_error(tmp_path_factory, name, content):
    (path := tmp_path_factory.getbasetemp() / name).write_bytes(content)
    data_or_user_error(path)


def test_text_for_people(): assert messages_text({"prompt": [say("system", "S"), U], "completion": [A], "row": 1}) == "system: S\nuser: Hi\nassistant: Hello"


def test_report_holds_no_markup(tmp_path):
    data = reading(tmp_path, [{"text": "x", "<img src=x>": 1}])
    assert "<img" not in data._repr_markdown_() and "img" in data._repr_markdown_()


# ---- the mask, against TRL

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def tiny_tokenizer(template=CHATML, starts=False):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    raw.train_from_iterator(["The capital of France is Paris.", "user system assistant"], trainer)
    if starts: raw.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>" if template else "<|end|>", bos_token="<|im_start|>", pad_token="<|end|>", chat_template=template)


CHAT_ROWS = [*WANTED, {"prompt": [say("system", "Be short."), U, A, say("user", "Why?")], "completion": [say("assistant", "Because.")], "row": 4}]
TEXT_ROWS = [{"text": "The capital of France is Paris.", "row": 1}, {"text": "It ends itself.<|im_end|>", "row": 2}]


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(vocab_size=400, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))


CASES = {
    "chat": (CHAT_ROWS, dict(), {}),
    "chat, everything trained": (CHAT_ROWS, dict(), dict(train_on="all")),
    "chat, cut": (CHAT_ROWS, dict(), dict(max_length=50, cut_answers=True)),
    "chat, start token": (CHAT_ROWS, dict(starts=True), {}),
    "text": (TEXT_ROWS, dict(), {}),
    "text, start token": (TEXT_ROWS, dict(starts=True), {}),
    "text, cut": (TEXT_ROWS, dict(), dict(max_length=9)),
    "no template": (CHAT_ROWS, dict(template=None), {}),
    "no template, start token": (CHAT_ROWS, dict(template=None, starts=True), {}),
}


@pytest.mark.parametrize("rows, make, options", CASES.values(), ids=CASES)
def test_same_tokens_as_trl(tmp_path, model, rows, make, options):
    from datasets import Dataset
    from finetune_nb.mask import encode_all, plain
    from trl import SFTConfig, SFTTrainer
    tokenizer = tiny_tokenizer(**make)
    ours, problems = encode_all(rows, tokenizer, **options)
    assert not [p for p in problems if p.level == "error"] and any(e["cut"] for e in ours) == ("max_length" in options)
    given = [dict(zip(("prompt", "completion"), plain(r, tokenizer))) if "prompt" in r and not tokenizer.chat_template else {k: r[k] for k in r if k != "row"} for r in rows]
    args = SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_length=options.get("max_length"), disable_tqdm=True,
                     completion_only_loss=False if options.get("train_on") == "all" else None)
    theirs = SFTTrainer(model, args=args, train_dataset=Dataset.from_list(given), processing_class=tokenizer).train_dataset
    assert [(r["input_ids"], r["labels"]) for r in theirs] == [(e["input_ids"], e["labels"]) for e in ours]


def test_mask_problems():
    from finetune_nb.mask import encode_all
    place = lambda rows, template=CHATML, **options: [(p.level, p.place) for p in encode_all(rows, tiny_tokenizer(template), **options)[1]]
    assert place(CHAT_ROWS) == []
    assert place(CHAT_ROWS, CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] != 'assistant' else '' }}")) == [("error", "rows 1, 2, 3, 4")]
    assert place(CHAT_ROWS, "{{ raise_exception('System role not supported') if messages[0]['role'] == 'system' }}" + CHATML) == [("error", "row 4")]
    assert place(CHAT_ROWS, CHATML.replace("<|im_end|>", "")) == [("error", "chat template")]
    assert place(CHAT_ROWS, CHATML.replace("<|im_end|>", "{{ '<|im_end|>' if m['content'] != 'Because.' or m['role'] != 'assistant' }}"))[0] == ("warning", "row 4")
    assert place(CHAT_ROWS, max_length=5) == [("error", "max_length")]
    assert place(TEXT_ROWS, max_length=5) == [("error", "max_length")]


def test_length_to_set_saves_the_rows():
    from finetune_nb.mask import encode_all
    tokenizer = tiny_tokenizer()
    long = {"prompt": [say("user", "q" * 50)], "completion": [say("assistant", "a")], "row": 9}
    problem = next(p for p in encode_all([*CHAT_ROWS, long], tokenizer, max_length=40)[1] if p.level == "error")
    assert "2 of 5 rows (rows 4, 9)" in problem.problem
    needed = int(problem.fix.split("Raise max_length to ")[1].split(",")[0])
    assert all(any(i != -100 for i in e["labels"]) for e in encode_all([*CHAT_ROWS, long], tokenizer, max_length=needed)[0])


def test_modules_need_no_torch():
    import subprocess, sys
    code = "import sys, finetune_nb.data, finetune_nb.mask; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets', 'pandas', 'pyarrow')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent).returncode == 0


def test_rows_with_a_time_are_split_by_it(tmp_path):
    rows = [dict(prompt=f"{a} {b} {c}?", completion="yes", date=f"{2020 + i % 5}-03-0{1 + i % 9}") for i, (a, b, c) in enumerate((a, b, c) for a in ("how", "why") for b in ("red", "blue", "tall", "slow", "wet") for c in ("cats", "boats", "trees"))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = read(str(tmp_path / "rows.jsonl"))
    train, held = split(data, 0.2, 7)
    assert len(held) == 6 and max(r["time"] for r in train.rows) <= min(r["time"] for r in held.rows) and "date" not in " ".join(data.notes)
    assert split(data, 0.2, 8)[1].sha256 == held.sha256
    save(data.rows, tmp_path / "again.jsonl")
    assert read(str(tmp_path / "again.jsonl")).sha256 == data.sha256
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r | (dict(date="soon") if i == 4 else {})) for i, r in enumerate(rows)))
    assert "seed 7" in split(read(str(tmp_path / "rows.jsonl")), 0.2, 7)[0].notes[-1]
