"What several test files share: a tiny model, its tokenizer, rows with JSON answers, and the command line as a person starts it"
import json
import os
import signal
import subprocess
import sys
import time

import hypothesis
import pytest

hypothesis.settings.register_profile("steady", derandomize=True)  # the same examples each time; HYPOTHESIS_PROFILE=default makes up others
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", WANDB_MODE="offline")  # nothing here may ask the network

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
NO_ANSWER = ("{% for m in messages if m['role'] != 'assistant' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
             "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
COMMAND = [sys.executable, "-c", "import sys; from finetune_nb.cli import main; sys.exit(main())"]  # what the script finetune-nb does
VERBS, ROOMS, THINGS = ["switch on", "switch off", "dim"], ["kitchen", "hall", "attic"], ["lamp", "heater", "radio"]


def chat_rows():
    "26 requests of very different length with JSON answers"
    wanted = [(v, r, t) for v in VERBS for r in ROOMS for t in THINGS][:26]
    say = lambda v, r, t, n: f"{v} the {t} in the {r}" + ", please" * (n % 5)
    answer = lambda v, r, t: json.dumps({"intent": v.replace(" ", "_"), "area": r, "name": t})
    return [{"prompt": [{"role": "user", "content": say(*w, n)}], "completion": [{"role": "assistant", "content": answer(*w)}]} for n, w in enumerate(wanted)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def make_tokenizer(template=CHATML):
    "A byte-level tokenizer of 330 tokens that can write any text"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator([json.dumps(r) for r in chat_rows()], trainers.BpeTrainer(vocab_size=330, special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"], initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|end|>", chat_template=template)


def make_llama(seed=0, **config):
    "A random Llama of 4 layers; its weights are large enough for the layers to matter"
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    settings = dict(vocab_size=332, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
                    initializer_range=0.15, attention_bias=True, mlp_bias=True, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return LlamaForCausalLM(LlamaConfig(**settings | config))


def save_model(folder, template=CHATML):
    make_llama().save_pretrained(folder)
    make_tokenizer(template).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory): return save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory): return str(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", chat_rows()))


@pytest.fixture(scope="session")
def frozen():
    "Every training ends with a garbage collection, which takes half a second if it walks through all that was imported"
    import gc
    import bitsandbytes, datasets, peft, transformers, trl  # noqa
    gc.collect()
    gc.freeze()


@pytest.fixture
def one_thread(frozen):
    "A model this small is many times slower on several threads; what a recipe sets is undone"
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(*arguments, cwd, **environment):
    "Start a command in a session of its own, with Ctrl-C switched on, as a terminal does (a script's background jobs have it off and pass that on)"
    return subprocess.Popen(list(map(str, arguments)), cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def ended(process, timeout=180):
    "(exit code, stdout, stderr) of a started command"
    try: out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"not done after {timeout} s:\n{out[-2000:]}\n{err[-2000:]}")
    return process.returncode, out, err


def settings(**values): return [a for k, v in values.items() for a in ("-p", k, v)]


def train_here(recipe, out, say=lambda line: None, model=None):
    "Rows, model, training in this process: (trainer, base as it was before adapters, encoded rows)"
    from finetune_nb import job, train
    from finetune_nb.models import load_tokenizer
    _, choices = job.check(recipe, say=say)
    rows, held = job.rows(recipe)
    tokenizer = load_tokenizer(recipe.model)
    encoded, _ = job.encode(recipe, rows, held, tokenizer, say=say)
    trainer = train.build(recipe, choices, job.model(recipe, choices) if model is None else model, tokenizer, rows.rows, held.rows, out, say=say)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    train.fit(trainer, recipe, out, say=say)
    return trainer, before, encoded


def losses(trainer): return [l[k] for l in trainer.state.log_history for k in ("loss", "eval_loss") if k in l]


def saved_weights(folder):
    from safetensors.torch import load_file
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def until(true, what, seconds=120):
    "What `true` gives once it gives something, asked again and again"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := true(): return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s: {what}")
