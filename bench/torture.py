"""Stop, kill, harm and starve trainings, and compare each, gone on with, bit for bit with one that was left alone.

usage: python bench/torture.py [--matrix N] [--kills N] [--harm] [--disk] [--notebooks N] [--at-once N] [--whole N] [--two] [--seconds S] --out bench/results/DATE-torture.json

--matrix N   the first N (0: all 432) of method × dropout × accumulation × packing or grouping × workers × shortcuts × place of the stop,
             those that cover every pair of values first, then those that bring each of the 72 settings of the first five once
--kills N    SIGKILL at a random moment, every second one while a checkpoint is being saved; then gone on with to the end
--harm       each file of the newest checkpoint missing, half, zeroed and with one bit flipped; then gone on with
--disk       a tmpfs with room for two checkpoints and a half of the next (needs the right to mount)
--notebooks N  SIGKILL at a random moment while papermill keeps saving the output notebook through our writer; then another writer finishes it
--at-once N  N times eight runs begun at one moment: a folder, a training and its end in eight processes, all with the same recipe
--whole N    N times eight runs begun at one moment by the command `finetune-nb run`, with papermill and a kernel each
--two        two processes over gloo, dropout 0.1 and length grouping: gone on with from the second of three checkpoints (ways none, zero2, fsdp)
--seconds S  begin no further trial after this time; what was done is recorded

Everything runs on a random Llama of four layers on the CPU, one thread. Results say how many were asked for and how many were done.
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import conftest  # noqa: E402
import exact  # noqa: E402
import torch  # noqa: E402

from finetune_nb.checkpoint import MARK, damage, found, newest, size as size_of  # noqa: E402
from finetune_nb import folder as run_folders, runs  # noqa: E402
from finetune_nb.core import UserError, read_json, sha256_file, write_json  # noqa: E402
from finetune_nb.hardware import cores, versions  # noqa: E402
from finetune_nb.recipe import make  # noqa: E402

VALUES = exact.BASE | exact.METHODS["lora"] | exact.PASSES[1] | dict(lora_dropout=0.1, save_steps=1, eval_steps=1, log_steps=2, best_at_end=True, keep_checkpoints=2)
FILES = ("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "progress_0.json", "manifest.json", MARK)
HARM = {"missing": None, "half": lambda b: b[:len(b) // 2], "zeroed": lambda b: bytes(len(b)), "flipped": lambda b: b[:len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1:]}


def apart(do):
    "Run a function in a process of its own, forked from this one, which has loaded everything; its pid"
    pid = os.fork()
    if pid: return pid
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    try: do()
    except BaseException: os._exit(1)
    os._exit(0)


def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kills(n, place, model, rows, until, seed=0):
    "n runs killed at random moments of random steps, each gone on with"
    train = lambda out, resume=False: lambda: exact.run(VALUES, model, rows, out, resume)
    start = time.monotonic()
    assert ended(apart(train(place / "straight"))) == 0
    length, last, rng = time.monotonic() - start, max(s for s, _ in found(place / "straight" / "checkpoints")), random.Random(seed)
    result = dict(asked=n, done=0, same=0, failed=[], in_the_middle_of_saving=0, unmarked=0, after_the_end=0, went_on_from={})
    for i in range(n):
        if time.monotonic() > until: break
        out, after = place / f"kill-{i}", rng.randint(0, last)
        place_of, partial = out / "checkpoints", out / "checkpoints" / "partial"
        pid, end = apart(train(out)), time.monotonic() + 5 * length
        reached = lambda: after == 0 or any(s >= after for s, _ in found(place_of))
        while not reached() and time.monotonic() < end: time.sleep(0.001)
        if after == 0: time.sleep(rng.uniform(0, length))  # also while the model is loaded
        elif i % 2: time.sleep(rng.uniform(0, length / last / 2))
        else:  # a moment within the next save
            while not partial.exists() and time.monotonic() < end and after < last: time.sleep(0.0002)
            time.sleep(rng.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        result["after_the_end"] += ended(pid) == 0
        result["in_the_middle_of_saving"] += partial.exists()
        result["unmarked"] += any(not (p / MARK).exists() for _, p in found(place_of))
        path = newest(place_of)[0]
        name = path.name if path else "the beginning"
        result["went_on_from"][name] = result["went_on_from"].get(name, 0) + 1
        code = ended(apart(train(out, True)))
        wrong = exact.same(place / "straight", out) if code == 0 else [f"going on ended with {code}"]
        count(result, i, wrong)
        if not wrong: shutil.rmtree(out)
    return result


def harm(place, model, rows, until):
    "Every file of the newest checkpoint, harmed in every way: the older one is taken and the end is the same"
    assert ended(apart(lambda: exact.run(VALUES, model, rows, place / "straight"))) == 0
    assert ended(apart(lambda: exact.run(VALUES, model, rows, place / "stopped", stop=5))) == 0
    result = dict(asked=len(FILES) * len(HARM), done=0, older_taken=0, same=0, failed=[])
    for name in FILES:
        for how, do in HARM.items():
            if time.monotonic() > until: return result
            out = place / f"{name}-{how}"
            shutil.copytree(place / "stopped", out)
            file = out / "checkpoints" / "checkpoint-5" / name
            file.write_bytes(do(file.read_bytes())) if do else file.unlink()
            result["older_taken"] += newest(out / "checkpoints")[0].name == "checkpoint-4"
            code = ended(apart(lambda: exact.run(VALUES, model, rows, out, True)))
            wrong = exact.same(place / "straight", out) if code == 0 else [f"going on ended with {code}"]
            result["done"] += 1
            result["same"] += not wrong
            if wrong: result["failed"].append([name, how, wrong])
            else: shutil.rmtree(out)
    return result


def disk(place, model, rows):
    "A run folder on a disk that is too small; after it grew, the run is gone on with"
    values = VALUES | dict(best_at_end=False)
    exact.run(values, model, rows, place / "straight")
    one = size_of(found(place / "straight" / "checkpoints")[0][1])
    small = place / "small"
    small.mkdir()
    size = lambda n: f"size={int(n)}"  # pages, folders and the metrics need a little of it
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", size(2.5 * one), "tmpfs", str(small)], capture_output=True, text=True)
    if done.returncode: return dict(done=False, why=done.stderr.strip())
    try:
        said, told = [], ""
        # the room that is asked for is taken away, so that the disk fills while it is written to
        import finetune_nb.resume as resume
        room, resume.room = resume.room, lambda folder, needed: ""
        try: exact.run(values, model, rows, small / "run", say=said.append)
        except UserError as e: told = str(e)
        resume.room = room
        kept = [s for s, p in found(small / "run" / "checkpoints") if not damage(p)]
        first = dict(stopped=told[:300], warnings=sum("was not saved" in s for s in said), whole_checkpoints=kept, partial_left=(small / "run" / "checkpoints" / "partial").exists())
        subprocess.run(["mount", "-o", f"remount,{size(20 * one)}", str(small)], check=True)
        exact.run(values, model, rows, small / "run", resume=True)
        return dict(done=True, bytes_of_a_checkpoint=one, disk=int(2.5 * one), **first, same_after_it_grew=exact.same(place / "straight", small / "run") == [])
    finally: subprocess.run(["umount", str(small)])


def matrix(n, place, model, rows, until):
    "Stopped and gone on with, over the settings"
    first, result, reached = exact.pairs(), dict(asked=0, done=0, same=0, failed=[], settings=0), set()
    rest = [c for c in exact.every() if c not in first]
    random.Random(0).shuffle(rest)
    settings = lambda c: tuple(v for k, v in c.items() if k not in ("fast", "stop"))
    seen = {settings(c) for c in first}
    rest.sort(key=lambda c: settings(c) in seen or seen.add(settings(c)) is not None)  # every setting once, before any twice
    cases = (first + rest)[:n or None]
    result["asked"] = len(cases)
    for i, c in enumerate(cases):
        if time.monotonic() > until: break
        out, answer = place / f"case-{i}", place / f"answer-{i}"
        def go():
            answer.write_text("\n".join(exact.interrupted_equals_straight(c, model, rows, out)))
        code = ended(apart(go))
        wrong = answer.read_text() if code == 0 else f"ended with {code}"
        count(result, c, wrong)
        reached.add(settings(c))
        result["settings"] = len(reached)
        shutil.rmtree(out, ignore_errors=True)
    return result


def count(result, trial, wrong):
    "Add a trial that was done to a result"
    result["done"] += 1
    result["same"] += not wrong
    if wrong: result["failed"].append([trial, wrong])


def leftovers(place):
    "Names of files below a folder that were begun and not finished"
    return sorted(str(p.relative_to(place)) for p in Path(place).rglob("*") if p.name == "partial" or p.name.startswith("."))


def big_notebook(cells=20, size=100_000):
    "A notebook whose cells have outputs of many bytes, so that a write takes a while"
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook, new_output
    nb = new_notebook(cells=[new_code_cell(f"step {i}", outputs=[new_output("stream", text="words " * (size // 6))]) for i in range(cells)], metadata=dict(papermill={}))
    nbformat.validate(nb)
    return nb


def write_forever(folder):
    "papermill's own saves, of every cell's beginning and end, through the writer that a run uses"
    from papermill.engines import NotebookExecutionManager
    nb = big_notebook()
    outputs = [c.outputs for c in nb.cells]
    with runs._written_whole(folder):
        while True:
            manager = NotebookExecutionManager(nb, str(folder / "notebook.ipynb"), progress_bar=False, autosave_cell_every=1e-9)
            manager.notebook_start()
            for i, cell in enumerate(nb.cells):
                manager.cell_start(cell, i)
                cell.outputs = outputs[i]
                manager.autosave_cell()
                manager.cell_complete(cell, i)
            manager.notebook_complete()


def broken(notebook):
    "Why a notebook is no valid one, or an empty text"
    import nbformat
    try: nbformat.validate(nbformat.read(notebook, as_version=4))
    except Exception as e: return f"{type(e).__name__}: {str(e)[:100]}"
    return ""


def notebooks(n, place, until, seed=0):
    "n kills of a process that saves its notebook; each time another one then writes it to the end in the same folder"
    import nbformat
    from papermill.iorw import write_ipynb
    rng, nb = random.Random(seed), big_notebook(2)
    result = dict(asked=n, done=0, absent=0, valid=0, invalid=0, in_the_middle_of_writing=0, written_later=0, failed=[])
    for i in range(n):
        if time.monotonic() > until: break
        folder = place / f"run-{i}"
        folder.mkdir()
        pid, end = apart(lambda: write_forever(folder)), time.monotonic() + 30
        while i % 10 and not any(folder.iterdir()) and time.monotonic() < end: time.sleep(0.001)  # every tenth one may be killed before the first write
        time.sleep(rng.uniform(0, 0.5))
        while i % 2 and not leftovers(folder) and time.monotonic() < end: pass  # every second one in the middle of a write
        os.kill(pid, signal.SIGKILL)
        code, notebook = ended(pid), folder / "notebook.ipynb"
        why = "" if code == -signal.SIGKILL else f"ended by itself with {code}"
        result["in_the_middle_of_writing"] += bool(leftovers(folder))
        if notebook.exists():
            why = why or broken(notebook)
            result["invalid" if broken(notebook) else "valid"] += 1
        else: result["absent"] += 1
        with runs._written_whole(folder): write_ipynb(nb, str(notebook))
        later = not broken(notebook) and nbformat.read(notebook, as_version=4).cells == nb.cells
        result["written_later"] += later
        result["done"] += 1
        if why or not later: result["failed"].append([i, why or "could not be written later"])
        shutil.rmtree(folder)
    return result


TRAINED = exact.BASE | exact.METHODS["lora"] | exact.PASSES[1] | dict(lora_dropout=0.1, name="same")


def one_of_many(out, model, rows, when):
    "What one of the runs does: wait for the moment, make its folder, train, end"
    time.sleep(max(0, when - time.monotonic()))
    recipe = make("stock", **TRAINED | dict(model=model, data=rows))
    folder = run_folders.begin(run_folders.new_folder(out, "same"), recipe)
    exact.run(TRAINED, model, rows, folder)
    run_folders.finish(folder, dict(curve=exact.curve(folder), weights={p.name: sha256_file(p) for p in (folder / "adapter").glob("*.safetensors")}))


def wrong_together(out, codes, metrics):
    "What is wrong with runs that were begun at one moment"
    made = [p for p in out.iterdir() if p.is_dir()]
    done = [p for p in made if (p / "run.json").exists() and run_folders.status(p) == "done"]
    found = [f"a run ended with {c}" for c in codes if c] + ([f"{len(made)} folders, {len(done)} done, of {len(codes)}"] if not len(made) == len(done) == len(codes) else [])
    if len({json.dumps(metrics(p), sort_keys=True) for p in done}) != 1: found.append("results differ")
    return found + [f"{name} is left" for name in leftovers(out)]


def at_once(n, place, model, rows, until, many=8):
    "n times many runs begun at one moment; every result must be the very same"
    result = dict(asked=n, runs_each=many, done=0, same=0, failed=[])
    for i in range(n):
        if time.monotonic() > until: break
        out, when = place / f"round-{i}", time.monotonic() + 0.3
        pids = [apart(lambda: one_of_many(out, model, rows, when)) for _ in range(many)]
        wrong = wrong_together(out, [ended(p) for p in pids], lambda p: [read_json(p / "metrics.json"), exact.weights(p) and sha256_file(p / "adapter" / "adapter_model.safetensors")])
        count(result, i, wrong)
        shutil.rmtree(out)
    return result


def whole(n, place, model, rows, until, many=8):
    "n times many runs begun at one moment by the command, as papermill and a kernel do them"
    result = dict(asked=n, runs_each=many, done=0, same=0, failed=[])
    given = TRAINED | dict(model=model, data=rows, max_steps=3, max_eval_rows=2, max_new_tokens=4, rehearse=False, threads=1)
    for i in range(n):
        if time.monotonic() > until: break
        out = place / f"round-{i}"
        command = [*conftest.COMMAND, "run", "--preset", "stock", *conftest.settings(**{k: json.dumps(v) if isinstance(v, bool) else v for k, v in given.items()}), "--out", out, "--json"]
        answers = [conftest.ended(p, 1200) for p in [conftest.start(*command, cwd=place, PYTHONPATH=str(Path(__file__).resolve().parents[1])) for _ in range(many)]]
        wrong = wrong_together(out, [a[0] for a in answers], lambda p: read_json(p / "metrics.json")) + [f"{p.name} is no valid notebook" for p in out.rglob("*.ipynb") if broken(p)]
        if wrong: wrong.append(next((a[2][-500:] for a in answers if a[0]), ""))
        count(result, i, wrong)
        shutil.rmtree(out, ignore_errors=True)
    return result


def two(place, model, until, ways=("none", "zero2", "fsdp")):
    "Two processes with dropout and length grouping: from the second of three checkpoints to the end, against the whole"
    import test_distribute as t
    rows = place / "rows"
    rows.mkdir()
    conftest.write_rows(rows / "train.jsonl", conftest.chat_rows()[:24]), conftest.write_rows(rows / "eval.jsonl", conftest.chat_rows()[24:])
    result = dict(asked=len(ways), done=0, same=0, ways={}, failed=[])
    for way in ways:
        if time.monotonic() > until: break
        recipe = t.recipe("lora", model, rows, lora_dropout=0.1, group_by_length=True)
        made = {name: t.run_folder(place / way / name, recipe, rows, way, resume=name == "resumed") for name in ("straight", "again", "resumed")}
        config = t.write(t.files(way, "float32", 64, 100_000, 2, device="cpu", folder=place / way), place / way)[0]
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, t.HERE / "distribute_worker.py", made["straight"], f"{made['straight']}>{made['resumed']}", made["again"]]
        code, out, err = conftest.ended(conftest.start(*command, cwd=t.HERE.parent, PYTHONPATH=str(t.HERE.parent)), timeout=900)
        plain = lambda name: [{k: v for k, v in l.items() if k != "total_flos"} for l in exact.curve(made[name])]  # what is left out: see tests/test_distribute.py
        differ = lambda name: ([] if exact.weights(made[name]) and exact.weights(made[name]) == exact.weights(made["straight"]) else ["weights differ"]) + ([] if plain(name) == plain("straight") else ["curves differ"])
        wrong = differ("resumed") if code == 0 else [f"ended with {code}: {err[-800:]}"]
        result["ways"][way] = dict(resumed=wrong or "same", repeated=(differ("again") or "same") if code == 0 else "not seen", losses=t.history(made["straight"])[::2] if code == 0 else [])
        count(result, way, wrong)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrix", type=int, default=-1)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--harm", action="store_true")
    parser.add_argument("--disk", action="store_true")
    parser.add_argument("--notebooks", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=0)
    parser.add_argument("--whole", type=int, default=0)
    parser.add_argument("--two", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    until, start, result = time.monotonic() + args.seconds, time.monotonic(), {}
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        model, rows = conftest.save_model(place / "model"), str(conftest.write_rows(place / "rows.jsonl", conftest.chat_rows()))
        for name, asked, do in (("notebooks", args.notebooks, lambda p: notebooks(args.notebooks, p, until)), ("at_once", args.at_once, lambda p: at_once(args.at_once, p, model, rows, until)),
                                ("two", args.two, lambda p: two(p, model, until)), ("whole", args.whole, lambda p: whole(args.whole, p, model, rows, until)), ("disk", args.disk, lambda p: disk(p, model, rows)), ("harm", args.harm, lambda p: harm(p, model, rows, until)),
                                ("kills", args.kills, lambda p: kills(args.kills, p, model, rows, until)), ("matrix", args.matrix >= 0, lambda p: matrix(args.matrix, p, model, rows, until))):
            if not asked: continue
            (place / name).mkdir()
            began = time.monotonic()
            result[name] = do(place / name) | dict(seconds=round(time.monotonic() - began))
            write_json(args.out, dict(question="is a training that was stopped, killed, harmed or starved, and gone on with, bit for bit the one that was left alone", **result, model="Llama, 4 layers of 64, random", cores=cores(), versions=versions(), seconds=round(time.monotonic() - start)))
            print(name, result[name], flush=True)


if __name__ == "__main__":
    main()
