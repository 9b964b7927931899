"""Published measurements as rows, and what a `Setup` makes of them.

`python bench/memory/rows.py RAW.csv OUT.csv` cleans a raw table: it keeps source, settings and figures, takes the
numbers out of its notes, and drops the rest.
"""
import csv
import json
import re
import sys
from functools import lru_cache
from pathlib import Path

from finetune_nb.known import KNOWN, known
from finetune_nb.shapes import from_json, to_json
from finetune_nb.stack import Setup

HERE = Path(__file__).parent
SETTINGS = ["model", "params_b", "method", "rank", "targets", "dtype", "micro_batch", "seq_len", "grad_ckpt", "optimizer", "attention", "gpus", "sharding", "gpu", "measured_gb", "unit", "source"]
TAKEN = ["spec", "config", "kernels", "transformers", "dropout", "accumulation", "rest_gb", "reserved_gib", "process_gib", "smi_mib", "forward_mib", "backward_mib", "step_mib", "loss"]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def take(notes):
    "The numbers and words that a row's notes hold"
    def find(pattern, default=""): return m[1] if (m := re.search(pattern, notes)) and m[1] != "None" else default
    return dict(spec=find(r"SPEC=(\w)"), config=find(r"config=([^;]+)"), kernels="hf" if "kernels: HF" in notes else "fused" if "kernels: fused" in notes else "",
                transformers=find(r"transformers (\d[\d.]*)").rstrip("."), dropout=find(r"lora_dropout=([\d.]+)").rstrip("."), accumulation=find(r"grad_accum=(\d+)") or find(r"grad-accum (\d+)"), rest_gb=find(r"after-train alloc=([\d.]+)"),
                reserved_gib=find(r"max_reserved=([\d.]+)"), process_gib=find(r"process\(nvml\)=([\d.]+)"), smi_mib=find(r"nvidia-smi used=([\d.]+)"),
                **dict(zip(("forward_mib", "backward_mib", "step_mib"), [("" if v == "None" else v) for v in (re.findall(r"peaks MiB=([\d.]+|None)/([\d.]+|None)/([\d.]+|None)", notes) or [("", "", "")])[0]])),
                loss=" ".join(w for w in ("CutCrossEntropy", "Liger", "no Liger", "chunked CE", "+packed", "+compile", "baseline (variable", "optimizer-in-bwd") if w in notes))


def read(path):
    "Rows of a cleaned or a raw table"
    rows = list(csv.DictReader(open(path, newline="")))
    return [dict.fromkeys(TAKEN, "") | r if "spec" in r else dict.fromkeys(SETTINGS + TAKEN, "") | {k: r.get(k, "") for k in SETTINGS} | dict(smi_mib=r.get("nvidia_smi_mib", "")) | {k: v for k, v in take(r["notes"]).items() if v or k != "smi_mib"} for r in rows]


# ---- models: names in the rows -> shapes

LLAMA = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size tie_word_embeddings"
def _like(kind, *values, **more): return dict(model_type=kind, **dict(zip(LLAMA.split(), values)), **more)

EXTRA = {  # dimensions as their authors published them; code of their own is described by the nearest class of transformers
    "powerlm-3b": _like("granite", 2304, 9216, 40, 36, 36, 49152, True), "santacoder": dict(model_type="gpt_bigcode", n_embd=2048, n_layer=24, n_head=16, n_inner=8192, vocab_size=49280, n_positions=2048, multi_query=True),
    "qwen-1.8b": _like("qwen2", 2048, 5504, 24, 16, 16, 151936, False), "qwen-7b": _like("qwen2", 4096, 11008, 32, 32, 32, 151936, False), "qwen-14b": _like("qwen2", 5120, 13696, 40, 40, 40, 152064, False),
    "qwen-72b": _like("qwen2", 8192, 24576, 80, 64, 64, 152064, False), "chatglm3-6b": _like("glm", 4096, 13696, 28, 32, 2, 65024, False, head_dim=128, pad_token_id=0), "baichuan2-7b": _like("llama", 4096, 11008, 32, 32, 32, 125696, False),
    "baichuan2-13b": _like("llama", 5120, 13696, 40, 40, 40, 125696, False), "phi-1.5": _like("phi", 2048, 8192, 24, 32, 32, 51200, False), "fsdp_qlora-1b": _like("llama", 2048, 4096, 24, 16, 16, 32000, False),
    "stablelm-alpha-3b": dict(model_type="gpt_neox", hidden_size=4096, intermediate_size=16384, num_hidden_layers=16, num_attention_heads=32, vocab_size=50688, tie_word_embeddings=False), "mimo-7b": _like("qwen2", 4096, 11008, 36, 32, 8, 151680, False),
}
NAMES = [  # (pattern in a row's model, name in known or EXTRA)
    (r"Mistral-7B|mistral-7b|zephyr-7b", "mistral-7b-v0.1"), (r"Mixtral-8x7B", "mixtral-8x7b"), (r"Llama-3\.1-405B|Llama 3\.1 405B", "llama-3.1-405b"), (r"[Ll]lama[- ]3(\.1)?[- ](70[Bb])", "llama-3-70b"), (r"[Ll]lama[- ]3\.2[- ]3[Bb]", "llama-3.2-3b"),
    (r"[Ll]lama[- ]3\.2[- ]1[Bb]", "llama-3.2-1b"), (r"[Ll]lama[- ]3(\.1)?[- ]8[Bb]", "llama-3-8b"), (r"Llama-?2-70[Bb]|Llama-2-70b", "llama-2-70b"), (r"[Ll]lama-?[ -]?2[- ]7[Bb]|Llama-7B|Llama2-7B", "llama-2-7b"), (r"TinyLlama|tiny-llama", "tinyllama-1.1b"),
    (r"SmolLM2-1\.7B", "smollm2-1.7b"), (r"SmolLM2-360M", "smollm2-360m"), (r"SmolLM2-135M", "smollm2-135m"), (r"Qwen2\.5-0\.5B", "qwen2.5-0.5b"), (r"Qwen2\.5-1\.5B", "qwen2.5-1.5b"), (r"Qwen2\.5-3B", "qwen2.5-3b"), (r"Qwen2\.5-7B", "qwen2.5-7b"),
    (r"PowerLM", "powerlm-3b"), (r"santacoder", "santacoder"), (r"(?i)qwen-1[._]8b", "qwen-1.8b"), (r"(?i)qwen-7b", "qwen-7b"), (r"(?i)qwen-14b", "qwen-14b"), (r"(?i)qwen-72b", "qwen-72b"), (r"Qwen3-0\.6B", "qwen3-0.6b"), (r"Qwen3-8B", "qwen3-8b"),
    (r"Qwen3-32B", "qwen3-32b"), (r"Qwen3-30B-A3B", "qwen3-30b-a3b"), (r"Qwen3\.5-27B", "qwen3.5-27b"), (r"chatglm3", "chatglm3-6b"), (r"baichuan2-7b", "baichuan2-7b"), (r"baichuan2-13b", "baichuan2-13b"), (r"(?i)yi-6b", "yi-6b"), (r"(?i)yi-34b", "yi-34b"),
    (r"phi-1\.5", "phi-1.5"), (r"phi-2", "phi-2"), (r"phi-3", "phi-3-mini"), (r"(?i)stablelm.*alpha", "stablelm-alpha-3b"), (r"falcon-7b", "falcon-7b"), (r"gemma-2b", "gemma-2b"), (r"gemma-7b", "gemma-7b"), (r"gemma2-2b", "gemma-2-2b"), (r"gemma2-9b", "gemma-2-9b"),
    (r"gemma-4-31B", "gemma-4-31b"), (r"random-init", "fsdp_qlora-1b"), (r"Magistral-Small", "mistral-small-24b"), (r"Ministral-3-3B", "ministral-3-3b"), (r"Ministral-8B", "ministral-8b"), (r"gpt-oss-20b", "gpt-oss-20b"), (r"Apertus-8B", "apertus-8b"),
    (r"Seed-OSS-36B", "seed-oss-36b"), (r"MiMo-7B", "mimo-7b"), (r"granite-4\.0-tiny", "granite-4.0-h-tiny"), (r"glm-4-9b", "glm-4-9b"), (r"bloomz-7b1", "bloom-7b1"),
]


@lru_cache(maxsize=None)
def shapes_of(name):
    "Shapes of a model in the tables"
    return known(name) if name in KNOWN else from_json(json.loads((HERE / "models.json").read_text())[name])


def model_of(row):
    "Name of the row's model, or an empty text"
    if row["model"].strip() == "Llama 2": return "llama-2-13b" if row["params_b"].startswith("13") else "llama-2-7b"
    return next((name for pattern, name in NAMES if re.search(pattern, row["model"])), "")


# ---- settings: a row -> Setup

def _targets(row, shapes):
    text = row["targets"].replace("_proj", "").replace(" ", "")
    if not text or re.search(r"alllinear|all-linear|ALLlinear|regex|gate", text): return ()
    own = {w.module.rpartition(".")[2] for w in shapes.weights if w.inside and w.linear}
    if "c_proj,w1,w2" in text: return ()
    if re.search(r"DEFAULT|configdefault|output_proj|mlp,head", text):  # ms-swift: the model's attention inputs; torchtune: q, v, output and MLP; litgpt's small models: everything
        if "c_attn" in text or "model-specific" in text: return tuple(n for n in ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value") if n in own)
        return ()
    words = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "query": "q_proj", "key": "k_proj", "value": "v_proj", "projection": "o_proj"}
    return tuple(n for n in dict.fromkeys(words.get(w, w) for w in text.split(",")) if n in own) or tuple(n for n in ("query_key_value", "qkv_proj", "c_attn") if n in own)


def _length(row):
    numbers = [int(n) for n in re.findall(r"\d+", row["seq_len"].replace("alpaca2k", "").replace("Alpaca2k", ""))]
    if row["seq_len"].startswith(("variable", "Alpaca variable", "config default")): return next((n for n in numbers if n >= 4096), 512)
    return numbers[0] if numbers else 0


def _quantization(row):
    text = f"{row['method']} {row['dtype']}".lower()
    if "gptq" in text: return "gptq" if "8" not in row["method"] else "int8"
    if "int8" in text or "8-bit" in text: return "int8"
    return "nf4" if "qlora" in text or "nf4" in text else "none"


def _optimizer(row):
    text = row["optimizer"].lower()
    if "in-bwd" in text or "optimizer-in-bwd" in row["loss"]: return "in_backward_8bit" if "paged" in text else "in_backward"
    if "8bit" in text and "paged" in text: return "paged_adamw_8bit"
    if "8bit" in text: return "adamw_8bit"
    if "4bit" in text: return "adamw_torch_4bit"
    if "paged" in text: return "paged_adamw_32bit"
    if "none" in text: return "none"
    return "adamw_torch_fused" if "fused" in text else "adamw_torch"


def _sharding(row):
    text, n = row["sharding"].lower(), int(row["gpus"]) if row["gpus"].isdigit() else 1
    if n == 1: return dict(gpus=1, sharding="zero2") if "zero-2" in text or "deepspeed" in text else dict(gpus=1)
    kind = "zero3" if "zero-3" in text else "zero2" if "zero-2" in text or "deepspeed" in text else "fsdp2" if "fsdp2" in text else "fsdp1" if "fsdp" in text else "ddp"
    return dict(gpus=n, sharding=kind) | ({"offload": "all"} if "offload" in text and kind != "ddp" else {})


def stack_of(row):
    "Which code ran: hf (Hugging Face modules), fused, or the project's own"
    if "fms-acceleration" in row["source"]: return "hf" if row["kernels"] == "hf" else "fused"
    return "hf" if "fitcheck" in row["source"] else next((n for n in ("litgpt", "torchtune", "ms-swift", "axolotl", "fsdp_qlora", "LLaMA-Factory", "QwenLM", "torchtitan", "peft", "trl", "ao", "philschmid") if n in row["source"]), "other")


def setup_of(row, shapes):
    "The `Setup` of a row"
    q, full = _quantization(row), row["method"].lower().startswith("full")
    common = dict(method="full" if full else "lora" if q == "none" else "qlora", quantization="none" if full else q, target_modules=() if full else _targets(row, shapes), rank=int(float(row["rank"])) if re.fullmatch(r"[\d.]+", row["rank"]) else 16,
                  batch=int(row["micro_batch"]) if row["micro_batch"].isdigit() else 2, length=_length(row) or 512, optimizer=_optimizer(row), eval_batch=1, **_sharding(row))
    if "fms-acceleration" in row["source"]: return _fms(row, common)
    if "fitcheck" in row["source"]: return _fitcheck(row, common)
    return _others(row, common, stack_of(row))


def _fms(row, common):
    d, c, big, several = row["dtype"], row["config"], "gpt_bigcode" in row["model"], common["gpus"] > 1
    late = tuple(map(int, (row["transformers"] or "4.48.1").split(".")[:2])) >= (4, 46)
    loss = "gpt_bigcode-4.48" if big else "transformers-4.48" if late else "transformers-4.45"
    if "foak" in c: loss = "liger" if "liger" in c else "foak-held" if big and common["method"] != "full" else "foak-4.48" if late and common["method"] != "full" else "foak"
    half = "float16" if d.startswith("float16") else "bfloat16"
    upcast = common["method"] == "full" and "bf16=True" in d and several
    return Setup(**common | dict(base_dtype="float32" if upcast else half, autocast="bfloat16" if "bf16 autocast" in d or upcast else "float16" if "fp16 autocast" in d else "none", dropout=float(row["dropout"] or 0), double_quantization=True,
                 kbit_prepared="norms" if "baseline" in c else "", checkpointing="reentrant", attention="flash", loss=loss, kernels="fused" if "foak" in c else "hf", quantized_experts=common["method"] == "qlora", group=0 if re.search(r"Mixtral|70B", row["model"]) else 128,
                 target_modules=() if common["method"] == "full" else (*ATTENTION, "c_attn"), accumulation=1))


def _fitcheck(row, common):
    q = common["method"] == "qlora"
    return Setup(**common | dict(double_quantization=False, target_modules=ATTENTION, base_dtype="float16", autocast="none", kbit_prepared="all" if q else "", checkpointing="nonreentrant", attention="eager" if row["attention"] == "eager" else "efficient", loss="transformers-5-held"))


def _others(row, common, stack):
    ck = "none" if row["grad_ckpt"].startswith(("no", "selective")) else "nonreentrant"
    loss = {"litgpt": "litgpt", "torchtune": "chunked", "ao": "chunked", "torchtitan": "transformers-5", "trl": "trl-1.16"}.get(stack, "transformers-4.45")
    if "CutCrossEntropy" in row["loss"]: loss = "cce"
    elif "Liger" in row["loss"] and "no Liger" not in row["loss"]: loss = "liger"
    if "Unsloth" in row["attention"]: loss, common["activation_offload"] = "foak", True
    if stack == "torchtune": loss = "transformers-4.45" if "2024-05" in row["source"] or "README" in row["source"] and ("+packed" in row["loss"] or "+compile" in row["loss"]) else "cce"
    if "activation offload" in row["grad_ckpt"]: common["activation_offload"] = True
    if "wte,lm_head" in row["targets"]: common["saved_modules"] = ("embed_tokens", "lm_head")
    if "Unsloth" in row["attention"] or stack == "axolotl" and loss == "liger": common["kernels"] = "fused"
    pure = stack in ("litgpt", "torchtune", "ao", "fsdp_qlora") or "pure" in row["dtype"]
    autocast = "none" if pure or "no autocast" in row["dtype"] else "bfloat16"
    base = "float32" if common["method"] == "full" and stack in ("torchtitan",) or "bf16-mixed" in row["dtype"] else "bfloat16"
    return Setup(**dict(kernels="other") | common | dict(base_dtype=base, autocast=autocast, adapter_dtype="bfloat16" if pure and stack != "peft" else "float32", checkpointing=ck, loss=loss, attention="eager" if row["attention"] == "eager" else "efficient" if "padded" in row["attention"] else "flash", padded="padded" in row["attention"],
                 double_quantization="no dq" not in row["dtype"] and "nf4" in row["dtype"].lower() and "-dq" in row["dtype"] or stack not in ("litgpt",), quantized_experts=stack == "axolotl", dropout=float(row["dropout"] or 0)) | dict(kernels="other"))


def left_out(row):
    "Why a row cannot be held against a plan, or an empty text"
    text = " ".join(row[k] for k in ("seq_len", "method", "grad_ckpt", "attention", "micro_batch", "rank", "gpus"))
    for pattern, why in (("context parallel|ring", "context parallelism is not planned"), ("selective", "selective checkpointing is not planned"), ("Adapter|DoRA", "neither LoRA nor full fine-tuning"), ("see config|see notes|see script|config default", "a setting is not stated")):
        if re.search(pattern, text): return why
    if row["spec"] == "C": return "settings are not stated"
    if re.search("variable \\(|Alpaca variable|short", row["seq_len"]) and "mean 3234" not in row["seq_len"] or "baseline (variable" in row["loss"] or not row["seq_len"]: return "the longest row's length is not stated"
    if "repeats 1-GPU" in row["sharding"]: return "the source repeats the figure of one GPU"
    return "" if model_of(row) else "the model's dimensions are not at hand"


def measured(row):
    "(which of the three numbers it is, bytes on one GPU)"
    unit, value = row["unit"], float(row["measured_gb"])
    size = value * (2**30 if "GiB" in unit else 1e9)
    if "sum over GPUs" in unit: size /= int(row["gpus"])
    if "allocated" in unit or "active" in unit: return "allocated", size
    return ("reserved", size) if "reserved" in unit or "peak" in unit else ("process", size)


if __name__ == "__main__":
    raw, out = sys.argv[1:3]
    if out.endswith(".json"):
        from finetune_nb.tree import read as build
        Path(out).write_text(json.dumps({n: to_json(build(c, n)) for n, c in EXTRA.items()}, separators=(",", ":")) + "\n")
    else:
        rows = read(raw)
        columns = [c for c in SETTINGS + TAKEN if any(r.get(c) for r in rows)] + [c for c in ("spec",) if not any(r.get("spec") for r in rows)]
        with open(out, "w", newline="") as f:
            w = csv.DictWriter(f, columns, extrasaction="ignore", lineterminator="\n")
            w.writeheader(), w.writerows(rows)
