"""Rules of the repository: what keeps the notebooks readable and the package honest.

A rule takes notebooks and gives sentences, each naming a file and what to do about it. No sentence, no problem.
The tests at the end plant a violation of every rule and expect it to be caught.
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from functools import partial
from pathlib import Path

import pytest
import yaml
from fastcore.nbio import nb2str
from nbdev.clean import clean_nb
from nbdev.config import get_config

import finetune_nb

ROOT = Path(__file__).resolve().parents[1]
NBS, PACKAGE = ROOT / "nbs", "finetune_nb"
LINES, CELLS, CELL_LINES = 250, 90, 40
LAST_CELL = "import nbdev; nbdev.nbdev_export()"
# /home/… and the like, but not as a part of a longer path or an address
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:home|root|work|tmp|Users)/\w|\b[A-Z]:\\+Users\\")
# {notebook: text it may hold although it looks like a path of this machine}
PATHS_ALLOWED = {}


# ---- reading notebooks

def hidden(path): return any(part[0] in "._" for part in path.relative_to(NBS).parts)


def read_notebooks():
    "Every notebook that nbdev would export, test or publish, in order"
    paths = sorted(p for p in NBS.rglob("*.ipynb") if not hidden(p))
    texts = [p.read_text(encoding="utf-8") for p in paths]
    return [json.loads(t) | {"name": p.relative_to(NBS).as_posix(), "text": t} for p, t in zip(paths, texts)]


def source(cell): return "".join(cell["source"])
def code_cells(book): return [c for c in book["cells"] if c["cell_type"] == "code"]
def exported_cells(book): return [c for c in code_cells(book) if {"export", "exports", "exporti"} & directives(c).keys()]


def directives(cell):
    "The `#| name: value` lines that open a cell, as {name: value}"
    head = re.match(r"(?:\s*#\|.*\n?)*", source(cell))[0]
    return {m[1]: m[2].strip() for m in re.finditer(r"#\|\s*([\w-]+):?[ \t]*(.*)", head)}


def code_lines(cell): return [line for line in source(cell).splitlines() if not line.lstrip().startswith("#|")]


def tree(cell):
    "A cell's syntax tree; lines for IPython (%magic, !command) count as nothing"
    lines = ["pass" if re.match(r"[%!]", line) else line for line in code_lines(cell)]
    if source(cell).lstrip().startswith("%%"): lines = []
    return compile("\n".join(lines), "cell", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def module_of(book):
    "The module a notebook exports, or None if it is a page or a pipeline"
    return next((directives(c)["default_exp"] for c in code_cells(book) if "default_exp" in directives(c)), None)


def library(books): return [b for b in books if module_of(b)]


def own_imports(cell):
    "(module of this package, imported with a star?) for each import in a cell, also inside functions"
    for node in ast.walk(tree(cell)):
        if isinstance(node, ast.Import):
            yield from ((a.name.split(".")[1], False) for a in node.names if a.name.startswith(f"{PACKAGE}."))
        if isinstance(node, ast.ImportFrom):
            path = f"{PACKAGE}.{node.module or ''}" if node.level else f"{node.module}."
            if not path.startswith(f"{PACKAGE}."): continue
            names = [n for n in path.split(".")[1:2] if n] or [a.name for a in node.names]
            yield from ((n, any(a.name == "*" for a in node.names)) for n in names)


def place(book, cell): return f"nbs/{book['name']}, cell {book['cells'].index(cell)} ({next(iter(code_lines(cell)), '')[:50]!r})"


# ---- rules: a list of notebooks in, sentences out

def one_notebook_one_module(books, modules=None):
    "Every module comes from exactly one notebook"
    if modules is None: modules = {p.stem for p in (ROOT / PACKAGE).glob("*.py")} - {"__init__", "_modidx"}
    homes = {}
    for book in books:
        name, module = book["name"], module_of(book)
        if not module:
            if exported_cells(book): yield f"nbs/{name} has exported cells but no `#| default_exp`: name its module, or make them plain cells"
            continue
        if sum("default_exp" in directives(c) for c in code_cells(book)) > 1: yield f"nbs/{name} has two `#| default_exp`: keep one"
        if module in homes: yield f"nbs/{name} exports {module}, as nbs/{homes[module]} does, and would overwrite it: rename one"
        if module not in modules: yield f"nbs/{name} exports {module}, but {PACKAGE}/{module}.py is not there: run nbdev-export and commit it"
        if re.sub(r"^\d+[a-z]?_", "", Path(name).stem) != module: yield f"nbs/{name} exports {module}: the notebook's name should end in it"
        homes.setdefault(module, name)
        for cell in exported_cells(book):
            if any(directives(cell).get(d) for d in ("export", "exports", "exporti")): yield f"{place(book, cell)} exports into another module: move it there"
    for orphan in sorted(modules - homes.keys()): yield f"{PACKAGE}/{orphan}.py comes from no notebook: delete it, or write its notebook"


def imports_point_backwards(books):
    "A notebook imports only modules of notebooks that sort before it"
    order = {module_of(b): i for i, b in enumerate(sorted(library(books), key=lambda b: b["name"]))}
    for book in library(books):
        for cell in exported_cells(book):
            for module, _ in own_imports(cell):
                if order.get(module, -1) >= order[module_of(book)]: yield f"{place(book, cell)} imports {module}, which comes later: move what it needs to an earlier notebook, or renumber"


def no_star_imports(books):
    "Modules of this package are imported by name"
    for book in books:
        for cell in code_cells(book):
            for module, star in own_imports(cell):
                if star: yield f"{place(book, cell)} imports * from {module}: name what is used"


def imports_stand_alone(books):
    "A cell with a top-level import holds nothing else: building the documentation runs every cell with an import"
    for book in books:
        for cell in code_cells(book):
            if "parameters" in cell["metadata"].get("tags", []) or "\n".join(code_lines(cell)).strip() == LAST_CELL: continue
            kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree(cell).body if not isinstance(n, ast.Pass)}
            if len(kinds) == 2: yield f"{place(book, cell)} mixes imports with other code: give the imports a cell of their own"


def small(books):
    "Notebooks can be read in one sitting and cells at one look"
    for book in library(books):
        exported = exported_cells(book)
        lines = sum(bool(line.strip()) for c in exported for line in code_lines(c))
        if lines > LINES: yield f"nbs/{book['name']} exports {lines} lines, more than {LINES}: delete some, or split it by topic (04_data, 04a_home)"
        if len(book["cells"]) > CELLS: yield f"nbs/{book['name']} has {len(book['cells'])} cells, more than {CELLS}: delete some, or split it by topic"
        for cell in exported:
            if len(code_lines(cell)) > CELL_LINES: yield f"{place(book, cell)} exports {len(code_lines(cell))} lines in one cell, more than {CELL_LINES}: split the function"


def no_widget_state(books):
    "Saved widgets carry random ids: noise in every difference, and broken on GitHub"
    for book in books:
        if "widgets" in book["metadata"]: yield f"nbs/{book['name']} holds saved widget state: delete metadata.widgets"
        for cell in code_cells(book):
            if any("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for o in cell["outputs"]): yield f"{place(book, cell)} holds a saved widget: clear its output"


def no_saved_errors(books):
    "A published page shows no traceback; an expected error is shown with expect_fail"
    for book in books:
        for cell in code_cells(book):
            if any(o["output_type"] == "error" for o in cell["outputs"]): yield f"{place(book, cell)} holds a saved error: mend it and run it again, or use `with expect_fail(...)`"


def exported_code_runs(books):
    "What is exported is run by nbdev-test"
    for book in library(books):
        for cell in exported_cells(book):
            if directives(cell).get("eval") == "false": yield f"{place(book, cell)} is exported but never run: remove `eval: false`"
        front = "\n".join(source(c) for c in book["cells"][:3] if c["cell_type"] != "code")
        for m in re.finditer(r"^(?:- )?(skip_exec: *true|eval: *false)\s*$", front, re.M): yield f"nbs/{book['name']} is exported but never run: remove `{m[1]}`"


def opens_and_closes(books):
    "A library notebook opens with a title and a sentence and closes by exporting itself"
    for book in library(books):
        first, last = next((c for c in book["cells"] if c["cell_type"] == "markdown"), None), book["cells"][-1]
        opens = first in book["cells"][:2] and re.match(r"# .+\n\n> \S.+", source(first))
        if not opens: yield f"nbs/{book['name']} does not open with '# Title', an empty line and '> one sentence' (only the default_exp cell may stand above)"
        if not (last["cell_type"] == "code" and "hide" in directives(last) and "\n".join(code_lines(last)).strip() == LAST_CELL): yield f"nbs/{book['name']} does not end with the cell '#| hide' + {LAST_CELL!r}"


def public_things_have_docstrings(books):
    "Each public function and class says in one line what it is"
    for book in library(books):
        for cell in exported_cells(book):
            for node in tree(cell).body:
                if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"): continue
                doc = (ast.get_docstring(node) or "").strip()
                if not doc or "\n" in doc: yield f"{place(book, cell)} {node.name} has {'more than one line of' if doc else 'no'} docstring: write one line, and reasons in prose above the cell"


def clean(books):
    "Notebooks are as nbdev-clean leaves them"
    config = get_config(ROOT)
    keys = {k: config.get(k) for k in ("allowed_metadata_keys", "allowed_cell_metadata_keys", "allowed_out_metadata_keys")}
    for book in books:
        cleaned = json.loads(book["text"])
        clean_nb(cleaned, clean_ids=config.clean_ids, **keys)
        if nb2str(cleaned) != book["text"]: yield f"nbs/{book['name']} is not clean: run nbdev-clean"


def no_machine_paths(books):
    "No notebook shows where somebody's files lie"
    for book in books:
        for cell in book["cells"]:
            outputs = [o.get("text", "") for o in cell.get("outputs", [])] + [d for o in cell.get("outputs", []) for k, d in o.get("data", {}).items() if not k.startswith("image/")]
            text = "\n".join([source(cell), *("".join(t) if isinstance(t, list) else str(t) for t in outputs)])
            for allowed in PATHS_ALLOWED.get(book["name"], ()): text = text.replace(allowed, "")
            if m := MACHINE_PATH.search(text): yield f"{place(book, cell)} holds a path of one machine ({text[m.start():m.start() + 40]!r}): use a relative path or a temporary folder's name only"


def pipelines_have_parameters(books):
    "papermill puts a run's settings after the one cell tagged `parameters`"
    for book in books:
        tagged = sum("parameters" in c["metadata"].get("tags", []) for c in book["cells"])
        if book["name"].startswith("pipelines/") and tagged != 1: yield f"nbs/{book['name']} has {tagged} cells tagged parameters: it needs exactly one"


def pages_listed(books, pages=None):
    "_quarto.yml lists every page once, and only pages that exist"
    if pages is None: pages = sidebar_pages(yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"])
    names = [b["name"] for b in books]
    for page in sorted(set(pages)):
        if page not in names and not (NBS / page).exists(): yield f"_quarto.yml lists {page}, but nbs/{page} does not exist: write it, or take it off the list"
        if pages.count(page) > 1: yield f"_quarto.yml lists {page} twice: keep one"
    for name in names:
        if name not in pages: yield f"nbs/{name} is not listed in _quarto.yml: add it to the sidebar"


def sidebar_pages(contents):
    "The pages of Quarto's nested sidebar list"
    return [p for item in contents for p in ([item] if isinstance(item, str) else [item["href"]] if "href" in item else sidebar_pages(item["contents"]))]


RULES = [one_notebook_one_module, imports_point_backwards, no_star_imports, imports_stand_alone, small, no_widget_state, no_saved_errors, exported_code_runs,
         opens_and_closes, public_things_have_docstrings, clean, no_machine_paths, pipelines_have_parameters, pages_listed]


@pytest.fixture(scope="module")
def books(): return read_notebooks()


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_rule(rule, books):
    assert library(books), "no library notebook was found under nbs/, so nothing would be checked"
    problems = list(rule(books))
    assert not problems, "\n- ".join([rule.__doc__, *problems])


# ---- rules about the package and its files

def test_export_in_sync(tmp_path):
    "finetune_nb/*.py are what nbdev-export makes of the notebooks, byte for byte"
    shutil.copytree(NBS, tmp_path / "nbs", symlinks=True, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (tmp_path / PACKAGE).mkdir()
    for name in ("pyproject.toml", "settings.ini", f"{PACKAGE}/__init__.py"): shutil.copy2(ROOT / name, tmp_path / name)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"], cwd=tmp_path, env=env, check=True)
    fresh, kept = ({p.name: p.read_bytes() for p in (base / PACKAGE).glob("*.py")} for base in (tmp_path, ROOT))
    assert len(fresh) > 2, "nbdev-export wrote no module"
    differ = sorted(n for n in fresh.keys() | kept.keys() if fresh.get(n) != kept.get(n))
    assert not differ, f"{', '.join(f'{PACKAGE}/{n}' for n in differ)} differ from the notebooks: run nbdev-export and commit the result"


def test_quarto_file_is_seen_by_nbdev():
    link = NBS / "_quarto.yml"
    assert link.exists(), "nbs/_quarto.yml is missing: ln -s ../_quarto.yml nbs/_quarto.yml"
    assert link.read_bytes() == (ROOT / "_quarto.yml").read_bytes(), "nbs/_quarto.yml differs from _quarto.yml: make it a link to ../_quarto.yml, or a copy"


def test_one_version():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    assert settings["DEFAULT"]["version"] == finetune_nb.__version__, f"settings.ini and {PACKAGE}/__init__.py name different versions: make them equal"


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.recipe", f"{PACKAGE}.cli"])
def test_opens_without_torch(module):
    heavy = "{'torch', 'transformers', 'peft', 'trl', 'datasets', 'bitsandbytes'}"
    done = subprocess.run([sys.executable, "-c", f"import sys, {module}; print(*sorted({heavy} & sys.modules.keys()))"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"import {module} fails:\n{done.stderr}"
    assert not done.stdout.split(), f"import {module} loads {done.stdout.strip()}: import it inside the function that needs it"


# ---- can each rule fail?

def code(text, outputs=(), **metadata): return {"cell_type": "code", "source": text, "outputs": list(outputs), "metadata": metadata, "execution_count": None}
def prose(text): return {"cell_type": "markdown", "source": text, "metadata": {}}


def notebook(*cells, name="01_one.ipynb", **metadata):
    "A notebook in memory"
    cells = [c | {"id": f"c{i}"} for i, c in enumerate(cells)]
    nb = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return nb | {"name": name, "text": nb2str(nb)}


def room(*cells, name="01_one.ipynb", **metadata):
    "A library notebook that keeps every rule, with more cells in it"
    head = code(f"#| default_exp {name[:-6].split('_')[1]}"), prose("# One\n\n> A room of the house.")
    return notebook(*head, *cells, code(f"#| hide\n{LAST_CELL}"), name=name, **metadata)


def export(text, *rest): return code("\n".join(["#| export", *rest, text]))


GOOD = [room(export("import os, sys"), export('def f():\n    "Do it"\n    return os.name'), code("f()"), code("%matplotlib inline\nimport re")),
        room(export("from finetune_nb.one import f"), export("def g():\n    'Do it'\n    from .one import f\n    return f"), name="02_two.ipynb"),
        notebook(code("import os\nn = 1", tags=["parameters"]), prose("See https://example.org/home/page and ~/home/x"), name="pipelines/run.ipynb")]
PAGES = [b["name"] for b in GOOD]
ERROR = {"output_type": "error", "ename": "E", "evalue": "", "traceback": []}
one_module, listed = partial(one_notebook_one_module, modules={"one", "two"}), partial(pages_listed, pages=PAGES)
first, second, run = GOOD

PLANTED = {
    "two notebooks, one module": (one_module, [*GOOD, room(name="03_one.ipynb")]),
    "orphan module": (one_module, [first]),
    "module not exported": (one_module, [*GOOD, room(name="03_three.ipynb")]),
    "export without default_exp": (one_module, [*GOOD, notebook(export("x = 1"))]),
    "export into another module": (one_module, [room(code("#| export two\nx = 1")), second]),
    "import of a later module": (imports_point_backwards, [room(export("from finetune_nb.two import g")), second]),
    "relative import of a later module": (imports_point_backwards, [room(export("from .two import g")), second]),
    "module imported by name": (imports_point_backwards, [room(export("from finetune_nb import two")), second]),
    "plain import of a later module": (imports_point_backwards, [room(export("import finetune_nb.two as t")), second]),
    "late import of a later module": (imports_point_backwards, [room(export("def f():\n    'x'\n    from finetune_nb.two import g")), second]),
    "star import": (no_star_imports, [room(export("from finetune_nb.two import *"))]),
    "relative star import": (no_star_imports, [room(export("from .two import *"))]),
    "import beside other code": (imports_stand_alone, [room(code("import os\nos.getcwd()"))]),
    "import beside an export": (imports_stand_alone, [room(export("import os; x = 1"))]),
    "251 lines": (small, [room(*[export("\n".join(["x = 1"] * 40))] * 6, export("\n".join(["x = 1"] * 11)))]),
    "91 cells": (small, [room(*[prose("a")] * 88)]),
    "cell of 41 lines": (small, [room(export("\n".join(["x = 1"] * 41)))]),
    "widget state": (no_widget_state, [room(widgets={"state": {}})]),
    "widget view": (no_widget_state, [room(code("w", [{"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {}}}]))]),
    "error output": (no_saved_errors, [room(code("1/0", [ERROR]))]),
    "export never run": (exported_code_runs, [room(export("x = 1", "#| eval: false"))]),
    "notebook never run": (exported_code_runs, [notebook(*first["cells"][:1], prose("# One\n\n> A room.\n\n- skip_exec: true"))]),
    "no sentence": (opens_and_closes, [notebook(first["cells"][0], prose("# One\n\nText"), first["cells"][-1])]),
    "title too late": (opens_and_closes, [notebook(first["cells"][0], code("x"), *first["cells"][1:])]),
    "no export at the end": (opens_and_closes, [notebook(*first["cells"][:-1])]),
    "shown export at the end": (opens_and_closes, [notebook(*first["cells"][:-1], code(LAST_CELL))]),
    "function without docstring": (public_things_have_docstrings, [room(export("def f(): return 1"))]),
    "long docstring": (public_things_have_docstrings, [room(export('class A:\n    """One\n\n    two"""'))]),
    "execution count": (clean, [room(code("1") | {"execution_count": 3})]),
    "metadata of one editor": (clean, [room(vscode={"x": 1})]),
    "path in source": (no_machine_paths, [room(code("open('/home/me/x.txt')"))]),
    "path in an output": (no_machine_paths, [room(code("p", [{"output_type": "stream", "name": "stdout", "text": ["saved in /tmp/abc\n"]}]))]),
    "path in a result": (no_machine_paths, [room(code("p", [{"output_type": "execute_result", "data": {"text/plain": ["'C:\\\\Users\\\\me'"]}}]))]),
    "pipeline without parameters": (pipelines_have_parameters, [notebook(code("n = 1"), name="pipelines/run.ipynb")]),
    "page not listed": (listed, [*GOOD, notebook(name="tutorials/new.ipynb")]),
    "listed page missing": (listed, GOOD[:2]),
}


@pytest.mark.parametrize("rule, planted", PLANTED.values(), ids=PLANTED)
def test_rule_catches(rule, planted):
    assert not list(rule(GOOD)), "the rule complains of good notebooks"
    found = list(rule(planted))
    assert found and all(".ipynb" in f or ".py" in f for f in found), "the planted violation was not found, or not named"


def test_every_rule_has_a_planted_violation():
    assert {getattr(rule, "func", rule) for rule, _ in PLANTED.values()} == set(RULES)
