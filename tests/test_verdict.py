"The verdict: exact values, what must not change it, and no claim that the rows do not carry."
import itertools
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from finetune_nb.compare_scores import paired_shares
from finetune_nb.core import UserError
from finetune_nb.differences import differences, holm, mcnemar_power, mean_score, pair_interval, sign_flip, smallest_difference, smallest_gain
from finetune_nb.evaluate import interval
from finetune_nb.verdict import ORDER, Verdict, judge_arms, look, more_data

MARKS, GRADES = st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])


def tables(values, arms=(2, 4), rows=(1, 25)):
    "{arm: scores}, all of one length"
    return st.integers(*rows).flatmap(lambda n: st.lists(st.lists(values, min_size=n, max_size=n), min_size=arms[0], max_size=arms[1])).map(lambda lists: dict(zip(ORDER, lists)))


def close(a, b): return a == b or (isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9))


def same(a, b): return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)


def arms(n, seed=0, **skills):
    "Rights and wrongs of arms on rows that are hard for all of them"
    rng = random.Random(seed)
    hard = [rng.gauss(0, 1.5) for _ in range(n)]
    return {a.replace("_", "-").replace("-and-", "+"): [float(s - h + rng.gauss(0, 0.7) > 0) for h in hard] for a, s in skills.items()}


# ---- against scipy and by hand

def test_shares_are_mcnemars_and_wilsons():
    scores = arms(80, prompt=0, finetune=0.8)
    found, [pair] = differences(scores)
    won, lost = (sum(y > x for x, y in zip(*pair_)) for pair_ in ((scores["prompt"], scores["finetune"]), (scores["finetune"], scores["prompt"])))
    assert pair["p"] == stats.binomtest(won, won + lost).pvalue == pair["p_holm"]
    assert (found["prompt"]["low"], found["prompt"]["high"]) == interval(sum(scores["prompt"]), 80)
    newcombe = paired_shares(scores["finetune"], scores["prompt"])
    assert (pair["value"], pair["low"], pair["high"]) == (newcombe["value"], newcombe["low"], newcombe["high"])
    assert mean_score([1.0] * 45 + [0.0] * 5)["low"] == pytest.approx(0.7863976857) and mean_score([1.0] * 45 + [0.0] * 5)["high"] == pytest.approx(0.9565242351)  # statsmodels 0.14


@pytest.mark.parametrize("n, tolerance", [(1, 0), (2, 0), (5, 0), (12, 0), (13, 0.02), (16, 0.02)])
@pytest.mark.parametrize("shift", [0.0, 0.2, 0.5])
def test_sign_flip_is_scipys(n, tolerance, shift):
    d = np.random.default_rng(n).normal(shift, 0.5, n).round(2)
    expected = stats.permutation_test((d,), lambda x, axis: x.sum(axis), permutation_type="samples", n_resamples=np.inf, vectorized=True).pvalue if n > 1 else 1.0
    assert sign_flip(d[:, None])[0] == pytest.approx(expected, abs=tolerance or 1e-12)


def test_sign_flip_of_marks_is_mcnemar():
    for won, lost in ((9, 2), (30, 12), (700, 600), (0, 0), (1500, 40)):
        p = sign_flip(np.array([1.0] * won + [-1.0] * lost + [0.0] * 50)[:, None])[0]
        assert p == pytest.approx(stats.binomtest(won, won + lost).pvalue if won else 1.0, abs=0.015)


def test_holm_is_statsmodels(): assert holm([0.01, 0.04, 0.03, 0.005, 0.2]) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.2])


@pytest.mark.parametrize("n, differ, gain", [(8, 0.9, 0.6), (8, 1.0, 1.0), (9, 0.5, 0.0), (10, 0.8, 0.7)])
def test_power_is_that_of_all_outcomes(n, differ, gain):
    "Every split of n rows into won, lost and the same, weighed by its chance"
    up, down, total = (differ + gain) / 2, (differ - gain) / 2, 0.0
    for won, lost in itertools.product(range(n + 1), repeat=2):
        if won + lost > n or not won + lost or stats.binomtest(won, won + lost).pvalue > 0.05: continue
        ways = math.factorial(n) // (math.factorial(won) * math.factorial(lost) * math.factorial(n - won - lost))
        total += ways * up**won * down**lost * max(1 - differ, 0) ** (n - won - lost)
    assert mcnemar_power(n, differ, gain) == pytest.approx(total, abs=1e-6)


def test_smallest_gain_of_the_handbooks():
    "Power of the paired test as worked out independently for the plan: 13 points at 100 rows, 9.5 at 200, 4.5 at 1,000"
    assert [round(100 * smallest_gain(n, 0.2)) for n in (100, 200)] == pytest.approx([13, 9], abs=1)
    assert mcnemar_power(200, 0.2, smallest_gain(200, 0.2)) == pytest.approx(0.8, abs=0.01)
    assert smallest_gain(30, 0.2, 0.005) > smallest_gain(30, 0.2, 0.05) > smallest_gain(60, 0.2, 0.05)
    assert smallest_gain(5, 0.5) is None and smallest_difference([0.5, 0.1], [0.2, 0.3]) is None


# ---- what must not matter, and what must

@given(tables(MARKS) | tables(GRADES), st.randoms())
@settings(max_examples=60, deadline=None)
def test_order_of_rows_and_arms_does_not_matter(scores, rng):
    n = len(scores["prompt"])
    order = rng.sample(range(n), n)
    found, pairs = differences(scores)
    moved, moved_pairs = differences({a: [s[i] for i in order] for a, s in scores.items()})
    assert all(same(found[a], moved[a]) for a in found) and all(same(p, q) for p, q in zip(pairs, moved_pairs))
    for p in differences(dict(reversed(scores.items())))[1]:
        q = next(q for q in pairs if (q["a"], q["b"]) == (p["b"], p["a"]))
        assert same(p, q | {"a": p["a"], "b": p["b"], "value": -q["value"], "low": -q["high"], "high": -q["low"]})


@given(tables(MARKS) | tables(GRADES))
@settings(max_examples=60, deadline=None)
def test_figures_are_in_range_and_agree(scores):
    found, pairs = differences(scores)
    for a, m in found.items(): assert 0 <= m["low"] <= m["mean"] <= m["high"] <= 1 and m["low"] < m["high"], a
    for p in pairs:
        assert -1 <= p["low"] <= p["value"] <= p["high"] <= 1 and 0 < p["p"] <= p["p_holm"] <= 1
        assert p["value"] == pytest.approx(found[p["a"]]["mean"] - found[p["b"]]["mean"])
        if p["differ"]: assert p["p_holm"] < 0.05 and not p["low"] <= 0 <= p["high"]
        if scores[p["a"]] == scores[p["b"]]: assert p["p"] == 1 and not p["differ"]


@given(tables(MARKS, arms=(2, 3)) | tables(GRADES, arms=(2, 3)), GRADES)
@settings(max_examples=40, deadline=None)
def test_one_more_arm_only_makes_the_test_stricter(scores, constant):
    graded = scores | {"finetune+rag": [constant] * len(scores["prompt"])}
    if constant not in (0, 1) and all(set(s) <= {0, 1} for s in scores.values()): return  # the same test then, with drawn instead of counted flips
    before = {(p["a"], p["b"]): p for p in differences(scores)[1]}
    after = {(p["a"], p["b"]): p for p in differences(graded)[1]}
    for k, p in before.items(): assert all(close(p[x], after[k][x]) for x in ("value", "low", "high", "p")) and p["p_holm"] <= after[k]["p_holm"] + 1e-12


@given(tables(GRADES, rows=(4, 20)), st.randoms())
@settings(max_examples=30, deadline=None)
def test_names_of_groups_do_not_matter_and_groups_of_one_are_none(scores, rng):
    n = len(scores["prompt"])
    groups = [rng.randrange(4) for _ in range(n)]
    one, two = differences(scores, groups), differences(scores, [f"template {g}" for g in groups])
    assert one == two and differences(scores, list(range(n))) == differences(scores)


@pytest.mark.parametrize("graded", [False, True])
def test_rows_written_ten_times_are_not_more_rows(graded):
    "The same 30 rows, each ten times and marked as one group, say what the 30 rows say"
    rng = random.Random(3)
    a, b = ([rng.choice([0.0, 0.5, 1.0] if graded else [0.0, 1.0]) for _ in range(30)] for _ in range(2))
    ten = lambda s: [x for x in s for _ in range(10)]
    groups = ten(range(30))
    _, [one] = differences({"prompt": a, "rag": b}, [i if i else 29 for i in range(30)])  # in groups, so that both use the same formulas
    _, [many] = differences({"prompt": ten(a), "rag": ten(b)}, [g if g else 29 for g in groups])
    assert all(close(one[k], many[k]) for k in ("value", "low", "high", "p"))
    blind = differences({"prompt": ten(a), "rag": ten(b)})[1][0]
    assert blind["high"] - blind["low"] < 0.5 * (many["high"] - many["low"]), "unmarked, they would seem to say far more"
    assert mean_score(ten(a), groups)["effective"] <= 40 < mean_score(ten(a))["effective"]


def test_equal_scores_are_not_certainty():
    for n in (2, 5, 20):
        for value in (0.0, 0.3, 1.0):
            m = mean_score([value] * n)
            assert m["high"] - m["low"] > 1 / (2 * n), (n, value)
            assert pair_interval([value] * n, [value] * n)["high"] > 1 / (2 * n)
    assert (mean_score([0.4])["low"], mean_score([0.4])["high"]) == (0, 1) and mean_score([0.2, 0.6], ["a", "a"])["high"] == 1


# ---- the verdict

def test_answers():
    assert judge_arms(arms(400, prompt=-1, rag=-1, finetune=1.5)).answer == "fine-tune"
    assert judge_arms(arms(400, prompt=-1, rag=1.5, finetune=-1)).answer == "retrieve"
    assert judge_arms(arms(400, prompt=-1, rag=-1, finetune=-1, finetune_and_rag=1.5)).answer == "fine-tune and retrieve"
    assert judge_arms(arms(400, prompt=1.5, rag=-1, finetune=-1)).answer == "don't fine-tune"
    assert judge_arms(arms(400, prompt=-1, few_shot=1.5, finetune=-1)).answer == "don't fine-tune"
    assert judge_arms(arms(400, prompt=-1, few_shot=1.5)).answer == "few-shot"
    assert judge_arms(arms(400, prompt=1.5, rag=-1)).answer == "prompt"
    assert judge_arms(arms(25, prompt=0, finetune=0.2)).answer == "undecided"
    small = judge_arms(arms(12, prompt=-9, finetune=9))
    assert small.answer == "fine-tune" and small.arm == "finetune", "a large difference shows on few rows"


def test_a_verdict_says_what_it_rests_on():
    v = judge_arms(arms(120, prompt=-1, rag=0.9, finetune=1), costs={"prompt": 1, "rag": 3, "finetune": 2})
    assert v.answer == "retrieve" and "rag is better than prompt by" in v.text and "after correction for 3 pairs" in v.text
    assert v.approach == "rag" and not v.certain and "finetune may be better still" in v.text
    u = judge_arms(arms(40, prompt=0, finetune=0.3))
    assert u.approach == "undecided" and u.arm == "prompt" and "too small" in u.text and "only differences above" in u.text and "such rows would show 5 points" in u.text
    n = judge_arms({"prompt": [1.0] * 300 + [0.0] * 100, "finetune": [1.0] * 300 + [0.0] * 100})
    assert n.answer == "no difference" and n.arm == "prompt" and n.certain
    cheap = judge_arms(arms(400, prompt=1.5, finetune=-1), costs={"prompt": 0.1, "finetune": 0.2})
    assert "simpler and cheaper" in cheap.text and "cheaper" not in judge_arms(arms(400, prompt=1.5, finetune=-1), costs={"prompt": 0.3, "finetune": 0.2}).text


def test_ten_thousand_rows_show_what_does_not_matter():
    a = [1.0] * 7000 + [0.0] * 3000
    b = [1.0] * 7050 + [0.0] * 2950
    v = judge_arms({"prompt": a, "finetune": b})
    assert v.pairs[0]["differ"] and v.answer == "no difference" and v.arm == "prompt"
    assert judge_arms({"prompt": a, "finetune": b}, matters=0.001).answer == "fine-tune"


def test_simpler_wins_among_equals_and_cheaper_among_the_equally_simple():
    both = arms(400, prompt=-1, rag=1.5)
    v = judge_arms({"finetune+rag": both["rag"], "finetune": both["rag"], "rag": both["rag"], "prompt": both["prompt"]})
    assert v.arm == "rag" and list(v.arms) == ["prompt", "rag", "finetune", "finetune+rag"] and v.certain
    hosted = {"here": both["rag"], "hosted": both["rag"], "finetune": both["rag"]}
    kinds = {"here": "prompt", "hosted": "prompt"}
    assert judge_arms(hosted, kinds=kinds, costs={"here": 2.0, "hosted": 1.0}).arm == "hosted"
    assert judge_arms(hosted, kinds=kinds, costs={"here": 1.0, "hosted": 2.0}).arm == "here"


def test_no_claim_without_enough_rows():
    for n in (1, 2, 5):
        v = judge_arms({a: [float(i == 4)] * n for i, a in enumerate(ORDER)})
        assert v.answer == "undecided" and "too small" in v.text and any("too few for any difference" in note for note in v.notes)
    grouped = judge_arms({"prompt": [0.0] * 100, "finetune": [1.0] * 100}, groups=[i % 3 for i in range(100)])
    assert grouped.answer == "undecided" and grouped.groups == 3 and any("3 groups are too few" in n for n in grouped.notes)


def test_one_arm_and_broken_arms():
    one = judge_arms({"prompt": [1, 0, 1]})
    assert one.answer == "undecided" and "nothing to compare" in one.text and one.pairs == [] and not one.certain
    s = arms(200, prompt=-1, finetune=1.5)
    v = judge_arms(s | {"rag": [None] * 200})
    assert v.answer == "fine-tune" and "rag" not in v.arms and "rag failed on 200 of 200 rows" in v.notes[0]
    gone = [None] * 30 + s["finetune"][30:]
    v = judge_arms({"prompt": s["prompt"], "finetune": gone})
    assert v.rows == 170 and v.arms["finetune"]["failed"] == 30 and any("30 rows are left out" in n for n in v.notes)
    assert v.variants["failed rows counted as wrong"]["rows"] == 200
    with pytest.raises(UserError, match="no row that all arms have"): judge_arms({"prompt": [None, None], "rag": [None, None]})
    with pytest.raises(UserError, match="no row"): judge_arms({"prompt": [None, 1], "rag": [1, None]})


def test_failures_that_decide_are_named():
    "An arm that fails exactly where it would have been wrong must not win by that"
    right = [1.0] * 60 + [0.0] * 60
    v = judge_arms({"prompt": right, "finetune": [1.0] * 30 + [None] * 30 + [1.0] * 30 + [0.0] * 30})
    assert v.answer == "fine-tune" and any(n.startswith("Failed rows counted as wrong, the answer would be: ") for n in v.notes)


def test_leaked_rows_are_left_out_and_shown():
    s = arms(200, prompt=-0.5, finetune=-0.5)
    leaked = [i < 100 for i in range(200)]
    s["finetune"][:100] = [1.0] * 100  # it has seen them
    v = judge_arms(s, leaked=leaked)
    assert v.rows == 100 and v.answer in ("undecided", "no difference") and v.variants["with leaked rows"]["answer"] == "fine-tune" and v.variants["with leaked rows"]["rows"] == 200
    assert any(n.startswith("With leaked rows, the answer would be: fine-tune") for n in v.notes)
    assert not judge_arms(s, leaked=[False] * 200).variants


def test_groups_take_away_what_only_looks_like_much():
    rng = random.Random(0)
    good = [rng.random() < 0.75 for _ in range(8)]  # eight templates, of which fine-tuning learned most
    groups = [i // 25 for i in range(200)]
    s = {"prompt": [0.0 if good[g] else 1.0 for g in groups], "finetune": [1.0 if good[g] else 0.0 for g in groups]}
    assert judge_arms(s).answer == "fine-tune" and judge_arms(s, groups=groups).answer == "undecided"


def test_a_row_without_group_is_its_own():
    s = arms(60, prompt=-1, finetune=1)
    assert judge_arms(s, groups=[None] * 60).pairs == judge_arms(s).pairs
    v = judge_arms(s, groups=[None] * 40 + ["a"] * 20)
    assert v.groups == 41 and v.pairs == judge_arms(s, groups=list(range(40)) + ["a"] * 20).pairs


@pytest.mark.parametrize("given_, says", [
    (dict(scores={}), "no arm with rows"), (dict(scores={"prompt": []}), "no arm with rows"), (dict(scores={"prompt": [1], "rag": [1, 0]}), "different numbers of rows"),
    (dict(scores={"prompt": [1, 2]}), "scores of prompt, row 2"), (dict(scores={"prompt": [1, float("nan")]}), "row 2"), (dict(scores={"prompt": ["1"]}), "row 1"), (dict(scores={"prompt": [-0.1]}), "row 1"),
    (dict(scores={"promt": [1]}), "Did you mean 'prompt'"), (dict(scores={"gpt": [1]}, kinds={"gpt": "big"}), "big"),
    (dict(scores={"prompt": [1, 0]}, groups=[1]), "groups: has 1 entries for 2 rows"), (dict(scores={"prompt": [1, 0]}, leaked=[True]), "leaked: has 1"), (dict(scores={"prompt": [1, 0]}, leaked=[1, 1]), "marks every row"),
    (dict(scores={"prompt": [1, 0]}, matters=0), "between 0 and 1"), (dict(scores={"prompt": [1, 0]}, matters=5), "0.05 means"),
])
def test_bad_input(given_, says):
    with pytest.raises(UserError, match=says): judge_arms(**given_)


def test_all_problems_at_once():
    with pytest.raises(UserError) as error: judge_arms({"gpt": [3], "prompt": [1, 1]}, groups=[1, 2, 3], matters=2)
    assert len(error.value.problems) == 5


@given(tables(st.none() | GRADES, arms=(1, 5), rows=(1, 14)), st.randoms())
@settings(max_examples=80, deadline=None)
def test_any_scores_give_a_verdict_or_a_sentence(scores, rng):
    n = len(scores["prompt"])
    try: v = judge_arms(scores, groups=[rng.randrange(3) for _ in range(n)] if rng.random() < 0.5 else None, leaked=[rng.random() < 0.3 for _ in range(n)], looks=rng.randrange(1, 4))
    except UserError: return
    json.dumps(v.to_json(), allow_nan=False)
    assert v.text and v._repr_html_() and v._repr_markdown_() and v.arm in v.arms
    if not any(p["differ"] for p in v.pairs): assert v.answer not in ("fine-tune", "fine-tune and retrieve") or "finetune" in next(iter(v.arms))


def test_what_people_typed_is_shown_as_text():
    name = "rag-<img src=x onerror=alert(1)>|**b**"
    v = judge_arms({"prompt": [1, 0] * 20, name: [0, 1] * 20}, looks=3)
    assert "<img" not in v._repr_html_() and "&lt;img" in v._repr_html_()
    assert "<img" not in v._repr_markdown_() and "|**b" not in v._repr_markdown_()
    assert any("looked at 3 times" in n for n in v.notes)
    loaded = json.loads(json.dumps(v.to_json(), allow_nan=False))
    assert Verdict(**loaded).text == v.text and Verdict(**loaded)._repr_markdown_() == v._repr_markdown_()
    v.plot().canvas.draw()


# ---- more data, and looks

def test_more_data():
    up = {n: arms(600, finetune=s)["finetune"] for n, s in ((125, -1.0), (250, 0.0), (500, 1.0))}
    assert more_data(up).answer == "yes"
    assert more_data(up, spread=0.2).answer == "cannot tell", "training runs that differ by 20 points make three points worthless"
    flat = {n: arms(600, finetune=1.0)["finetune"] for n in (125, 250, 500)}
    assert more_data(flat).answer == "no" and abs(more_data(flat).slope["value"]) < 1e-9
    assert more_data({250: flat[250][:8], 500: flat[250][:8]}).answer == "cannot tell", "eight rows on which nothing changes are not a flat curve"
    down = more_data({125: up[500], 250: up[250], 500: up[125]})
    assert down.answer == "no" and json.dumps(down.to_json(), allow_nan=False)


def test_slope_is_points_for_each_doubling():
    curve = {100: [0.0] * 50 + [1.0] * 50, 200: [0.0] * 40 + [1.0] * 60, 800: [0.0] * 20 + [1.0] * 80}  # 10 points for each doubling
    found = more_data(curve)
    assert found.slope["value"] == pytest.approx(0.1) and found.last["value"] == pytest.approx(0.1)
    assert more_data(dict(reversed(curve.items()))) == found
    assert more_data(curve, groups=[i // 10 for i in range(100)]).last["low"] < found.last["low"]


@pytest.mark.parametrize("curve, says", [({}, "two sizes"), ({500: [1, 0]}, "two sizes"), ({250: [1, 0], 500: [1]}, "different numbers"), ({250: [1, 7], 500: [1, 0]}, "row 2"), ({250: [None, None], 500: [1, 0]}, "too few"), ({250: [1], 500: [1]}, "too few")])
def test_more_data_bad_input(curve, says):
    with pytest.raises(UserError, match=says): more_data(curve)


def test_looks_are_counted_over_time(tmp_path):
    rows = [{"text": "é"}]
    assert [look(tmp_path, rows) for _ in range(3)] == [1, 2, 3] and look(tmp_path, [{"text": "e"}]) == 1
    (tmp_path / "looks.json").write_text("{broken")
    with pytest.raises(UserError, match="looks.json"): look(tmp_path, rows)
