"The benchmarks run, and the comparison with what was recorded finds what got slower"
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


def module(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


REGRESS = module("regress")


@pytest.mark.parametrize("now, verdicts", [(dict(a=4.0, b=2.0), ["", ""]), (dict(a=3.0, b=2.0), ["SLOWER", ""]), (dict(a=3.6, c=1.0), ["", ""])])
def test_what_got_slower_is_told(now, verdicts, capsys):
    before = (Path("old.json"), dict(ratios=dict(a=4.0, b=2.0), machine=dict(name="x")))
    rows = list(REGRESS.compared("train", dict(ratios=now, machine=dict(name="y")), before, 0.15))
    assert [r["verdict"] for r in rows] == verdicts
    assert "recorded on x, this is y" in capsys.readouterr().out


@pytest.mark.parametrize("name", REGRESS.QUICK)
def test_each_quick_benchmark_has_a_recorded_result(name):
    question = next(line for line in (BENCH / f"{name}.py").read_text().splitlines() if "question=" in line).split('question="')[1].split('"')[0]
    file, result = REGRESS.recorded(question)
    assert result["ratios"] and all(v > 0 for v in result["ratios"].values()) and result["machine"]["name"] and result["date"] and result["versions"], file


def test_the_newest_result_counts():
    file, result = REGRESS.recorded("how fast does training go, and how soon does it reach a held-out loss")
    same = [json.loads(f.read_text()) for f in (BENCH / "results").glob("*.json")]
    assert result["date"] == max(r["date"] for r in same if isinstance(r, dict) and r.get("question") == result["question"])


def test_training_arms_reach_the_same_losses(tmp_path, tiny_model):
    out = tmp_path / "train.json"
    done = subprocess.run([sys.executable, BENCH / "train.py", "--part", "same", "--rounds", "1", "--steps", "3", "--arms", "ours", "--model", tiny_model, "--out", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    arms = json.loads(out.read_text())["same"]["lora"]
    assert set(arms) == {"stock", "ours"} and len(arms["ours"]["rounds"][0]["losses"]) == 3
    assert arms["ours"]["losses_apart"] < 1e-3 and abs(arms["ours"]["held_loss"] - arms["stock"]["held_loss"]) < 1e-3  # TRL's tiles round differently on a random model
    assert arms["ours"]["rounds"][0]["tokens"] == arms["stock"]["rounds"][0]["tokens"] > 0
