"""Make finetune_nb/shapes.json from the rows of nbs/01b_known.ipynb: python tools/shapes.py

Every model is built from transformers' own class on the meta device, so no weight is read. Run it when a row
or transformers changes; tests/test_known.py says when it is due.
"""
import json
from dataclasses import fields
from pathlib import Path

from finetune_nb.core import write_atomic
from finetune_nb.known import KNOWN
from finetune_nb.shapes import Shapes, to_json
from finetune_nb.tree import read

FILE = Path(__file__).resolve().parents[1] / "finetune_nb/shapes.json"
DEFAULTS = {f.name: f.default for f in fields(Shapes)}


def stored(shapes):
    "What the file keeps of a model: everything but its name and what is at its default"
    return {k: v for k, v in to_json(shapes).items() if k != "name" and v != DEFAULTS[k]}


def read_row(known):
    "The shapes of a row, from the model's class"
    return read(known.config | {"model_type": known.model_type}, known.name)


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}:{json.dumps(stored(read_row(KNOWN[name])), separators=(',', ':'))}" for name in sorted(KNOWN)]
    write_atomic(FILE, "{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(lines)} models, {FILE.stat().st_size:,} bytes")
