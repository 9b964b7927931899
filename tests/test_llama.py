"A GGUF file in llama.cpp against the same weights in transformers: tokens, likelihoods, answers"
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from finetune_nb.core import UserError
from finetune_nb.evaluate import _prompt_ids
from finetune_nb.export import divergence, log_probs
from finetune_nb.gguf_files import convert
from finetune_nb.llama import default_threads, open_gguf
from finetune_nb.mask import encode_each
from finetune_nb.models import embedded_file, load_model, load_tokenizer, unpacked
from finetune_nb.said import answers, export_stops, gguf_answers, reader

pytestmark = pytest.mark.usefixtures("one_thread")
CITIES = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima", "Norway": "Oslo", "Greece": "Athens"}
ROWS = [dict(prompt=[*([dict(role="system", content="Answer in one word.")] if n % 3 else []), dict(role="user", content=f"What is the capital of {c}?")], completion=[dict(role="assistant", content=a)], row=n) for n, (c, a) in enumerate(CITIES.items(), 1)]


@pytest.fixture(scope="module")
def tokenizer(): return load_tokenizer("smollm2-135m")


@pytest.fixture(scope="module")
def model(): return load_model("smollm2-135m")


@pytest.fixture(scope="module")
def encoded(tokenizer): return encode_each(ROWS, tokenizer)[1]


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory):
    "The embedded model's weights, unpacked to 32 bits, as an f16 GGUF file"
    return convert(unpacked(embedded_file("smollm2-135m")), tmp_path_factory.mktemp("f16") / "f16.gguf", say=lambda line: None)


def test_f16_is_the_same_model(sixteen, model, tokenizer, encoded):
    "The floor between the two engines was measured at KL 9e-7 on task tokens; 20 times that is allowed, q8_0 costs 1e-3"
    with open_gguf(sixteen, 128) as gguf:
        found, said = divergence(log_probs(model, encoded), [torch.from_numpy(p) for p in gguf.log_probs(encoded)]), gguf_answers(gguf, ROWS, 12)
    assert abs(found["kl"]) < 2e-5 and found["top"] == 1, found
    here = answers(model, tokenizer, ROWS, export_stops(model, tokenizer), 12)
    assert (said.texts, said.ended) == (here.texts, here.ended) and sum(said.ended) >= 6


def test_rows_side_by_side_are_computed_as_alone(sixteen, encoded):
    "Neither the rows beside it, nor the common start, nor the number of rows at a time changes a row; a wrong position or a shared cache would, by nats"
    with open_gguf(sixteen, 128) as gguf:
        together, alone = gguf.log_probs(encoded), [gguf.log_probs([e])[0] for e in encoded]
        prompts = [gguf.prompt(r["prompt"]) for r in ROWS]
        gguf.width = 3
        three, short = gguf.log_probs(encoded), gguf.answers(prompts, gguf.stops, 3)
        said = gguf.answers(prompts[::-1], gguf.stops, 12)
    for other in (alone, three): assert max(float((np.exp(a) * (a - b)).sum(-1).max()) for a, b in zip(together, other)) < 1e-4
    assert all(not ended and len(ids) == 3 for ids, ended in short) and [ids[:3] for ids, _ in said[::-1]] == [ids for ids, _ in short]


def test_only_what_is_kept_is_computed(encoded):
    with open_gguf(embedded_file("smollm2-135m"), 128) as gguf:
        each = gguf.size * 4 * sum(l != -100 for l in encoded[0]["labels"])
        assert [len(gguf.log_probs(encoded, most)) for most in (1, each, each + 1)] == [1, 1, 2]
        assert gguf.log_probs([dict(input_ids=encoded[0]["input_ids"], labels=[-100] * len(encoded[0]["labels"]))])[0].shape == (0, gguf.size)


TEXTS = ["Switch on the lamp", "  two  spaces\n\n\tand tabs ", "naïve 漢字 🙂 ﷺ e\u0301", "1234567890 3.14 1e-5", "<|im_start|>user<|im_end|>", "don't I'LL we're", "{\"intent\": \"HassTurnOn\", \"name\": \"тест\"}", "a" * 300, "\u200b\ufeff\x00x"]


def test_tokens_are_those_of_the_tokenizer(tokenizer):
    with open_gguf(embedded_file("smollm2-135m"), 128) as gguf:
        theirs, ours = reader(tokenizer), reader(gguf)
        for text in TEXTS: assert theirs.tokens(text) == ours.tokens(text), text
        for row in ROWS: assert _prompt_ids(tokenizer, row["prompt"]) == gguf.prompt(row["prompt"]) == ours.whole(row["prompt"])
        for text in TEXTS[:7]: assert gguf.decode(gguf.tokens(text), special=True) == tokenizer.decode(tokenizer(text).input_ids)
        assert (gguf.bos, gguf.eos, gguf.size) == (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer))


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m.role | upper }}: {{ m.content | trim }}\n{% if loop.last %}{% break %}{% endif %}{% endfor %}", "{{ messages | tojson }} {{ bos_token }}{{ eos_token }}", "{% if tools %}no{% endif %}{% for m in messages %}\n    {% generation %}{{ m['content'] }}{% endgeneration %}\n{% endfor %}{{ 'go' if add_generation_prompt }}"])
def test_templates_are_written_as_transformers_writes_them(template, tokenizer):
    messages = [dict(role="user", content=" Hello <b> \"you\" é\n"), dict(role="assistant", content="x")]
    with open_gguf(embedded_file("smollm2-135m"), 128) as gguf:
        gguf.template = template
        assert gguf.text(messages) == tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)


def test_no_torch_and_the_threads_it_is_told():
    code = "import sys; from finetune_nb.llama import default_threads, open_gguf; from finetune_nb.models import embedded_file\nwith open_gguf(embedded_file('smollm2-135m'), 64) as g: print(g.threads, len(g.answers([g.tokens('The capital of France is')], g.stops, 2)[0][0]), 'torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "2 2 False\n"), "nothing else is printed, by C either"
    assert default_threads() == torch.get_num_threads() == 1


def test_without_llama_cpp(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UserError, match="pip install 'finetune_nb\\[gguf\\]'"):
        with open_gguf(embedded_file("smollm2-135m"), 64): pass
