"""Make README.md from nbs/index.ipynb: python tools/readme.py

Markdown cells stay as they are, code cells become fenced Python, cells marked `#| hide` are left out.
A link to another page (05_recipe.ipynb) becomes its place in the repository (nbs/05_recipe.ipynb).
If pyproject.toml has the repository's public address, a tutorial is linked in Colab too.
"""
import json
import posixpath
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {}).get("Repository", "").rstrip("/")


def link(match):
    "A link as seen from the repository's top; addresses and places on the page itself stay"
    target = match[1]
    if re.match(r"[a-z]+:|#", target): return match[0]
    place, there = posixpath.normpath(f"nbs/{target}"), ADDRESS.replace("https://github.com", "https://colab.research.google.com/github", 1)
    return f"]({place})" + (f" ([Colab]({there}/blob/main/{place}))" if there != ADDRESS and place.startswith("nbs/tutorials/") else "")


def text(cell):
    "A cell as Markdown, or an empty text"
    source = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown": return re.sub(r"\]\(([^)\s]+)\)", link, source)
    if cell["cell_type"] != "code" or re.search(r"^#\|\s*hide\s*$", source, re.M): return ""
    return "```python\n" + re.sub(r"^#\|.*\n", "", source, flags=re.M) + "\n```"


def readme(notebook):
    "README.md of a notebook; the list of settings that nbdev reads under a title is left out"
    parts = [text(c) for c in notebook["cells"]]
    parts[0] = re.sub(r"^- [\w-]+:.*$", "", parts[0], flags=re.M).strip()
    return "\n\n".join(p for p in parts if p) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))), encoding="utf-8")
