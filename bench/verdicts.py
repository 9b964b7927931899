"""What the verdict's statistics do over and over: false alarms, differences found, intervals that hold the truth.

usage: python bench/verdicts.py [--simulations 2000] [--only null,power,smallest,ruled,curve,intervals] [--out bench/results/NAME.json]

Arms answer the same rows. A row is hard for every arm (half of what decides is shared), the rest is each arm's own.
Scores are rights and wrongs, or graded from 0 to 1 with most of them near the ends, or rights and wrongs in groups of
ten rows from one template, where an arm is good or bad at a whole template. Parts null and
power are simulated as often as --simulations says, the others half as often. Beside our procedure stands what people
otherwise do: an unpaired t-test for each pair, uncorrected, as if all rows were independent.
"""
import argparse
import os
import platform
import subprocess
import time
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy import stats

from finetune_nb import compare_scores, differences as module
from finetune_nb.core import write_json
from finetune_nb.differences import differences, mean_score, pair_interval, smallest_difference
from finetune_nb.hardware import versions
from finetune_nb.verdict import ORDER, judge_arms, more_data

KINDS, SIZES, BASES, ARMS, GROUP = ("binary", "graded", "clustered"), (30, 100, 200, 1000), (0.05, 0.5, 0.95), list(ORDER), 10
compare_scores.interval = module.interval = lru_cache(None)(module.interval)  # the same few intervals are asked for millions of times
GRID = np.linspace(-5, 5, 4001)


def scores(rng, kind, times, n, means, shared=0.5, within=0.5):
    "times x arms x n scores with the given true means; `shared` of an arm's variance belongs to the row, `within` of the rest to its template"
    normal, arms = rng.standard_normal, len(means)
    row, own = normal((times, 1, n)), normal((times, arms, n))
    if kind == "clustered":
        spread = lambda a: np.repeat(normal((times, a, -(-n // GROUP))), GROUP, axis=2)[:, :, :n]
        row, own = (np.sqrt(within) * spread(x.shape[1]) + np.sqrt(1 - within) * x for x in (row, own))
    latent = np.sqrt(shared) * row + np.sqrt(1 - shared) * own
    if kind != "graded": return (latent > stats.norm.isf(means)[:, None]).astype(float)
    return np.stack([np.interp(latent[:, j], GRID, stats.beta.ppf(stats.norm.cdf(GRID), m, 1 - m)) for j, m in enumerate(means)], 1)


def groups_of(kind, n): return [i // GROUP for i in range(n)] if kind == "clustered" else None


def as_arms(x): return dict(zip(ARMS if len(x) > 2 else ("prompt", "finetune"), x.tolist()))


def usual(x):
    "times x pairs p-values of unpaired t-tests on independent rows (Welch)"
    n, mean, var = x.shape[2], x.mean(2), x.var(2, ddof=1)
    a, b = np.triu_indices(x.shape[1], 1)
    error = np.sqrt((var[:, a] + var[:, b]) / n)
    with np.errstate(all="ignore"):
        df = (var[:, a] + var[:, b]) ** 2 * (n - 1) / (var[:, a] ** 2 + var[:, b] ** 2)
        return np.nan_to_num(2 * stats.t.sf(np.abs(mean[:, a] - mean[:, b]) / error, df), nan=1.0)


def share(k, n):
    "A share with its 95 % Wilson interval"
    low, high = stats.binomtest(int(k), int(n)).proportion_ci(method="wilson")
    return {"share": round(k / n, 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def wilson(k, n):
    z = stats.norm.ppf(0.975)
    centre, reach = (k + z * z / 2) / (n + z * z), z / (n + z * z) * np.sqrt(k * (n - k) / n + z * z / 4)
    return np.clip(centre - reach, 0, 1), np.clip(centre + reach, 0, 1)


def marks(x):
    "What `differences` says of all simulations of rights and wrongs at once: p, value, low, high of every pair a minus b"
    n, right = x.shape[2], x.sum(2)
    both = np.einsum("tan,tbn->tab", x, x, optimize=True)
    a, b = np.triu_indices(x.shape[1], 1)
    both, ka, kb = both[:, a, b], right[:, a], right[:, b]
    won, lost, neither = ka - both, kb - both, n - ka - kb + both
    p = np.minimum(1, 2 * stats.binom.cdf(np.minimum(won, lost), won + lost, 0.5))
    (la, ha), (lb, hb), (sa, sb), cross = wilson(ka, n), wilson(kb, n), (ka / n, kb / n), both * neither - won * lost
    spread = np.sqrt(ka * (n - ka) * kb * (n - kb))
    phi = np.where(spread > 0, np.where(cross > 0, np.maximum(cross - n / 2, 0), cross) / np.where(spread > 0, spread, 1), 0)
    reach = lambda u, v: np.sqrt(np.maximum(u * u - 2 * phi * u * v + v * v, 0))
    return p, sa - sb, sa - sb - reach(sa - la, hb - sb), sa - sb + reach(ha - sa, sb - lb)


def tested(x, groups):
    "(differ, value, low, high) of every pair in every simulation, and (low, high) of every arm; the first simulations are checked against `differences`"
    times, arms, n = x.shape
    a, b = np.triu_indices(arms, 1)
    if groups is None and set(np.unique(x)) <= {0, 1}: p, value, low, high = marks(x)
    else:
        d, size = x[:, a] - x[:, b], GROUP if groups else 1
        sums, p = d.reshape(times, len(a), -1, size).sum(3), np.empty((times, len(a)))
        for at in range(0, times, 20): p[at:at + 20] = module.sign_flip(sums[at:at + 20].transpose(2, 0, 1).reshape(sums.shape[2], -1)).reshape(-1, len(a))
        found = [[pair_interval(one[i], one[j], groups) for i, j in zip(a, b)] for one in x]
        value, low, high = (np.array([[q[k] for q in f] for f in found]) for k in ("value", "low", "high"))
    order = np.argsort(p, 1)
    corrected = np.empty_like(p)
    np.put_along_axis(corrected, order, np.minimum(1, np.maximum.accumulate(np.take_along_axis(p, order, 1) * np.arange(len(a), 0, -1), 1)), 1)
    differ = (corrected < 0.05) & ~((low <= 0) & (high >= 0))
    means = [[mean_score(s, groups) for s in one] for one in x]
    for i in range(10):
        slow = differences(as_arms(x[i]), groups)[1]
        assert np.allclose([[q[k] for k in ("p_holm", "value", "low", "high", "differ")] for q in slow], np.stack([v[i] for v in (corrected, value, low, high, differ)], 1), atol=1e-9), (slow, corrected[i])
    return differ, value, low, high, *(np.array([[m[k] for m in one] for one in means]) for k in ("low", "high"))


def said(x, groups, times=200):
    "{answer: how often} among the first simulations"
    found = [judge_arms(as_arms(one), groups).answer for one in x[:times]]
    return {a: found.count(a) for a in sorted(set(found))}


def null(times, rng):
    "Five identical arms: how often is any of ten pairs called different?"
    for n in SIZES:
        for kind in KINDS:
            for base in BASES:
                x, groups = scores(rng, kind, times, n, np.full(5, base)), groups_of(kind, n)
                differ, value, low, high, m_low, m_high = tested(x, groups)
                yield {"scores": kind, "rows": n, "base": base, "no_difference_claimed": share((~differ.any(1)).sum(), times), "t_test_claims_none": share((usual(x) >= 0.05).all(1).sum(), times),
                       "mean_coverage": round(float(((m_low <= base) & (m_high >= base)).mean()), 4), "pair_coverage": round(float(((low <= 1e-12) & (high >= -1e-12)).mean()), 4), "answers_in_200": said(x, groups)}


def power(times, rng):
    "One arm better by 15 points on 200 rows: how often is it shown to be better than the prompt?"
    for kind in KINDS:
        for arms in (2, 5):
            for base in (0.05, 0.5, 0.8):
                for shared in (0.2, 0.5, 0.8):
                    means = np.full(arms, base)
                    means[-1] += 0.15
                    x, groups = scores(rng, kind, times, 200, means, shared), groups_of(kind, 200)
                    differ, value, low, high, *_ = tested(x, groups)
                    at = arms - 2  # the pair of the first and the last arm
                    yield {"scores": kind, "arms": arms, "base": base, "shared": shared, "differ": round(float((x[:, 0] != x[:, -1]).mean()), 3), "sd_of_difference": round(float((x[:, -1] - x[:, 0]).std()), 3),
                           "found": share((differ[:, at] & (value[:, at] < 0)).sum(), times), "t_test_finds": share((usual(x)[:, at] < 0.05).sum(), times),
                           "pair_coverage": round(float(((low[:, at] <= -0.15) & (high[:, at] >= -0.15)).mean()), 4), "answers_in_200": said(x, groups)}


def smallest(times, rng):
    "The smallest difference that rows say they could see, planted: is it found in four of five cases?"
    for kind in KINDS:
        for n in (100, 200, 1000):
            gain = 0.1
            for _ in range(6):  # find the gain that equals the smallest difference at that gain
                x = scores(rng, kind, 40, n, np.array([0.5, 0.5 + gain]))
                gain = min(0.45, float(np.median([smallest_difference(*one.tolist(), groups_of(kind, n)) or 0.45 for one in x])))
            x = scores(rng, kind, times, n, np.array([0.5, 0.5 + gain]))
            yield {"scores": kind, "rows": n, "smallest": round(gain, 4), "found": share(sum(differences(as_arms(one), groups_of(kind, n))[1][0]["differ"] for one in x), times)}


def ruled(times, rng):
    "A fine-tuned arm is better by just as much as matters (5 points): how often is that wrongly ruled out?"
    for kind in KINDS:
        for n in (200, 1000, 3000):
            x, answers = scores(rng, kind, times, n, np.array([0.7, 0.75]), 0.9), {}
            for one in x:
                answer = judge_arms(as_arms(one), groups_of(kind, n)).answer
                answers[answer] = answers.get(answer, 0) + 1
            yield {"scores": kind, "rows": n, "ruled_out": share(sum(answers.get(a, 0) for a in ("no difference", "don't fine-tune")), times), "answers": answers}


def usual_intervals(u, draws=1000):
    "{method: (low, high)} of the mean of each line of u, by Student's t and two bootstraps over its units"
    n, mean, error = u.shape[1], u.mean(1), u.std(1, ddof=1) / np.sqrt(u.shape[1])
    weights = np.random.default_rng(1).multinomial(n, np.full(n, 1 / n), draws).T / n
    means = u @ weights
    errors = np.sqrt(np.maximum(u**2 @ weights - means**2, 0) / (n - 1))
    with np.errstate(all="ignore"): t = np.where(errors > 1e-9, (means - mean[:, None]) / errors, np.sign(means - mean[:, None]) * 1e9)
    half, (t_low, t_high), (low, high) = stats.t.ppf(0.975, n - 1) * error, np.quantile(t, (0.025, 0.975), axis=1), np.quantile(means, (0.025, 0.975), axis=1)
    studentised = np.where(error > 0, mean - t_high * error, mean), np.where(error > 0, mean - t_low * error, mean)
    return {"t": (mean - half, mean + half), "percentile": (low, high), "bootstrap_t": tuple(np.clip(s, -1, 1) for s in studentised)}


def intervals(times, rng):
    "Which interval holds the truth, and how wide is it? Ours, Student's t, the percentile bootstrap and the bootstrap-t"
    for kind in ("graded", "clustered"):
        for n in (30, 100, 200):
            for means in ((0.05, 0.05), (0.5, 0.5), (0.95, 0.95), (0.5, 0.65), (0.8, 0.95)):
                for shared in (0.5, 0.98):
                    x, groups = scores(rng, kind, times, n, np.array(means), shared), groups_of(kind, n)
                    units = lambda values: values.reshape(times, -1, GROUP).mean(2) if groups else values
                    ours = {"score": [mean_score(one[1].tolist(), groups) for one in x], "difference": [pair_interval(one[1].tolist(), one[0].tolist(), groups) for one in x]}
                    for what, values, truth in (("score", x[:, 1], means[1]), ("difference", x[:, 1] - x[:, 0], means[1] - means[0])):
                        found = {"ours": tuple(np.array([o[k] for o in ours[what]]) for k in ("low", "high"))} | usual_intervals(units(values))
                        yield {"scores": kind, "rows": n, "of": what, "means": means, "shared": shared,
                               **{m: {"coverage": round(float(((low <= truth + 1e-12) & (truth <= high + 1e-12)).mean()), 4), "width": round(float((high - low).mean()), 4)} for m, (low, high) in found.items()}}


def curve(times, rng):
    "Learning curves that are flat, flatten at the end, or rise: what is said about more data?"
    shapes = {"flat": (0.6, 0.6, 0.6), "flattens": (0.4, 0.6, 0.61), "rises by 8 points a doubling": (0.44, 0.52, 0.6), "rises by 15": (0.3, 0.45, 0.6)}
    for shape, means in shapes.items():
        for n in (50, 100, 200, 1000):
            x, answers = scores(rng, "binary", times, n, np.array(means)), {}
            for one in x:
                answer = more_data(dict(zip((125, 250, 500), one.tolist()))).answer
                answers[answer] = answers.get(answer, 0) + 1
            yield {"curve": shape, "rows": n, "answers": {a: round(k / times, 4) for a, k in sorted(answers.items())}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--only", default="null,power,smallest,ruled,curve,intervals")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    start, found = time.perf_counter(), {}
    for part in args.only.split(","):
        found[part] = []
        for line in {f.__name__: f for f in (null, power, smallest, ruled, curve, intervals)}[part](args.simulations if part in ("null", "power") else args.simulations // 2, np.random.default_rng(0)):
            print(part, *(f"{k} {v['share'] if isinstance(v, dict) and 'share' in v else v}" for k, v in line.items()), flush=True)
            found[part].append(line)
            result = dict(question="how often identical arms are called different, planted differences are found, and intervals hold the truth", simulations=args.simulations, **found, seconds=round(time.perf_counter() - start), load=os.getloadavg(),
                          python=platform.python_version(), versions=versions() | {"numpy": np.__version__}, date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                          commit=subprocess.run(["git", "describe", "--always", "--dirty=+changes", "--abbrev=12", "--match="], capture_output=True, text=True).stdout.strip())
            if args.out: write_json(args.out, result)  # after each line, for it takes long


if __name__ == "__main__":
    main()
