"The targets train, save, reload and merge on every causal language model of the installed transformers (about a minute of processor time in all)"
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import architectures
from architectures import BY_HAND, NOT_BUILT, TYPES, holds, prove, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_nb.targets import targets
from finetune_nb.tree import of, read

RECORDED = max((ROOT / "bench" / "results").glob("*-architectures.json"))
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def recorded(): return {r["model_type"]: r for r in json.loads(RECORDED.read_text())["rows"]}


@pytest.mark.parametrize("kind", TYPES)
def test_proof(kind, recorded):
    row = prove(kind)
    if kind in NOT_BUILT:
        assert not row["built"], f"{kind} can be built now: prove it, and take it off the list"
        return
    assert holds(row), {k: v for k, v in row.items() if k in ("reason", "error", "counted", "counted_trainable", "no_gradient", "not_moved", "base_moved", "change", "reloaded", "merge")}
    for name in ("target_modules", "target_parameters", "exclude", "coverage"):
        assert row[name] == recorded[kind][name], f"bench/results/{RECORDED.name} shows other targets: run bench/architectures.py again"


def test_the_record_covers_every_type(recorded):
    assert set(recorded) == set(TYPES), f"run bench/architectures.py again: {set(recorded) ^ set(TYPES)}"
    failed = {k for k, r in recorded.items() if not holds(r)}
    assert failed == set(NOT_BUILT) and all(recorded[k]["reason"] for k in failed)
    assert len(recorded) - len(failed) >= 180


def layers(shapes): return {(w.name.split(".*.")[1], w.kind, w.linear) for w in shapes.weights if w.inside and len(w.shape) > 1}


@pytest.mark.parametrize("kind", [k for k in TYPES if k not in (*NOT_BUILT, "dbrx", "reformer")])  # these two have no full configuration by default
def test_the_tiny_instance_has_every_layer_of_the_full_one(kind):
    with torch.device("meta"): small = AutoModelForCausalLM.from_config(tiny_config(kind))
    small, full = of(small), read(AutoConfig.for_model(kind, **BY_HAND.get(kind, {}).get("first", {})), kind)
    assert not layers(full) - layers(small)
    assert bool(targets(full).exclude) == bool(targets(small).exclude)


# ---- can it fail?

def with_targets(monkeypatch, **changes):
    found = architectures.targets
    monkeypatch.setattr(architectures, "targets", lambda shapes: dataclasses.replace(found(shapes), **changes))


@pytest.mark.parametrize("kind, changes, what", [
    ("bart", dict(target_modules=("q_proj", "fc1")), "no_gradient"),  # hits the cross-attention too
    ("laguna", dict(target_modules=("q_proj", "up_proj")), "reloaded"),  # the libraries lose the shared experts
    ("qwen3_next", dict(target_modules=("q_proj", "gate_proj", "up_proj"), target_parameters=()), "counted_trainable"),  # peft takes them for the experts
    ("deepseek_v32", dict(target_modules=("q_a_proj", "wq_b"), target_parameters=()), "no_gradient"),  # an indexer
    ("gemma3", dict(exclude=""), "counted_trainable"),  # hits the vision tower too
])
def test_wrong_targets_are_caught(kind, changes, what, monkeypatch):
    with_targets(monkeypatch, **changes)
    row = prove(kind)
    assert not holds(row) and (row[what] is False if what == "counted_trainable" else row[what]), row


def test_a_moving_base_is_caught(monkeypatch):
    real = architectures.trained
    def trained(model, ids):
        grads = real(model, ids)
        with torch.no_grad(): next(p for p in model.parameters() if not p.requires_grad).add_(1.0)
        return grads
    monkeypatch.setattr(architectures, "trained", trained)
    assert prove("llama")["base_moved"] and not holds(prove("llama"))
