"""The built package: an installed wheel holds what a checkout has, and says what settings.ini says."""
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "Source archive and wheel, the wheel built from the unpacked source archive, as an installer without a wheel would"
    tmp = tmp_path_factory.mktemp("built")
    tree = tmp / "tree"  # a copy, so that building leaves nothing in the checkout
    tree.mkdir()
    for path in ROOT.iterdir():
        if path.is_file(): shutil.copy2(path, tree)
    for folder in ("finetune_nb", "nbs", "tests"): shutil.copytree(ROOT / folder, tree / folder, symlinks=True)
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp / "dist", tree], cwd=tmp, capture_output=True, text=True)
    assert done.returncode == 0, f"the package does not build:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return next((tmp / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(built):
    "{name in the wheel: bytes}"
    with zipfile.ZipFile(built) as z: return {n: z.read(n) for n in z.namelist()}


def test_every_module_is_in_the_wheel(wheel):
    modules = {f"finetune_nb/{p.name}" for kind in ("*.py", "*.json", "*.txt") for p in (ROOT / "finetune_nb").glob(kind)}
    assert {"finetune_nb/shapes.json", "finetune_nb/general.txt"} <= modules
    assert modules and modules <= wheel.keys(), f"missing: {modules - wheel.keys()}"


def test_pipelines_are_in_the_wheel(wheel):
    notebooks = {f"finetune_nb/pipelines/{p.name}": p.read_bytes() for p in (ROOT / "nbs" / "pipelines").glob("[!_.]*.ipynb")}
    assert "finetune_nb/pipelines/finetune.ipynb" in notebooks, "nbs/pipelines/finetune.ipynb is missing"
    assert notebooks == {n: b for n, b in wheel.items() if n.endswith(".ipynb")}


def test_nothing_else_is_in_the_wheel(wheel):
    strangers = [n for n in wheel if not n.startswith("finetune_nb/") and ".dist-info/" not in n]
    assert not strangers, f"setup.py packs {strangers}"


def test_metadata_is_that_of_the_settings(wheel):
    config, meta = settings(), message_from_bytes(next(b for n, b in wheel.items() if n.endswith(".dist-info/METADATA")))
    assert (meta["Name"], meta["Version"], meta["Summary"]) == (config["lib_name"], config["version"], config["description"])
    assert meta["Requires-Python"] == f">={config['min_python']}"
    assert meta["License"] == "Apache-2.0" and any(n.endswith("/LICENSE") for n in wheel)
    needed = [r for r in meta.get_all("Requires-Dist") if "extra ==" not in r]
    assert sorted(needed) == sorted(config["requirements"].split())
    assert {"demo", "lab", "data", "track", "parallel", "gguf", "compressed", "app", "docs", "dev"} == set(meta.get_all("Provides-Extra"))


def test_commands_are_declared(wheel):
    points = ConfigParser(delimiters=["="])
    points.read_string(next(b for n, b in wheel.items() if n.endswith("entry_points.txt")).decode())
    assert dict(points["console_scripts"]) == {"finetune-nb": "finetune_nb.cli:main"}
    assert dict(points["nbdev"]) == {"finetune_nb": "finetune_nb._modidx:d"}
