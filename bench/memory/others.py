"""Other tools' numbers beside ours and the measured ones, on the published rows of Hugging Face modules on one GPU.

    pip install --no-deps --target FOLDER fitcheck-llm==0.3.1 llm-analysis==0.2.2 hf-mem==0.5.6 canifinetune==0.4.1 ftuneai==0.4.1 gpu-estimator==0.2.0 hf-vram-calc==1.0.9 ml-memguard==0.5.0
    pip install --target FOLDER fire loguru rich platformdirs
    python bench/memory/others.py FOLDER [--out bench/memory/others.json]

accelerate and DeepSpeed are the installed ones. Every tool gets the dimensions of the model and the settings that it
can express; what it cannot express is told, and its errors are counted apart ("fitting rows" against "all rows"). A
tool is held against the number it states: tensors ("allocated") or all that the process takes ("process"). No hub and
no network is used. fitcheck-llm was calibrated by its author on the T4 rows. Ours was checked against all of these rows
while it was made: what the loss of some older releases keeps was read off the A100 rows, the rest follows from code.
"""
import argparse
import contextlib
import io
import logging
import os
import sys
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median

import rows as R
from finetune_nb.cards import card
from finetune_nb.core import write_json
from finetune_nb.known import KNOWN
from finetune_nb.memory import plan
from finetune_nb.static import trained

MIB, GIB = 2**20, 2**30


class CannotExpress(Exception):
    "A tool gives no number, and why"


def _only_full(setup):
    if setup.method != "full": return "it has no adapters: the number is for training every weight"
    return ""


# ---- one function for each tool: (shapes, setup, GPU name) -> (bytes, what of the setting it cannot express)

def ours_allocated(s, u, gpu): return plan(s, u, card(gpu), exact=True).allocated.expected, ""
def ours_process(s, u, gpu): return plan(s, u, card(gpu), exact=True).process.expected, ""


def _config(s):
    if s.name in R.EXTRA: return R.EXTRA[s.name]
    return KNOWN[s.name].config | dict(model_type=KNOWN[s.name].model_type)


def _fitcheck(s, u, gpu):
    from fitcheck import config_parser as parser
    from fitcheck.estimator import TrainingConfig, estimate
    from fitcheck.gpu_db import get_gpu
    if u.quantization == "gptq": raise CannotExpress("no GPTQ")
    try:
        parser._reject_unsupported(_config(s), s.name)
        fields = parser._parse_fields(_config(s))
        count = parser._reconcile_param_count(s.name, s.total, parser._count_params(fields))
    except (KeyError, ValueError) as e: raise CannotExpress(f"it refuses {s.model_type}: {str(e)[:80]}") from None
    model = parser.ModelConfig(s.name, count, s.hidden, s.layers, s.heads, s.kv_heads, s.intermediate, s.vocab, s.head_dim, s.tied)
    precision = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[u.base_dtype]
    training = TrainingConfig(precision=precision, quantization=u.quantization, double_quant=u.double_quantization and u.quantization == "nf4", optimizer="adamw", optimizer_dtype="bf16" if u.method == "full" and u.base_dtype == "bfloat16" else "fp32",
        batch_size=u.batch, seq_len=u.length, lora_rank=None if u.method == "full" else u.rank, lora_targets=["q_proj", "k_proj", "v_proj", "o_proj"], grad_checkpoint=u.checkpointing != "none", flash_attn=u.attention != "eager")
    return estimate(model, training, get_gpu("t4" if gpu == "T4" else "a100-80"))


def fitcheck_allocated(s, u, gpu):
    r = _fitcheck(s, u, gpu)
    return (r.total_mib - r.overhead_mib) * MIB, _fitcheck_lacks(u)


def fitcheck_process(s, u, gpu): return _fitcheck(s, u, gpu).total_mib * MIB, _fitcheck_lacks(u)


def _fitcheck_lacks(u):
    if u.method == "full" and u.base_dtype != "float32": return "it has no 16-bit training without 32-bit copies of the weights"
    return "it has no 4-bit base whose other weights stay in 16 bit" if u.method == "qlora" and u.kbit_prepared != "all" else ""


def llm_analysis(s, u, gpu):
    from llm_analysis.analysis import ActivationRecomputation, LLMAnalysis
    from llm_analysis.config import DtypeConfig, GPUConfig, ModelConfig
    model = ModelConfig(s.name, s.layers, s.heads, s.hidden, s.vocab, max(s.max_length, u.length), s.kv_heads, ffn_embed_dim=s.intermediate or s.expert_width, expansion_ratio=4, model_type=s.model_type, moe_num_experts=s.experts or 1, moe_top_k=s.experts_used or 1)
    analysis = LLMAnalysis(model, GPUConfig(gpu, 10**6, 2000, 300, 1e-5, 312), DtypeConfig(), flops_efficiency=0.5, hbm_memory_efficiency=0.6)
    pure = u.method == "full" and u.base_dtype == "bfloat16" and u.autocast == "none"  # states of 2 bytes and no 32-bit copy; the gradient's 2 bytes are the "master" weight's here
    found = analysis.training(batch_size_per_gpu=u.batch, gradient_accumulation_steps=1, seq_len=u.length, activation_recomputation=ActivationRecomputation.FULL if u.checkpointing != "none" else ActivationRecomputation.NONE, flash_attn=u.attention != "eager",
        mlp_gated_linear_units=s.model_type in ("llama", "mistral", "qwen2", "granite", "mixtral"), **(dict(master_weights_dtype_bytes=2, other_op_bytes=2) if pure else {}))
    return sum(found[k] for k in ("weight_memory_per_gpu", "optimizer_state_memory_per_gpu", "gradient_memory_per_gpu", "activation_memory_per_gpu")), _only_full(u)


def accelerate(s, u, gpu):
    from accelerate.commands.estimate import estimate_training_usage
    return max(estimate_training_usage(4 * s.total, "float32" if u.base_dtype == "float32" else "float16").values()), _only_full(u) or "neither batch nor length"


def deepspeed_zero2(s, u, gpu):
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
    return estimate_zero2_model_states_mem_needs(s.total, 1, 1, False, 1.5)[1], _only_full(u) or "neither batch nor length; DeepSpeed's own mixed precision"


def deepspeed_zero3(s, u, gpu):
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    largest = max(w.numel // w.count for w in s.weights)
    return estimate_zero3_model_states_mem_needs(s.total, largest, 1, 1, False, False, False, 1.5)[1], _only_full(u) or "neither batch nor length; DeepSpeed's own mixed precision"


def canifinetune(s, u, gpu):
    from canifinetune.estimator import EstimateRequest, estimate
    if u.quantization == "gptq": raise CannotExpress("no GPTQ")
    quantization = {"nf4": "nf4_double_quant" if u.double_quantization else "nf4"}.get(u.quantization, u.quantization)
    family = {"mistral": "mistral", "qwen2": "qwen2", "llama": "llama", "mixtral": "mixtral", "granite": "llama"}.get(s.model_type)  # granite has llama's layers
    if not family: raise CannotExpress(f"no adapters known for {s.model_type}")
    spec = dict(family=family, hidden_size=s.hidden, num_hidden_layers=s.layers, num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, intermediate_size=s.intermediate or s.expert_width, vocab_size=s.vocab, tie_word_embeddings=s.tied,
        total_params=s.total, num_local_experts=s.experts or 1, num_experts_per_tok=s.experts_used or 1)
    asked = EstimateRequest(model_id=s.name, method=u.method, seq_len=u.length, micro_batch_size=u.batch, base_dtype={"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[u.base_dtype], quantization=quantization if u.method == "qlora" else "none",
        lora_rank=u.rank, lora_target_scope="attention", optimizer=u.optimizer, gradient_checkpointing=u.checkpointing != "none", attention_implementation={"efficient": "sdpa", "flash": "flash_attention_2"}.get(u.attention, u.attention),
        gpu_vram_gb=15 if gpu == "T4" else 80, override=spec, use_network=False)
    m = estimate(asked).memory
    return (m.total_estimated_gb - m.safety_margin_gb) * GIB, ""


def ftuneai(s, u, gpu):
    from ftuneai.core.memory import MemoryEstimator
    from ftuneai.core.models import FineTuneMethod, LoRATarget, ModelSpec, OptimizerType, Quantization, TrainingConfig
    spec = ModelSpec(s.name, s.total, s.hidden, s.layers, s.heads, s.kv_heads, s.intermediate or s.expert_width, s.vocab, max(s.max_length, u.length), is_moe=bool(s.experts), num_experts=s.experts or None, num_active_experts=s.experts_used or None)
    config = TrainingConfig(s.name, FineTuneMethod(u.method), Quantization("none" if u.quantization == "none" else "8bit" if u.quantization == "int8" else "4bit"), u.batch, u.length, u.checkpointing != "none", OptimizerType.ADAMW, u.rank, 2 * u.rank, LoRATarget.ATTENTION_ALL, u.attention != "eager")
    return MemoryEstimator(spec, config).estimate().total_gb * GIB, ""


def ml_memguard(s, u, gpu):
    from memory_guard.estimator import FinetuneMethod, ModelArch, ModelSpec, TrainSpec, estimate_training_memory
    model = ModelSpec(s.total, s.hidden, s.heads, s.kv_heads, s.layers, s.intermediate or s.expert_width, bits=16 if u.quantization == "none" else 8 if u.quantization == "int8" else 4, arch=ModelArch.MOE if s.experts else ModelArch.DENSE, num_experts=s.experts or 1, num_active_experts=s.experts_used or 1)
    train = TrainSpec(FinetuneMethod[u.method.upper()], u.batch, u.length, u.rank, s.layers, 4, "adamw", u.checkpointing != "none", qlora_double_quant=u.double_quantization, flash_attention=u.attention != "eager")
    return estimate_training_memory(model, train).total_mb * MIB, ""


def gpu_estimator(s, u, gpu):
    from gpu_estimator.estimator import GPUEstimator
    r = GPUEstimator().estimate(s.total, u.batch, u.length, {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[u.base_dtype], "adamw", gpu_memory_gb=80, gradient_checkpointing=u.checkpointing != "none")
    return r.total_memory_gb * GIB, _only_full(u)


def hf_vram_calc(s, u, gpu):
    from hf_vram_calc.calculator import VRAMCalculator
    from hf_vram_calc.config import ConfigManager
    calc = VRAMCalculator(ConfigManager())
    weights = calc.calculate_model_memory(s.total, {"none": "bf16", "int8": "int8"}.get(u.quantization, "int4"))
    return (calc.calculate_training_memory(weights) if u.method == "full" else calc.calculate_lora_memory(weights, s.total, u.rank)) * GIB, "neither batch nor length"


def hf_mem(s, u, gpu): raise CannotExpress("serving only (weights and KV cache), and it reads the weights' headers from the hub")
def training_hub(s, u, gpu): raise CannotExpress("it opens the model's weights, which are not here (training-hub 0.11.2, BasicEstimator._load_model)")


TOOLS = {  # name: (package, number it states, function, what it leaves out)
    "finetune_nb, tensors": ("finetune_nb", "allocated", ours_allocated, "see the page of the memory plan"),
    "finetune_nb, process": ("finetune_nb", "process", ours_process, "see the page of the memory plan"),
    "fitcheck-llm, tensors": ("fitcheck-llm", "allocated", fitcheck_allocated, "several GPUs, mixtures of experts, autocast, losses other than transformers 5's; calibrated on the T4 rows"),
    "fitcheck-llm, process": ("fitcheck-llm", "process", fitcheck_process, "as above"),
    "canifinetune": ("canifinetune", "process", canifinetune, "autocast, loss paths, what peaks together and what does not (everything is added); its safety margin is not counted here"),
    "ftuneai": ("ftuneai", "process", ftuneai, "logits, autocast, quantization constants"),
    "ml-memguard": ("ml-memguard", "process", ml_memguard, "logits, vocabulary, tied weights, which layers stay unquantized"),
    "hf-vram-calc": ("hf-vram-calc", "process", hf_vram_calc, "batch, length, checkpointing, attention, optimizer"),
    "gpu-estimator": ("gpu-estimator", "process", gpu_estimator, "adapters, quantization, everything about the model but its size"),
    "llm-analysis": ("llm-analysis", "allocated", llm_analysis, "adapters; logits beyond the output embedding"),
    "accelerate estimate-memory": ("accelerate", "allocated", accelerate, "activations, logits, adapters, quantized training, batch, length"),
    "DeepSpeed ZeRO-2 estimator": ("deepspeed", "allocated", deepspeed_zero2, "activations, logits, adapters, quantization, batch, length"),
    "DeepSpeed ZeRO-3 estimator": ("deepspeed", "allocated", deepspeed_zero3, "activations, logits, adapters, quantization, batch, length"),
    "hf-mem": ("hf-mem", "process", hf_mem, "training"),
    "training-hub": ("training-hub", "process", training_hub, "checkpointing, attention, which layers have adapters"),
}


def ask(tool, shapes, setup, gpu):
    "{bytes, lacks} or {none: why}: what a tool says; its own printing is not shown"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()): size, lacks = TOOLS[tool][2](shapes, setup, gpu)
        return dict(bytes=round(size), lacks=lacks)
    except CannotExpress as e: return dict(none=str(e))
    except ImportError as e: return dict(none=f"is not installed: {e}")
    except Exception as e: return dict(none=f"{type(e).__name__}: {' '.join(str(e).split())[:200]}")


def row_numbers(row):
    "{number: bytes} of one GPU that a row measured"
    found = dict([R.measured(row)])
    if row["process_gib"]: found["process"] = float(row["process_gib"]) * GIB
    if row["smi_mib"]: found["process"] = float(row["smi_mib"]) * MIB
    return found


def compare():
    "One entry for each row: settings, measured numbers, and what every tool says"
    out = []
    for row in R.read(R.HERE / "measured.csv"):
        if R.stack_of(row) != "hf" or row["spec"] != "A" or R.left_out(row): continue
        shapes = R.shapes_of(R.model_of(row))
        setup = R.setup_of(row, shapes)
        if setup.gpus > 1: continue
        gpu = "T4" if "T4" in row["gpu"] else "A100 80GB"
        out.append(dict(source=row["source"], model=shapes.name, gpu=gpu, method=setup.method, quantization=setup.quantization, rows=setup.batch, length=setup.length, attention=setup.attention,
            measured={k: round(v) for k, v in row_numbers(row).items()}, tools={tool: ask(tool, shapes, setup, gpu) for tool in TOOLS}))
        print(shapes.name, setup.method, setup.batch, setup.length, file=sys.stderr)
    return out


def _errors(results, tool, fitting, gpu=""):
    number, errors = TOOLS[tool][1], []
    for r in results:
        said = r["tools"][tool]
        if "bytes" not in said or number not in r["measured"] or gpu and r["gpu"] != gpu: continue
        if not (fitting and said["lacks"].startswith("it has no ")): errors.append(said["bytes"] / r["measured"][number] - 1)
    return errors


def _stats(errors): return dict(rows=len(errors)) | (dict(median=median(map(abs, errors)), worst=max(errors, key=abs), within_10_percent=sum(abs(e) <= 0.1 for e in errors) / len(errors)) if errors else {})


def _version(package):
    try: return version(package)
    except Exception: return ""


def summary(results):
    "For each tool: its errors on the rows whose method it can express and on all rows, what it leaves out, why it gave no number"
    return [dict(tool=tool, version=_version(package), number=number, leaves_out=lacks, fitting_rows=_stats(_errors(results, tool, True)), by_gpu={gpu: _stats(_errors(results, tool, True, gpu)) for gpu in ("T4", "A100 80GB")}, all_rows=_stats(_errors(results, tool, False)),
                 gives_none=Counter(r["tools"][tool]["none"] for r in results if "none" in r["tools"][tool])) for tool, (package, number, _, lacks) in TOOLS.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the other tools are installed")
    parser.add_argument("--out", type=Path, default=R.HERE / "others.json")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.append(str(args.folder))
    logging.disable(logging.WARNING)
    results = compare()
    told = summary(results)
    for t in told:
        f, a = t["fitting_rows"], t["all_rows"]
        show = lambda s: f"{s['rows']} rows, median {s['median']:.1%}, worst {s['worst']:+.1%}" if s["rows"] else "no row"
        print(f"{t['tool']} {t['version']} ({t['number']}): {show(f)}; all: {show(a)}; {'; '.join(f'{g}: {show(e)}' for g, e in t['by_gpu'].items())}; none: {dict(t['gives_none'])}")
    write_json(args.out, dict(question="What do other tools say of the same runs?", date=str(date.today()), summary=told, rows=results))


if __name__ == "__main__":
    main()
