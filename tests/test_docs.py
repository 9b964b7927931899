"The website: built once from the notebooks without Quarto, every page there, every link and anchor leads somewhere"
import json
import re
import runpy
import subprocess
import sys
import time
from functools import cache
from html import unescape
from importlib.util import find_spec
from pathlib import Path
from posixpath import dirname, join, normpath
from urllib.parse import unquote

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TOOL = runpy.run_path(str(ROOT / "tools/docs.py"))
CONFIG = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]


@cache
def built(folder):
    "Build the site into a folder, once a session: this file and tests/browser share it"
    began = time.monotonic()
    done = subprocess.run([sys.executable, str(ROOT / "tools/docs.py"), str(folder), "--smalldocs"], capture_output=True, text=True)
    assert (folder / "index.html").is_file(), f"the site does not build:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    print(f"built in {time.monotonic() - began:.0f} s\n{done.stdout}")
    return folder


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The folder of the built site"
    if not find_spec("smalldocs"): pytest.skip("smalldocs is not installed: pip install 'finetune_nb[docs]'")
    return built(tmp_path_factory.getbasetemp() / "site")


def address(page): return re.sub(r"(^|/)\d+[a-z]*_", r"\1", page).replace(".ipynb", ".html")


PAGES = ["index.ipynb"] + [p for s in CONFIG["sidebar"]["contents"] if isinstance(s, dict) for p in s["contents"]]


@pytest.fixture(scope="session")
def html(site):
    "{address: page} of the whole site"
    return {p.relative_to(site).as_posix(): p.read_text(encoding="utf-8") for p in site.rglob("*.html")}


def content(page):
    "What stands between navigation and footer"
    return re.search(r"<main.*?</main>", page, re.S)[0]


def words(page): return " ".join(unescape(re.sub(r"<[^>]+>", " ", page)).split())


def test_every_page_of_the_sidebar_is_there(html):
    wanted = [address(p) for p in PAGES]
    assert len(set(wanted)) == len(wanted) > 100, "two notebooks share an address"
    bar = set(re.findall(r'href="\./([^"#]+)"|href="([^"#]+\.html)"', re.search(r'id="quarto-sidebar".*?</nav>', html["index.html"], re.S)[0]))
    assert set(wanted) <= html.keys() and set(wanted) - {a or b for a, b in bar} == set()


def broken(pages, files):
    "Links and anchors of pages that lead nowhere"
    ids = {a: set(map(unescape, re.findall(r'\bid="([^"]+)"', p))) for a, p in pages.items()}
    for name, page in pages.items():
        for link in set(map(unescape, re.findall(r'<(?:a|link|img|script|source|iframe)\b[^>]*?\b(?:href|src)="([^"]*)"', page))):
            if re.match(r"[a-z]+:|//", link): continue
            path, _, anchor = link.partition("#")
            target = normpath(join(dirname(name), unquote(path.split("?")[0]))) if path else name
            if target in ("", ".") or path.endswith("/"): target = normpath(join(target, "index.html"))
            if target not in files: yield f"{name}: {link}"
            elif anchor and target in ids and unquote(anchor) not in ids[target]: yield f"{name}: {link} (no such place on that page)"


def test_no_link_is_broken(site, html):
    files = {p.relative_to(site).as_posix() for p in site.rglob("*") if p.is_file()}
    lost = sorted(set(broken(html, files)))
    assert sum(p.count("#L-") for p in html.values()) > 500, "too few links to code were looked at"
    assert not lost, "links that lead nowhere:\n" + "\n".join(lost[:40])


def test_a_broken_link_is_found():
    pages = {"a.html": '<a href="b.html#x">1</a><a href="b.html#y">2</a><a href="sub/">3</a><img src="no.png">', "b.html": '<h2 id="x"></h2>', "sub/index.html": '<a href="../a.html">4</a><a href="a.html">5</a>'}
    assert sorted(broken(pages, pages.keys())) == ["a.html: b.html#y (no such place on that page)", "a.html: no.png", "sub/index.html: a.html"]


# nbdev names pages without numbers, so a link to 11_converter.html would be broken under Quarto
def test_notebooks_link_notebooks():
    books = {p: json.loads(p.read_text(encoding="utf-8")) for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    links = {(p.name, l) for p, b in books.items() for c in b["cells"] if c["cell_type"] == "markdown" for l in re.findall(r"\]\(([^)\s:]+\.html)", "".join(c["source"]))}
    assert not links, f"link the notebook, not its page: {links}"


def test_a_function_has_its_page(site, html):
    page = content(html["recipe.html"])
    section = page[page.index('id="make"'):page.index('id="names"')]
    assert "def make ( preset" in words(section)
    table = re.search(r"<table.*?</table>", section, re.S)[0]
    assert [words(h) for h in re.findall(r"<th.*?</th>", table, re.S)] == ["parameter", "type", "default", "meaning"]
    assert "preset str 'stock' “stock”" in words(table) and "**values settings that differ from the preset" in words(table)
    assert "A checked Recipe , or a UserError" in words(section)
    [line] = re.findall(r'href="source/recipe\.html#(L-\d+)"', page[:page.index('id="make"')])[-1:]
    assert "def make(" in words(re.search(rf'id="{line}">(.*?)\n', html["source/recipe.html"])[1]).replace(" (", "(")


def test_a_name_in_backticks_is_meant_here():
    "Several modules have a `load`"
    meant, where = TOOL["meant"], {"load": ["models", "recipe"], "plain": ["core"], "Data.read": ["data"], "_S": ["recipe"]}
    text = "[`load`](/models.html#load), [`load()`](/models.html#load), [`plain`](/core.html#plain), [`Data.read`](/data.html#data.read), [`_S`](/recipe.html#_s), [`finetune_nb.core.plain`](/core.html#finetune_nb.core.plain), [core](/core.html#x)"
    rest = "[`plain`](/core.html#plain), [`Data.read`](/data.html#data), `_S`, [`finetune_nb.core.plain`](/core.html#plain), [core](/core.html#x)"
    assert meant(text, "recipe", where) == f"[`load`](/recipe.html#load), [`load()`](/recipe.html#load), {rest}"
    assert meant(text, "", where) == f"`load`, `load()`, {rest}"


def test_outputs_and_plots_are_shown(html):
    assert "1 problem" in words(content(html["core.html"])) or "must be at least 1" in words(content(html["core.html"]))
    assert "data:image/png" in html["explanations/memory.html"] and "<svg" in html["curves.html"]


def test_what_is_hidden_stays_hidden(html):
    for name, page in html.items():
        if name.startswith("source/"): continue
        text = words(content(page))
        assert not re.search(r"#\| ?(hide|export|default_exp)", text) or name in ("explanations/contribute.html", "explanations/design.html"), name
        assert "nbdev.nbdev_export()" not in text and "show_doc(" not in text and " ::: " not in text, name


def test_search_finds_words(site):
    found = json.loads((site / "search.json").read_text(encoding="utf-8"))
    pages = {e["href"].split("#")[0] for e in found if "checkpoint" in e["text"].lower()}
    assert {"checkpoint.html", "explanations/how_a_run_works.html"} <= pages
    assert not any(p.startswith("source/") for p in {e["href"] for e in found}), "the listings of code would fill every search"


def test_what_programs_read_is_on_the_site(site):
    llms, skill = ((site / n).read_text(encoding="utf-8") for n in ("llms.txt", "SKILL.md"))
    links = re.findall(r"\]\(([^)]+)\)", llms)
    assert len(links) > 100 and [l for l in links if not (site / l).is_file()] == []
    assert skill.startswith("---\nname: finetune-nb")


# ---- the tool

def test_links_of_the_stage():
    link = TOOL["link"]
    assert [link(l) for l in ("../04a_home.ipynb#x", "05_recipe.ipynb", "https://e.org/04a_home.ipynb", "#12_x", "2024_12_plan.txt", "/blob/main/finetune_nb/core.py#L12", "/core.html#plain")] == [
        "../home.ipynb#x", "recipe.ipynb", "https://e.org/04a_home.ipynb", "#12_x", "2024_12_plan.txt", "/source/core.qmd#L-12", "/core.html#plain"]


MADE_UP = "https://github.com/somebody/finetune_nb"
TUTORIALS = sorted((ROOT / "nbs/tutorials").glob("[!_.]*.ipynb"))
INSTALLS = [p for p in TUTORIALS if "google.colab" in p.read_text(encoding="utf-8")]  # what Colab can run


@pytest.fixture
def public(monkeypatch):
    "The tool, for a repository that has an address"
    parts = runpy.run_path(str(ROOT / "tools/docs.py"))
    monkeypatch.setitem(parts["link"].__globals__, "address", lambda: MADE_UP)
    return parts


@pytest.mark.parametrize("path", INSTALLS, ids=lambda p: p.stem)
def test_with_an_address_a_tutorial_opens_in_colab(public, path):
    title, button, *rest = public["processed"](path).cells
    assert re.findall(r'href="([^"]+)"', button.source) == [f"https://colab.research.google.com/github/somebody/finetune_nb/blob/main/nbs/tutorials/{path.name}"]
    assert title.cell_type == "raw" and ">Open in Colab</a>" in button.source and 'title="' in button.source and "<img" not in button.source
    assert not any("colab.research" in "".join(c.source) for c in rest)


def test_with_an_address_code_is_linked_there(public):
    assert public["link"]("/blob/main/finetune_nb/core.py#L12") == f"{MADE_UP}/blob/main/finetune_nb/core.py#L12"
    from fastcore.nbio import nb2str
    page = public["notebook"](nb2str(public["processed"](ROOT / "nbs/00_core.ipynb")))
    assert page.count(f"{MADE_UP}/blob/main/finetune_nb/core.py#L") > 10 and "/source/core" not in page and "colab.research" not in page


def test_without_an_address_no_page_has_the_button(html):
    if TOOL["address"](): pytest.skip("the repository has an address")
    assert len(INSTALLS) > 8 and not [n for n, p in html.items() if "colab.research.google.com" in p or ">Open in Colab<" in p]


def test_nbdev_reads_the_address_where_it_is_to_be_written(tmp_path):
    "pyproject.toml as it is, with the signs before the address taken away"
    from nbdev.config import get_config
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(re.sub(r"^# (\[project.urls\]|Repository = )", r"\1", text, flags=re.M).replace("OWNER", "somebody"))
    assert get_config(tmp_path).git_url == (TOOL["address"]() or MADE_UP)


def test_the_readme_links_tutorials_in_colab(monkeypatch):
    readme = runpy.run_path(str(ROOT / "tools/readme.py"))
    cell = dict(cell_type="markdown", source="[a](tutorials/a.ipynb), [b](05_b.ipynb), [c](https://e.org)")
    plain = "[a](nbs/tutorials/a.ipynb){}, [b](nbs/05_b.ipynb), [c](https://e.org)"
    for address, added in (("", ""), (MADE_UP, " ([Colab](https://colab.research.google.com/github/somebody/finetune_nb/blob/main/nbs/tutorials/a.ipynb))")):
        monkeypatch.setitem(readme["text"].__globals__, "ADDRESS", address)
        assert readme["text"](cell) == plain.format(added)


def test_a_notebook_for_the_stage():
    cells = [dict(cell_type="raw", source="---\noutput-file: a.html\ntitle: A\n---\n"), dict(cell_type="markdown", source=["see [b](01_b.ipynb)"]),
             dict(cell_type="code", source="x = '[b](01_b.ipynb)'", outputs=[dict(data={"text/html": ['<a href="../01_b.ipynb">b</a>'], "text/plain": "[b](01_b.ipynb)"})])]
    made = json.loads(TOOL["notebook"](json.dumps(dict(cells=cells, metadata=dict(widgets={})))))
    raw, prose, code = made["cells"]
    assert made["metadata"] == {} and raw["source"] == "---\ntitle: A\n---\n" and prose["source"] == "see [b](b.ipynb)"
    assert code["source"] == "x = '[b](01_b.ipynb)'" and code["outputs"][0]["data"] == {"text/html": '<a href="../b.ipynb">b</a>', "text/plain": "[b](01_b.ipynb)"}


@pytest.fixture
def tool(monkeypatch):
    "The tool with its renderers replaced: what was rendered with"
    used, parts = [], runpy.run_path(str(ROOT / "tools/docs.py"))
    globals_of = parts["main"].__globals__
    for name in ("with_quarto", "with_smalldocs"): monkeypatch.setitem(globals_of, name, lambda out, name=name: used.append(name) or out.mkdir() or [])
    return parts["main"], globals_of, used


@pytest.mark.parametrize("there, options, used, said", [("quarto", [], "with_quarto", "rendering with quarto"), (None, [], "with_smalldocs", "smalldocs, because quarto is not on the path"), ("quarto", ["--smalldocs"], "with_smalldocs", "rendering with smalldocs")])
def test_quarto_is_taken_where_it_is(tool, monkeypatch, tmp_path, capsys, there, options, used, said):
    main, parts, done = tool
    monkeypatch.setattr(parts["shutil"], "which", lambda name: there)
    monkeypatch.setitem(parts, "find_spec", lambda name: True)
    assert main([str(tmp_path / "out"), *options]) == 0 and done == [used]
    assert said in capsys.readouterr().out


def test_without_a_renderer_it_says_what_to_install(tool, monkeypatch, tmp_path):
    main, parts, done = tool
    monkeypatch.setattr(parts["shutil"], "which", lambda name: None)
    monkeypatch.setitem(parts, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'finetune_nb\[docs\]'"): main([str(tmp_path / "out")])
    assert not done
