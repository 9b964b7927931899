"The tutorials: what they tell people to type exists, what they link is there, and each has the parts a person in trouble looks for"
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from finetune_nb.answers import QUESTIONS
from finetune_nb.cli import parser
from finetune_nb.core import UserError
from finetune_nb.recipe import FIELDS, load

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "nbs/tutorials"
NAMES = ["your_data", "which_format", "to_ollama", "reproduce", "from_another_tool", "out_of_memory", "qlora_24gb", "many_gpus"]
PARTS = ["In short", "How to tell that it worked", "What goes wrong, and how it shows", "Next"]
CELLS = 40
KEPT = {"torch", "ipywidgets", "ipykernel", "ipython", "numpy", "pandas"}  # what an installation in Colab must leave as it is
VERBS = next(a for a in parser()._actions if a.dest == "verb").choices


def read(name): return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])
def prose(cells): return "\n\n".join(source(c) for c in cells if c["cell_type"] == "markdown")
def code(cells): return [c for c in cells if c["cell_type"] == "code"]
def blocks(text, language): return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(text):
    "The `finetune-nb …` lines of shell blocks, as words"
    lines = [shlex.split(line, comments=True) for line in "".join(blocks(text, "sh")).splitlines()]
    return [words[words.index("finetune-nb") + 1:] for words in lines if "finetune-nb" in words]


def command_problems(text):
    "What cannot be typed as it stands"
    for words in commands(text):
        try: args = parser().parse_args(words)
        except UserError as e: yield f"finetune-nb {' '.join(words)}: {e}"
        else: yield from (f"finetune-nb {' '.join(words)}: {n} is not a setting" for n, _ in getattr(args, "p", []) if n not in (QUESTIONS if args.verb == "decide" else FIELDS))
    inline = re.findall(r"`finetune-nb ([^`]*)`", text)
    yield from (f"finetune-nb {line}: no such verb" for line in inline if line.split()[0] not in VERBS)
    for name in re.findall(r"-p (\w+)", " ".join(re.findall(r"`([^`\n]*)`", text))):
        if name not in FIELDS: yield f"-p {name}: not a setting"


def link_problems(text, folder):
    "Links to files that are not there"
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", link) and not (folder / link.split("#")[0]).is_file(): yield f"links {link}, which is not there"


def recipe_problems(text, folder):
    "Recipes that do not load"
    for n, block in enumerate(blocks(text, "yaml")):
        (folder / f"{n}.yaml").write_text(block)
        try: load(folder / f"{n}.yaml")
        except UserError as e: yield str(e)


def part_problems(cells):
    "What every tutorial has"
    text = prose(cells)
    if not re.match(r"# .+\n\n> \S.+", source(cells[0])): yield "does not open with a title and one `>` sentence"
    for part in PARTS:
        if not re.search(rf"^## {part}$", text, re.M): yield f"has no part {part!r}"
    if not commands(text): yield "shows no command"
    trouble = text.partition("## What goes wrong, and how it shows")[2].partition("\n## ")[0]
    if len(re.findall(r"^\|.*\|.*\|.*\|$", trouble, re.M)) < 6: yield "names fewer than four things that go wrong, with cause and remedy"
    if len(cells) > CELLS: yield f"has {len(cells)} cells, more than {CELLS}"


def form_problems(cells):
    "The first code cells: an installation for Colab alone, then the page's parameters, each a field of its form"
    first, *rest = code(cells)
    if "#@title" not in source(first) or 'if "google.colab" in' not in source(first): yield "the first code cell does not install in Colab alone"
    guarded = source(first).partition("google.colab")[2]
    if "pip" in source(first).partition("google.colab")[0] or not all(f'"{p}"' in guarded for p in KEPT): yield "what Colab has of torch, widgets and kernel is not kept"
    if any(re.search(r"^\s*[!%]|\bpip install\b", source(c), re.M) for c in rest if "unsloth" not in source(c)): yield "a later cell installs or runs a command"
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    if tagged != rest[:1]: yield "the second code cell must be the one tagged parameters"
    for line in (l for c in tagged for l in source(c).splitlines()):
        if not re.fullmatch(r"""\w+ = ("[^"]*"|[\d.]+|True|False)  #@param (\[".*"\]|\{.*\})( \{allow-input: true\})?""", line): yield f"is no field of a form: {line}"


def output_problems(cells):
    "Real outputs are kept: most cells that end in a value show it, and none shows an error"
    shown = [bool(c["outputs"]) for c in code(cells)[2:] if re.search(r"^(?!import |from |assert |@)[\w({\[f]", source(c).rstrip().splitlines()[-1]) and not re.search(r"^.*[;=]\s*$|^\w[\w, ]* = ", source(c).rstrip().splitlines()[-1])]
    if len(shown) < 3 or sum(shown) < 0.5 * len(shown): yield f"only {sum(shown)} of {len(shown)} results are kept"
    if any(o["output_type"] == "error" for c in code(cells) for o in c["outputs"]): yield "an error is kept"


@pytest.mark.parametrize("name", NAMES)
def test_a_tutorial(name, tmp_path):
    cells = read(name)
    text = prose(cells)
    found = [*part_problems(cells), *form_problems(cells), *output_problems(cells), *command_problems(text), *link_problems(text, FOLDER), *recipe_problems(text, tmp_path)]
    assert not found, "\n- ".join([name, *found])


def test_the_cell_for_colab_is_the_same_everywhere():
    assert len({re.sub(r"\./finetune_nb(\[\w+\])?", "./finetune_nb", source(code(read(n))[0])) for n in (*NAMES, "should_i_finetune")}) == 1


def test_the_cell_for_colab_knows_the_address():
    "Of pyproject.toml; empty while it has none"
    address = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {}).get("Repository", "")
    wrong = [n for n in (*NAMES, "studio", "should_i_finetune") if f'repository = "{address}"  #@param' not in "".join(source(c) for c in code(read(n)))]
    assert not wrong, f"write repository = \"{address}\" into the first code cell of {', '.join(wrong)}"


def test_no_page_pretends_to_have_an_address():
    texts = [(FOLDER / f"{n}.ipynb").read_text(encoding="utf-8") for n in NAMES]
    assert not [n for n, t in zip(NAMES, texts) if "colab-badge" in t or "colab.research" in t]


def test_papermill_sets_the_parameters(tmp_path):
    "A page without a model, run with other parameters as papermill does it"
    target = tmp_path / "out.ipynb"
    done = subprocess.run([sys.executable, "-m", "papermill", str(FOLDER / "out_of_memory.ipynb"), str(target), "-k", "python3", "-p", "gpu", "A100 80GB", "-p", "method", "qlora", "--cwd", str(FOLDER), "--no-progress-bar"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fits A100 80GB" in target.read_text(encoding="utf-8")


# ---- can each check fail?

GOOD = """# Title\n\n> A sentence.\n\n## In short\n\n```sh\nfinetune-nb run recipe.yaml -p seed 7  # why\ncd x && finetune-nb runs\n```\n\n```yaml\nseed: 7\n```\n
## How to tell that it worked\n\n[a](a.ipynb)\n\n## What goes wrong, and how it shows\n\n""" + "| a | b | c |\n" * 6 + "\n## Next\n"


def page(text=GOOD, head='#@title I\nif "google.colab" in str(get_ipython()):\n    keep("torch", "ipywidgets", "ipykernel", "ipython", "numpy", "pandas")', form='model = "m"  #@param ["m", "n"] {allow-input: true}', outputs=("x",), more=""):
    "The cells of a small tutorial"
    make = lambda text, kind="code", tags=(), outputs=(): dict(cell_type=kind, source=text, metadata=dict(tags=list(tags)), outputs=list(outputs))
    return [make(text, "markdown"), make(head), make(form, tags=["parameters"]), *(make("show()", outputs=[dict(output_type="stream")] if outputs else []) for _ in range(3)), *([make(more)] if more else [])]


@pytest.mark.parametrize("check", [part_problems, form_problems, output_problems])
def test_a_good_page_passes(check): assert not list(check(page()))


def test_good_text_passes(tmp_path):
    (tmp_path / "a.ipynb").write_text("")
    assert not [*command_problems(GOOD), *link_problems(GOOD, tmp_path), *recipe_problems(GOOD, tmp_path)] and len(commands(GOOD)) == 2


@pytest.mark.parametrize("check, cells", [
    (part_problems, page(GOOD.replace("> A", "A"))), (part_problems, page(GOOD.replace("## In short", "## Short"))), (part_problems, page(GOOD.replace("| a | b | c |\n", "", 3))), (part_problems, page(GOOD.replace("finetune-nb", "x"))), (part_problems, page() * 7),
    (form_problems, page(head="%pip install x")), (form_problems, page(head=page()[1]["source"].replace('"torch", ', ""))), (form_problems, page(form='model = "m"')), (form_problems, page(form='model = f()  #@param {type: "string"}')), (form_problems, page(more="!pip install torch")),
    (output_problems, page(outputs=())),
], ids=["no sentence", "a part is missing", "too few troubles", "no command", "too long", "installs anywhere", "replaces torch", "no form", "a parameter that is computed", "installs later", "no outputs"])
def test_a_bad_page_is_found(check, cells): assert list(check(cells))


@pytest.mark.parametrize("text", ["```sh\nfinetune-nb runn x\n```", "```sh\nfinetune-nb run x --nonsense\n```", "```sh\nfinetune-nb run -p no_setting 1\n```", "try `finetune-nb mend`", "set `-p lora_rank 8`", "[x](not-there.ipynb)", "```yaml\nno_setting: 1\n```"])
def test_bad_text_is_found(text, tmp_path): assert [*command_problems(text), *link_problems(text, tmp_path), *recipe_problems(text, tmp_path)]
