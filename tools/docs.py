"""Build the website: python tools/docs.py [FOLDER] [--smalldocs]   (into _docs if no folder is named)

Quarto is the renderer that the site is written for, through nbdev-docs. Its program is on no package index, so where it is
missing, or with --smalldocs, the same pages are made from the same _quarto.yml by smalldocs, which is pure Python. Either
way nbdev first makes the pages of the notebooks: exported cells become signatures, hidden cells go, outputs stay as saved.
"""
import argparse
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NUMBER = re.compile(r"(?<![\w.-])\d+[a-z]*_(?=\w+\.(?:ipynb|html)\b)")  # nbdev names the page of 04a_home.ipynb home.html
SOURCE = re.compile(r"^/blob/\w+/finetune_nb/(\w+)\.py(?:#L(\w+))?$")  # nbdev's link to a line, where the repository has no address
BESIDE = {"llms.txt": "llms.txt", "finetune_nb/.agents/skills/finetune-nb/SKILL.md": "SKILL.md"}  # for programs that read; not pages


@cache
def address():
    "Where the repository is public, from pyproject.toml; empty while it is nowhere"
    from nbdev.config import get_config
    return get_config(ROOT).git_url


def colab(path, text):
    "The link that opens a tutorial in Colab: none without an address, or where the page has no cell that installs there"
    if not address().startswith("https://github.com/") or path.parent.name != "tutorials" or "google.colab" not in text: return ""
    place = address().replace("https://github.com", "https://colab.research.google.com/github", 1)
    return f'<a class="btn btn-outline-primary" href="{html.escape(place)}/blob/main/nbs/tutorials/{path.name}" title="Run this page on a machine of Google Colab">Open in Colab</a>'


def link(target):
    "A link as the staged pages want it: file names without their numbers, a line of a module on this site or in the public repository"
    if address() and SOURCE.match(target): return address() + target
    if found := SOURCE.match(target): return f"/source/{found[1]}.qmd" + (f"#L-{found[2]}" if found[2] else "")
    return target if re.match(r"[a-z]+:", target) else NUMBER.sub("", target)


def linked(text): return re.sub(r'(\]\(|\bhref=")([^)"\s]+)', lambda m: m[1] + link(m[2]), text)


@cache
def homes():
    "{name: modules that have it}"
    from finetune_nb._modidx import d
    found = {}
    for module, names in d["syms"].items():
        for name in names: found.setdefault(name.removeprefix(f"{module}."), []).append(module.split(".")[-1])
    return found


def meant(text, module, homes):
    "nbdev links a name in backticks to any module that has it, and to places that no page has. Here it leads to the page's own, or to none where several have it or it is private"
    def one(m):
        name, page = m[1], m[3]
        there, parts = homes.get(name, [page]), name.split(".")
        if name[0] == "_" or module not in there and len(there) > 1: return f"`{name}{m[2] or ''}`"
        return f"[`{name}{m[2] or ''}`](/{module if module in there else page}.html#{parts[2 * (parts[0] == 'finetune_nb')].lower()})"
    return re.sub(r"\[`([\w.]+?)(\(\))?`\]\(/(\w+)\.html#[\w.]+\)", one, text)


def notebook(text):
    "A notebook that nbdev has processed, with its links rewritten and without what no page needs"
    book = json.loads(text)
    book["metadata"].pop("widgets", None)
    for cell in book["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "raw": cell["source"] = re.sub(r"^output-file:.*\n", "", source, flags=re.M)
        if cell["cell_type"] == "markdown": cell["source"] = linked(source)
        for data in (o.get("data", {}) for o in cell.get("outputs", [])):
            for kind in data.keys() & {"text/markdown", "text/html"}: data[kind] = linked("".join(data[kind]))
    return json.dumps(book, ensure_ascii=False)


def beside(text):
    "llms.txt for the site: pages instead of notebooks, and without the files that are not on it"
    there = lambda target: re.sub(r"^nbs/(.+)\.ipynb$", r"\1.html", NUMBER.sub("", {"README.md": "index.html"}.get(target, BESIDE.get(target, target))))
    lines = [re.sub(r"^(- \[.+?\]\()([^)]+)", lambda m: m[1] + there(m[2]), line) for line in text.split("\n")]
    return "\n".join(line for line in lines if not (m := re.match(r"- \[.+?\]\(([^)]+)", line)) or m[1].endswith(".html") or m[1] in BESIDE.values())


def listing(module):
    "The page of a module's code, a mark for each line"
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer
    lines = highlight(module.read_text(encoding="utf-8"), PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)).split("\n")
    lines = "\n".join(f'<span id="L-{n}">{line}</span>' for n, line in enumerate(lines, 1))
    return f'---\ntitle: {module.name}\ndescription: The module as its notebook exports it\nsearch: false\ntoc: false\n---\n\n``````{{=html}}\n<pre class="listing"><code>{lines}</code></pre>\n``````\n'


def settings(text, out):
    "_quarto.yml for the stage"
    import yaml
    site = yaml.safe_load(NUMBER.sub("", text))
    site.pop("metadata-files", None)  # nbdev writes that one for Quarto
    site["project"]["output-dir"] = str(out)
    if (ROOT / "nbs/styles.css").exists(): site["format"]["html"].setdefault("css", "styles.css")
    return yaml.safe_dump(site, sort_keys=False)


def parameters(sym):
    "The table of what a function takes, from the comments beside its parameters"
    from inspect import Parameter, _empty
    from fastcore.docments import docments
    from finetune_nb.core import shortened
    stars = {Parameter.VAR_POSITIONAL: "*", Parameter.VAR_KEYWORD: "**"}
    there = {n: p for n, p in docments(sym, full=True, args_kwargs=True).items() if n not in ("self", "return")}
    code = lambda value: f"<code>{html.escape(value)}</code>"  # in backticks nbdev would link them
    rows = [{"parameter": code(stars.get(p.get("kind"), "") + n), "type": "" if p["anno"] is _empty else code(getattr(p["anno"], "__name__", str(p["anno"]))),
             "default": "" if p["default"] is _empty else code(shortened(repr(p["default"]), 60)), "meaning": p["docment"] or ""} for n, p in there.items()]
    told = [k for k in ("parameter", "type", "default", "meaning") if any(r[k] for r in rows)]
    line = lambda cells: "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"
    return "\n".join([line(told), line(["---"] * len(told)), *(line([r[k] for k in told]) for r in rows)]) if "meaning" in told else ""


def documented(sym, **more):
    "nbdev's `show_doc`, with the comments of the parameters as a table and not within the signature"
    from nbdev.showdoc import BasicMarkdownRenderer, show_doc

    class Documented(BasicMarkdownRenderer):
        def _repr_markdown_(self):
            for p in getattr(self.dm, "dm", {}).values(): p["docment"] = ""
            *_, module, name = self.fn.split(".")
            lines = (ROOT / f"finetune_nb/{module}.py").read_text(encoding="utf-8").splitlines() if module else []
            line = next((n for n, text in enumerate(lines, 1) if re.match(rf"(async )?(def|class) {name}\b", text)), 1)
            return "\n\n".join(filter(None, [super()._repr_markdown_().replace("#LNone", f"#L{line}"), parameters(self.sym)]))

    return show_doc(sym, renderer=Documented, **more)


def processed(path):
    "A notebook as nbdev makes its page, the signatures of what it exports in it"
    from fastcore.nbio import mk_cell, read_nb
    from nbdev.processors import FilterDefaults, clean_magics, exec_show_docs

    class Signatures(exec_show_docs):
        "Shows what the module holds. nbdev would run the exported cells and every cell with an import in it, and look a bare name up in any module that has it"
        def begin(self):
            module = next((c.directives_["default_exp"] for c in self.nb.cells if "default_exp" in c.directives_), "")
            if not module: return
            super().begin()
            self.k.user_ns.update(vars(import_module(f"finetune_nb.{module}")), show_doc=documented)

        def __call__(self, cell):
            if "\nshow_doc(" in cell.source: super().__call__(cell)

        def end(self): "Widgets are not kept"

    class Page(FilterDefaults):
        def base_procs(self): return [Signatures if p is exec_show_docs else p for p in super().base_procs() if p is not clean_magics]  # it reads pyproject.toml anew for each cell

    book = read_nb(path)
    Page()(book)
    module = NUMBER.sub("", path.name).removesuffix(".ipynb") if path.parent.name == "nbs" else ""
    if button := colab(path, path.read_text(encoding="utf-8")): book.cells.insert(1, mk_cell(button, cell_type="markdown"))
    for cell in book.cells:
        if cell.cell_type == "markdown": cell.source = meant("".join(cell.source), module, homes())
        for data in (o.get("data", {}) for o in cell.get("outputs", [])):
            if "text/markdown" in data: data["text/markdown"] = meant("".join(data["text/markdown"]), module, homes())
    return book


def stage(folder, out):
    "Lay out in a folder what a renderer of Quarto websites takes"
    from fastcore.nbio import nb2str
    os.chdir(ROOT)
    os.environ["IN_TEST"] = "1"
    for path in (p for p in sorted((ROOT / "nbs").rglob("*")) if p.is_file() and not any(part[0] in "._" for part in p.relative_to(ROOT / "nbs").parts)):
        place = folder / NUMBER.sub("", path.relative_to(ROOT / "nbs").as_posix())
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".ipynb": place.write_text(notebook(nb2str(processed(path))), encoding="utf-8")
        elif path.suffix != ".yml": shutil.copy2(path, place)
    (folder / "_quarto.yml").write_text(settings((ROOT / "_quarto.yml").read_text(encoding="utf-8"), out), encoding="utf-8")
    if address(): return
    (folder / "source").mkdir()
    for module in (ROOT / "finetune_nb").glob("[!_]*.py"): (folder / "source" / f"{module.stem}.qmd").write_text(listing(module), encoding="utf-8")


def with_smalldocs(out):
    "Render with smalldocs; what it has to complain of"
    from smalldocs.site import build
    with tempfile.TemporaryDirectory(prefix="stage-") as folder:
        stage(Path(folder), out.resolve())
        return build(folder, quiet=True).warnings


def with_quarto(out):
    "Render with Quarto, as nbdev-docs does"
    subprocess.run([str(Path(sys.executable).with_name("nbdev-docs"))], cwd=ROOT, check=True)
    if out.resolve() == ROOT / "_docs": return []
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(ROOT / "_docs", out)
    return []


def main(arguments=None):
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("folder", nargs="?", default=str(ROOT / "_docs"))
    options.add_argument("--smalldocs", action="store_true", help="also where Quarto is installed")
    given = options.parse_args(arguments)
    quarto, out = None if given.smalldocs else shutil.which("quarto"), Path(given.folder).absolute()
    if not quarto and not find_spec("smalldocs"):
        sys.exit("No renderer is here. Install one and do this again:\n  quarto     from quarto.org; the renderer this site is written for\n  smalldocs  with: pip install 'finetune_nb[docs]'")
    print(f"rendering with {'quarto' if quarto else 'smalldocs, because quarto is not on the path' if not given.smalldocs else 'smalldocs'}", flush=True)
    warnings = (with_quarto if quarto else with_smalldocs)(out)
    for name, copy in BESIDE.items():
        if (ROOT / name).is_file(): (out / copy).write_text(beside((ROOT / name).read_text(encoding="utf-8")), encoding="utf-8")
    print("\n".join([*warnings, f"{len(list(out.rglob('*.html')))} pages in {given.folder}; open {out / 'index.html'}, or for the search: python -m http.server -d {given.folder}"]))
    return 1 if warnings else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # IPython takes three times as long to put away a shell for each notebook as all pages took to be made
