"""Forms without a browser: every setting once, there and back, problems, wrong typing, missing files, damaged rows, no widget left on paper.

What takes a while here: two kernels through nbclient and papermill, about ten seconds each on a free processor.
"""
import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import ipywidgets as W
import nbformat
import pytest

from finetune_nb.answers import QUESTIONS
from finetune_nb.cards import CARDS
from finetune_nb.core import UserError
from finetune_nb.data_view import DataView
from finetune_nb.decision_form import DecisionForm
from finetune_nb.forms import explain, limits, problems_html, read
from finetune_nb.recipe import FIELDS, PRESETS, load, make
from finetune_nb.recipe_form import RecipeForm

ROOT = Path(__file__).resolve().parents[1]
OTHER = {bool: lambda v: not v, int: lambda v: v + 2, float: lambda v: v / 2, str: lambda v: f"{v}x"}  # another good value of a type


def tree(widget):
    "A widget and all that it shows or can show"
    yield widget
    for child in getattr(widget, "children", ()): yield from tree(child)


def everything(form):
    "All widgets of a form, each group opened once"
    buttons, found = [w for w in tree(form.box) if isinstance(w, W.ToggleButtons)], {}
    for b in buttons:
        for option in list(b.options):
            b.value = option if isinstance(option, str) else option[1]
            found |= {id(w): w for w in tree(form.box)}
    return list(found.values())


def other(name):
    "A value of a setting that is not its default"
    field = FIELDS[name]
    choices = getattr(field.annotation, "__args__", ())
    return next(c for c in choices if c != field.default) if choices else OTHER[field.annotation](field.default)


@pytest.fixture
def form(): return RecipeForm(make("stock", model="Qwen/Qwen3-8B"))


@pytest.fixture(scope="module")
def shared():
    "A form, and the text of all its groups"
    form = RecipeForm(make("stock", model="Qwen/Qwen3-8B"))
    return form, html.unescape("".join(w.value for w in everything(form) if isinstance(w, W.HTML)))


# ---- every setting once, with help

def test_every_setting_has_exactly_one_control(form):
    named = [w.description for w in everything(form) if isinstance(w, (W.Text, W.Dropdown, W.Checkbox, W.Combobox)) and w.description in FIELDS]
    assert sorted(named) == sorted(FIELDS)
    assert list(form.controls) == list(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_setting(name, shared):
    "Its control has its help, its explanation is on the page, and a value goes in, comes out and reaches the recipe"
    form, beside = shared
    control, field = form.controls[name], FIELDS[name]
    assert (getattr(control, "tooltip", None) or control.description_tooltip) == field.description
    assert beside.count(f"{field.description} ") == 1
    assert explain(name) and all(r["why"] and r["source"] for r in explain(name))
    form.change(**{name: other(name)})
    assert getattr(form.value, name) == other(name)
    assert getattr(make("stock", **{name: read(control)}), name) == other(name)
    form.change(**{name: field.default})


# ---- there and back

@pytest.mark.parametrize("preset", PRESETS)
def test_recipe_survives_form_and_file(preset, form, tmp_path):
    form.use(preset)
    assert form.value == make(preset, model="Qwen/Qwen3-8B")
    files = form.write(tmp_path)
    assert load(files[0]) == form.value
    again = RecipeForm()
    again.value = load(files[0])
    assert again.value == form.value


def test_every_value_survives_form_and_file(form, tmp_path):
    "All settings away from their defaults at once, texts that YAML could misread among them"
    for name in FIELDS: form.change(**{name: other(name)})
    form.change(system="a: b # c\n- 'd' \"e\" {f} 5e-5 \u00e9", lora_targets="q_proj, v_proj", export="merged,gguf:q4_k_m")
    recipe = form.value
    form.controls["lora_targets"].value = "q_proj"
    form.text.value, form.path.value = "", str(tmp_path / "recipe.yaml")
    from finetune_nb.recipe import to_yaml
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    form.open.click()
    assert form.value == recipe


def test_papermill_parameters_make_the_same_recipe(form, tmp_path):
    import yaml
    form.use("laptop")
    form.change(learning_rate="5e-5", system="x: y", seed=7)
    values = yaml.safe_load(form.write(tmp_path)[1].read_text())
    assert make(values.pop("preset"), **values) == form.value
    assert isinstance(values["learning_rate"], float), "papermill would inject text where a number is meant"


# ---- problems

def test_problems_appear_and_go(form):
    form.change(packing=False, max_length=0)
    assert form.problems == [] and "Nothing speaks against it" in form.told.value
    form.controls["packing"].value = True
    assert "packing" in [p.place for p in form.problems] and "needs a length to pack to" in form.told.value
    form.controls["max_length"].value = "2048"
    assert form.problems == [] and "Nothing speaks against it" in form.told.value
    form.controls["learning_rate"].value = "0.01"
    assert [p.level for p in form.problems] == ["warning"] and "look" in form.told.value


@pytest.mark.parametrize("name, text, says", [
    ("lora_r", "sixteen", "valid integer"), ("lora_r", "16.5", "valid integer"), ("lora_r", "0", "at least 1"), ("lora_r", "", "valid integer"), ("lora_r", "1e9", "valid integer"), ("lora_r", "9" * 30, "valid integer"),
    ("learning_rate", "2e-4 please", "valid number"), ("learning_rate", "nan", "number"), ("learning_rate", "inf", "number"), ("learning_rate", "-1", "above 0"), ("epochs", "1,5", "valid number"),
    ("eval_fraction", "1", "below 1"), ("seed", "-3", "at least 0"), ("name", "../x", "letters, digits"), ("model", "", "at least 1"), ("data", "", "at least 1"), ("lora_targets", "q_proj;rm", "module name"),
])
def test_wrong_typing_is_told(form, name, text, says):
    "No exception leaves a callback, nothing is bent to fit, and the old memory bar does not stay"
    form.controls[name].value = text
    assert name in [p.place for p in form.problems] and says in form.told.value
    assert form.controls[name].value == text
    if name != "lora_targets":
        assert form.memory.value == "" and form.fit.layout.display == "none"
        with pytest.raises(UserError): form.value


def test_all_wrong_typing_at_once(form):
    form.change(lora_r="x", epochs="y", seed="z")
    assert [p.place for p in form.problems] == ["lora_r", "epochs", "seed"]


@pytest.mark.parametrize("path", ["no/such/file.jsonl", "~nobody_here/x.jsonl", "x" * 5000, "a\0b.jsonl", "rows.docx"])
def test_paths_that_do_not_exist(form, path):
    for name in ("data", "eval_data"):
        form.change(**{name: path})
        assert "mend" in form.told.value or "failed" in form.told.value
        assert form.value.model == "Qwen/Qwen3-8B" and "<svg" in form.memory.value
        form.change(**{name: FIELDS[name].default})
    assert "Nothing speaks against it" in form.told.value


@pytest.mark.parametrize("model", ["qwen3-8bb", "no/such/folder/config.json", "gone.gguf", "../..", "x y z", "<script>alert(1)</script>"])
def test_a_model_that_is_not_found(form, model):
    form.controls["model"].value = model
    assert "model" in [p.place for p in form.problems] or model in [p.place for p in form.problems]
    assert form.memory.value == "" and form.look.layout.display == ""
    form.look.click()
    assert "mend" in form.layers.value and "<script>" not in form.layers.value + form.told.value
    assert form.plan() is None


def test_a_folder_is_read_when_asked(form, tmp_path):
    "A folder's layers are not known until the button is pressed; then the bar is there"
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="llama", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, vocab_size=100)))
    (tmp_path / "model.safetensors").write_bytes(b"")
    form.controls["model"].value = str(tmp_path)
    assert form.memory.value == "" and form.look.layout.display == ""
    form.look.click()
    assert form.shapes().layers == 2 and "<svg" in form.memory.value and form.look.layout.display == "none"
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    again = RecipeForm(make("stock", model=str(tmp_path)))
    again.look.click()
    assert "mend" in again.layers.value and again.shapes() is None


@pytest.mark.parametrize("text", ["", "lora_r: [", "lora_r: 16\nlora_r: 8", "nonsense: 1", "- a\n- b", "lora_r: x"])
def test_a_recipe_file_that_is_damaged(form, tmp_path, text):
    before = form.value
    (tmp_path / "recipe.yaml").write_text(text)
    form.path.value = str(tmp_path / "recipe.yaml")
    form.open.click()
    assert ("mend" in form.done.value) == bool(text)
    if text: assert form.value == before, "a file that was refused has changed the form"


def test_a_folder_that_cannot_be_written(form, tmp_path):
    (tmp_path / "taken").write_text("a file")
    form.folder.value = str(tmp_path / "taken" / "deeper")
    form.save.click()
    assert "failed" in form.done.value or "mend" in form.done.value


# ---- memory

def bar_width(form): return sum(map(float, re.findall(r'<rect[^>]*width="([\d.]+)" height="24', form.memory.value)))


def test_the_bar_follows_the_rank_and_the_card():
    form = RecipeForm(make("stock", model="meta-llama/Llama-3.1-8B"), card="A100 80GB")
    widths = []
    for rank in ("8", "64", "256"):
        form.change(lora_r=rank)
        widths.append(bar_width(form))
    assert widths == sorted(set(widths))
    for name in CARDS:
        form.card.value = name
        assert "<svg" in form.memory.value and name in form.memory.value


@pytest.mark.parametrize("card", ["RTX 3060 12GB", "RTX 4090", "A100 80GB"])
@pytest.mark.parametrize("values", [dict(method="full"), dict(batch_size=64, gradient_checkpointing=False), dict(max_length=16384, lora_r=256, lora_alpha=512)])
def test_the_button_makes_it_fit(card, values):
    form = RecipeForm(make("stock", model="Qwen/Qwen3-4B", **values), card=card)
    if form.plan().fits: return
    if form.fit.layout.display == "none": return  # nothing would: the sentence says so
    form.fit.click()
    assert form.plan().fits, form.value


def test_the_name_of_the_card_stays_in_the_picture():
    "Also where the card's line is far to the left"
    form = RecipeForm(make("stock", model="meta-llama/Llama-3.1-70B", method="full"), card="RTX 3060 12GB")
    x, anchor = re.search(r'<text x="([\d.]+)" y="72.0" text-anchor="(\w+)">RTX 3060', form.memory.value).groups()
    assert anchor == "start" and float(x) < 220


def test_the_button_is_offered_at_all():
    form = RecipeForm(make("stock", model="Qwen/Qwen3-4B", batch_size=64, gradient_checkpointing=False), card="RTX 4090")
    assert form.plan().fits is False and form.fit.layout.display == "" and form._found


# ---- questions

def test_every_question_has_exactly_one_control():
    form = DecisionForm()
    assert sorted(w.description for w in everything(form) if isinstance(w, (W.Text, W.Dropdown)) and w.description in QUESTIONS) == sorted(QUESTIONS)
    shown = "".join(w.value for w in everything(form) if isinstance(w, W.HTML))
    for q in QUESTIONS.values(): assert q.question.split("'")[0] in shown


def test_an_open_question_says_so():
    "A choice of None would show as an empty box"
    form = DecisionForm()
    assert {c.label for c in form.controls.values() if isinstance(c, W.Dropdown)} == {"not known"} and form.answers.known() == {}


def test_answers_survive_the_form():
    given = dict(task="<b>sort</b> mail", fails="behaviour", narrow=True, eval_rows=120, baseline=0.4, target=0.9, prompting="optimizer", effective=700, requests=10**6, prompt_tokens=3000, citations=False)
    form = DecisionForm(given)
    assert form.answers.known() == given
    assert "<b>sort" not in form.text.value and "&lt;b&gt;sort" in form.text.value
    assert DecisionForm(form.answers).value == form.value


@pytest.mark.parametrize("name, text", [("rows", "-5"), ("baseline", "90"), ("requests", "1e400"), ("effective", "ten"), ("gpu_gb", "nan")])
def test_wrong_answers_are_told(name, text):
    form = DecisionForm()
    form.controls[name].value = text
    assert [p.place for p in form.problems] == [name] and "mend" in form.told.value
    assert form.drawn.value == form.text.value == ""
    with pytest.raises(UserError): form.value


@pytest.mark.parametrize("content", [b"", b'{"prompt": "a", "compl', b"\xff\xfe\x00", b'{"x": 1}\n'])
def test_decision_with_damaged_rows(tmp_path, content):
    (tmp_path / "rows.jsonl").write_bytes(content)
    form = DecisionForm(dict(fails="behaviour"), str(tmp_path / "rows.jsonl"))
    form.count.click()
    assert "mend" in form.counted.value and form.report is None and form.value.filled == {}


# ---- rows

def rows(n=20): return [json.dumps(dict(prompt=f"Where is box {i}?", completion=f"In room {i * 7 % 13}.")) for i in range(n)]


@pytest.mark.parametrize("damage", ["cut", "not utf-8", "no answer", "not an object", "empty lines"])
def test_rows_damaged_half_way(tmp_path, damage):
    lines, path = [l.encode() for l in rows()], tmp_path / "rows.jsonl"
    lines[9] = {"cut": lines[9][:25], "not utf-8": b'{"prompt": "\xe9", "completion": "x"}', "no answer": b'{"prompt": "a"}', "not an object": b"[1]", "empty lines": b""}[damage]
    path.write_bytes(b"\n".join(lines))
    view = DataView(str(path), model="")
    view.look.click()
    assert view.value.rows == 19
    assert (damage == "empty lines") != any("row 10" in p["row"] for p in view.value.stops)
    assert damage == "empty lines" or "row 10" in view.told.value


def test_report_of_an_earlier_file_does_not_stay(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(rows()))
    view = DataView(str(tmp_path / "rows.jsonl"), model="")
    view.look.click()
    assert view.value.rows == 20
    (tmp_path / "rows.jsonl").unlink()
    view.look.click()
    assert view.value is None and "does not exist" in view.told.value


# ---- text from others is only text

EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>\u202e"


def test_texts_are_escaped(tmp_path, form):
    form.change(system=EVIL, model=EVIL, data=EVIL, modules_to_save=EVIL)
    form.folder.value = form.path.value = EVIL
    form.open.click()
    for choice in form.shown.options:
        form.shown.value = choice
        text = "".join(w.value for w in everything(form) if isinstance(w, W.HTML))
        assert "<img src=x" not in text and "<script" not in text and "\u202e" not in text
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*rows(), json.dumps(dict(prompt=EVIL, completion=EVIL))]))
    view = DataView(str(path), model="")
    view.look.click()
    assert "<img src=x" not in view.told.value and "<script" not in view.told.value


def test_problem_list_is_told_to_a_screen_reader():
    assert 'role="status"' in problems_html([])


def test_limits_are_in_words():
    for name, field in FIELDS.items():
        if field.annotation in (int, float): assert limits(field), f"{name} has a number without a range"


# ---- in a kernel

CELLS = """from finetune_nb.recipe_form import RecipeForm
from finetune_nb.recipe import make
form = RecipeForm(make(model="Qwen/Qwen3-8B", lora_r=64), card="RTX 4090")
form
---
from finetune_nb.decision_form import DecisionForm
DecisionForm(dict(fails="facts", changes="daily"))
---
from finetune_nb.data_view import DataView
view = DataView(r"{path}", model="")
view.refresh()
view
---
form.change(lora_r="many")
form
---
import sys
print(*sorted({"torch", "transformers"} & sys.modules.keys()), "heavy")"""


@pytest.fixture
def book(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(rows()))
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS.replace("{path}", str(tmp_path / "rows.jsonl")).split("\n---\n")])
    nb.metadata.kernelspec = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nb, tmp_path / "book.ipynb")
    return tmp_path / "book.ipynb"


def test_papermill_leaves_pictures_and_values(book, tmp_path):
    "Each form leaves a picture that needs no script, and its value as text; no widget and no widget state"
    import papermill
    done = papermill.execute_notebook(str(book), str(tmp_path / "out.ipynb"), kernel_name="python3", progress_bar=False, cwd=str(ROOT))
    kinds = [[k for o in c.outputs for k in o.get("data", {})] for c in done.cells]
    assert not any("widget" in k for found in kinds for k in found)
    assert "widgets" not in done.metadata, "widget state was saved"
    text = ["".join(str(o.get("data", {}).get("text/plain", "")) + o.get("text", "") for o in c.outputs) for c in done.cells]
    assert {"image/svg+xml", "image/png", "text/markdown"} <= set(kinds[0]) and "lora_r: 64" in text[0] and "Qwen/Qwen3-8B" in text[0]
    assert {"image/svg+xml", "image/png", "text/markdown"} <= set(kinds[1]) and "rag" in text[1]
    assert "text/html" in kinds[2] and "20 rows" in text[2]
    assert "lora_r" in text[3] and "valid integer" in text[3]
    assert text[4].strip() == "heavy"
    page = subprocess.run([sys.executable, "-m", "nbconvert", "--to", "html", "--stdout", str(tmp_path / "out.ipynb")], capture_output=True, text=True)
    assert page.returncode == 0 and page.stdout.count('src="data:image/svg+xml;base64,') == 2 and "widget-view" not in page.stdout


def test_a_front_end_gets_widgets(book):
    "Asked by somebody who can answer, as JupyterLab asks, the forms are widgets; and a change made from there is answered"
    from jupyter_client.manager import start_new_kernel
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT), env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        def ask(code, allow_stdin):
            seen = []
            client.allow_stdin = allow_stdin
            client.execute_interactive(code, allow_stdin=allow_stdin, output_hook=seen.append, timeout=60)
            return seen
        first = CELLS.split("\n---\n")[0]
        seen = ask(first, True)
        shown = [m["content"]["data"] for m in seen if m["msg_type"] == "display_data"]
        assert any("application/vnd.jupyter.widget-view+json" in d for d in shown), [list(d) for d in shown]
        seen = ask("form.controls['lora_r'].value = '128'", True)
        sent = [m["content"]["data"]["state"] for m in seen if m["msg_type"] == "comm_msg"]
        assert any("<svg" in str(s.get("value")) for s in sent), "the memory bar did not follow"
        shown = [m["content"]["data"] for m in ask(first, False) if m["msg_type"] == "display_data"]
        assert shown and not any("application/vnd.jupyter.widget-view+json" in d for d in shown)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
