"""Simulated steps against measured ones, and a table of simulated steps for the formulas to agree with.

python bench/memory/simulate.py measured [--out bench/results/DATE-simulate.json]
    simulates every published row that ran on Hugging Face modules and one GPU, phase by phase

python bench/memory/simulate.py regenerate [ARCHITECTURE ...]
    writes bench/memory/simulated.json anew for the installed libraries; do it after an upgrade, look at what
    changed (git diff), and run tests/test_simulate.py, which holds the formulas against it
"""
import argparse
import re
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import mean, median

import rows as R
from finetune_nb.core import read_json, write_json
from finetune_nb.hardware import versions
from finetune_nb.known import KNOWN
from finetune_nb.simulate import LOSSES, simulate
from finetune_nb.stack import Setup

HERE = Path(__file__).parent
TABLE = HERE / "simulated.json"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")  # whose code a simulated step runs
PHASES = ("forward", "backward", "step")

# ---- the table: small models of many architectures, 24 blocks deep

SMALL = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=2, vocab_size=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ARCHITECTURES = {  # model_type: values that differ
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": dict(head_dim=64), "gemma2": dict(head_dim=64), "gemma3_text": dict(head_dim=64), "phi3": {}, "gpt_neox": dict(num_key_value_heads=8),
    "falcon": dict(new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=2048, multi_query=False), "olmo2": {}, "granite": {}, "mixtral": dict(num_local_experts=4),
    "qwen3_moe": dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=256, head_dim=64), "smollm3": {}, "gpt2": dict(n_embd=512, n_layer=24, n_head=8), "starcoder2": {},
}
CASES = {
    "lora": {}, "lora, checkpointing": dict(checkpointing="nonreentrant"), "full": dict(method="full", autocast="none"), "full, checkpointing": dict(method="full", autocast="none", checkpointing="nonreentrant"),
    "qlora, checkpointing": dict(method="qlora", quantization="nf4", adapter_dtype="bfloat16", checkpointing="nonreentrant"), "lora, padded, checkpointing": dict(padded=True, checkpointing="nonreentrant"),
}


def config_of(kind): return SMALL | ARCHITECTURES[kind] | dict(model_type=kind)


def setup_of(kind, case):
    "The `Setup` of a case; gemma2 caps its scores, which only the eager attention does"
    return Setup(**dict(batch=2, length=512, loss="transformers-5", attention="eager" if kind == "gemma2" else "sdpa") | CASES[case])


def installed(): return {name: version.partition("+")[0] for name, version in versions().items() if name in LIBRARIES}


def entry(kind, case):
    "One entry of the table: bytes of each phase, and what a block keeps for the backward"
    s = simulate(config_of(kind), setup_of(kind, case))
    return {phase: s.phases[phase] for phase in PHASES} | dict(kept_by_a_block=s.kept)


def regenerate(kinds):
    table = read_json(TABLE) if TABLE.exists() and kinds else dict(steps={})
    table["versions"] = installed()
    for kind in kinds or ARCHITECTURES:
        table["steps"][kind] = {case: entry(kind, case) for case in CASES}
        print(kind, flush=True)
        write_json(TABLE, table)


# ---- published rows

def measured():
    "[{row, phase, measured, simulated, error}] for the rows that a simulation covers"
    found, done = [], {}
    for row in R.read(HERE / "measured.csv"):
        if R.stack_of(row) != "hf" or row["spec"] != "A" or R.left_out(row): continue
        name = R.model_of(row)
        config = R.EXTRA[name] if name in R.EXTRA else KNOWN[name].config | dict(model_type=KNOWN[name].model_type)
        setup = replace(R.setup_of(row, R.shapes_of(name)), quantized_experts=False)
        if setup.gpus > 1 or setup.loss not in LOSSES or setup.quantization == "gptq" or setup.kbit_prepared == "norms" or R.shapes_of(name).experts: continue
        key = name, setup
        if key not in done:
            done[key] = simulate(config, setup)
            print(name, setup.method, setup.batch, setup.length, setup.attention, flush=True)
        number, size = R.measured(row)
        sizes = {"peak": (size, done[key].allocated)} | {p: (float(row[f"{p}_mib"]) * 2**20, done[key].phases[p]) for p in PHASES if row[f"{p}_mib"]}
        for phase, (true, simulated) in sizes.items():
            found.append(dict(source=row["source"], gpu=row["gpu"], model=name, method=setup.method, attention=setup.attention, rows=setup.batch, length=setup.length, phase=phase, measured=round(true), simulated=simulated, error=simulated / true - 1))
    return found


def summary(results):
    "Mean, median and worst error for each GPU, kind of attention and phase"
    groups = {}
    for r in results: groups.setdefault((r["gpu"], "eager" if r["attention"] == "eager" else "sdpa or flash", r["phase"]), []).append(abs(r["error"]))
    return [dict(gpu=gpu, attention=attention, phase=phase, rows=len(e), mean=mean(e), median=median(e), worst=max(e)) for (gpu, attention, phase), e in sorted(groups.items())]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measured", "regenerate"])
    parser.add_argument("architectures", nargs="*", help="of the table; all if none is named")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / f"{date.today()}-simulate.json")
    args = parser.parse_args()
    if args.what == "regenerate": return regenerate(args.architectures)
    results = measured()
    for s in summary(results): print(f"{s['gpu']}, {s['attention']}, {s['phase']}: {s['rows']} rows, mean {s['mean']:.2%}, median {s['median']:.2%}, worst {s['worst']:.2%}")
    write_json(args.out, dict(question="How far is a simulated step from a measured one?", summary=summary(results), rows=results, versions=versions(), date=str(date.today())))


if __name__ == "__main__":
    main()
