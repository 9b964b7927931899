"Rows in a file go through every step as rows in a list do"
import json
import random

import pytest

from finetune_nb import data, duplicates, encoded, job, mask, rowfile
from finetune_nb.core import UserError
from finetune_nb.data_check import check
from finetune_nb.mask import encode_all
from finetune_nb.models import load_tokenizer
from finetune_nb.recipe import make
from finetune_nb.rowfile import Rows, fingerprint


def chats(n):
    "Rows of which some repeat others, some hold two answers, and some come in groups"
    r = random.Random(3)
    for i in range(n):
        said = f"please set the {r.choice(['lamp', 'fan', 'blind'])} number {r.randrange(n)} in the {r.choice(['hall', 'attic', 'office'])} to {i % 101} percent"
        turns = [dict(role="user", content=said), dict(role="assistant", content=f"Done: {i} ✓")]
        yield dict(messages=turns * (1 + i % 7 // 6)) | (dict(group=f"g{i // 4}") if i % 3 else {})


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    place = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    place.write_text("".join(json.dumps(r) + "\n" for r in chats(400)))
    return place


@pytest.fixture
def few(monkeypatch):
    "Lists of more than 10 rows, and tables of more than 100 tokens, go to files"
    monkeypatch.setattr(rowfile, "AT_ONCE", 10)
    monkeypatch.setattr(encoded, "HELD", 100)


def steps(file, tmp_path, name):
    "{step: what it gave}"
    tokenizer, found = load_tokenizer("smollm2-135m"), {}
    whole = data.read(file, system="Be short.")
    train, held = data.split(whole, 0.2, 1)
    found |= dict(kinds={type(d.rows) for d in (whole, train, held)}, whole=list(whole.rows), prints=[d.sha256 for d in (whole, train, held)], train=list(train.rows), held=list(held.rows))
    found["leaks"] = duplicates.leaked_rows(train.rows, whole.rows[50:80])
    found["sizes"] = duplicates.sizes(train)
    tokens, problems = encode_all(train, tokenizer, 60, cut_answers=True)
    found |= dict(tokens=list(tokens), problems=list(map(str, problems)), table=encoded.table(tokens)[:])
    found["saved"] = data.save(train.rows, tmp_path / f"{name}.jsonl").read_bytes()
    found["again"] = list(data.read(tmp_path / f"{name}.jsonl").rows)
    found["report"] = check(train, held, say=lambda line: None).to_json()
    found["drawn"] = [list(d.rows) for d in job.rows(make("stock", data=str(file), max_rows=50, max_eval_rows=12))]
    return found


def test_every_step_gives_the_same(file, tmp_path, few, monkeypatch):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(mask, "key_of", lambda *known: "")  # else one takes the tokens that the other kept
        in_files = steps(file, tmp_path, "files")
        monkeypatch.undo()
        in_lists = steps(file, tmp_path, "lists")
    assert (in_files.pop("kinds"), in_lists.pop("kinds")) == ({Rows}, {list})
    for name, value in in_lists.items(): assert in_files[name] == value, name
    assert in_lists["again"] == in_lists["train"] and in_lists["leaks"]


def test_a_row_that_cannot_be_encoded_is_left_out_of_many(few, file):
    rows = list(data.read(file).rows)
    rows[7] = rows[7] | dict(completion=[dict(role="assistant", content="<think>no</think>x" * 3)])
    tokenizer = load_tokenizer("smollm2-135m")
    tokenizer.chat_template = "{% for m in messages %}{% if 'think' not in m.content %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    good, problems = encode_all(Rows(rows), tokenizer)
    assert len(good) == len(rows) - 1 and any("loses its answer" in str(p) for p in problems)


def test_many_bad_rows_are_all_told(few, tmp_path):
    place = tmp_path / "bad.jsonl"
    place.write_text("".join(json.dumps(dict(prompt=f"question {i}", completion="" if i % 50 == 7 else "yes")) + "\n" for i in range(300)))
    with pytest.raises(UserError, match="row 8, completion: is empty") as told: data.read(place)
    assert len(told.value.problems) == 6
    kept = data.read(place, strict=False)
    assert isinstance(kept.rows, Rows) and len(kept) == 294 and "6 of 300 rows could not be used and were left out" in kept.notes


def test_nothing_is_left_in_the_cache(few, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_NB_CACHE", str(tmp_path))
    rows = Rows(dict(row=i) for i in range(1000))
    assert rows[999] == dict(row=999) and not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINETUNE_NB_CACHE", str(tmp_path / "file" / "cache"))
    assert list(Rows([dict(row=1)])) == [dict(row=1)]


def test_the_fingerprint_is_that_of_a_list(file):
    rows = data.read(file).rows
    assert fingerprint(Rows(rows)) == fingerprint(rows) == fingerprint(iter(rows))
