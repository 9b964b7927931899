"""Every causal language model that transformers knows, proven with the targets found for it: a tiny instance gets adapters, is
trained, saved, reloaded and merged.  python bench/architectures.py [TYPE…] [--out bench/results/DATE-architectures.json]"""
import argparse
import copy
import json
import os
import tempfile
import time
import warnings
from datetime import date
from importlib.metadata import version
from multiprocessing import Pool
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune_nb.recipe import make
from finetune_nb.targets import lora_parameters, targets
from finetune_nb.translate import lora_kwargs
from finetune_nb.tree import of

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# a tiny model's sizes, wherever its configuration has a number of that name
SIZES = {64: "hidden_size d_model n_embd dim dim_model emb_dim embedding_dim embedding_size attention_hidden_size word_embed_proj_dim lru_width input_embedding_size output_embedding_size hidden_size_global max_position_embeddings n_positions max_seq_len context_length max_source_positions max_target_positions n_ctx pronunciation_embed_dim shape_embed_dim backbone_hidden_size out_hidden_size position_bias_max_distance num_position_embeddings",
         96: "intermediate_size n_inner decoder_ffn_dim encoder_ffn_dim d_inner d_ff dim_ff dff ffn_dim ffn_hidden_size dense_intermediate_size intermediate_size_mlp shared_intermediate_size mlp_dim",
         32: "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size image_size",
         16: "head_dim swa_head_dim global_head_dim dim_head d_head kv_channels attention_head_dim kv_lora_rank q_lora_rank o_lora_rank qk_nope_head_dim v_head_dim index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim indexer_head_dim mamba_d_head mamba_head_dim hidden_size_per_layer_input laurel_rank router_hidden_size adapter_rank local_attention index_block_size patch_size block_size d_rel rel_extent rotary_dim ple_embed_dim hc_lowrank",
         24: "qk_head_dim", 8: "qk_rope_head_dim mamba_d_state ssm_state_size state_size mamba_dt_rank time_step_rank mamba_n_heads mamba_num_heads sliding_window sliding_window_size attention_window_size chunk_size mamba_chunk_size index_topk attention_chunk_size gated_norm_rank window_size o_groups_unused",
         4: "num_attention_heads decoder_attention_heads encoder_attention_heads attention_heads n_head n_heads num_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads linear_num_value_heads linear_num_heads num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num index_topk_blocks mm_tokens_per_image segment_types prompt_types prompt_length",
         2: "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads index_n_heads num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts decoder_layers encoder_layers num_decoder_layers num_encoder_layers depth n_groups n_mamba_heads o_groups num_layers_per_stack heads_per_ngram num_blocks n_layers_per_attn_res_block mamba_n_groups",
         1: "n_group topk_group num_expert_group first_k_dense_replace", 128: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size"}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()} | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
DEPTH = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "attention_layers")
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "block_types", "no_rope_layers")  # lists with one entry a block
INDEXER = dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=256, indexer_budget=16, indexer_compress_ratio=4)
ZAMBA = dict(attention_hidden_size=128, attention_head_dim=32, num_hidden_layers=5, layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"])
# what the rule does not get right, so that `then` comes after it, and what the configuration lacks by default, so that `first` comes before
BY_HAND = {
    "blt": dict(then=dict(encoder_hash_byte_group_vocab=50, patching_threshold=100.0, max_patch_length=4)),
    "cohere_compass_text": dict(first=dict(rope_parameters={k: {"rope_type": "default", "rope_theta": 1e4} for k in ("full_attention", "sliding_attention")}, layer_types=["full_attention", "sliding_attention"] * 20)),
    "dbrx": dict(then=dict(attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0), ffn_config=dict(hidden_size=64, ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2))),
    "deepseek_v4": dict(then=dict(compress_rates=dict(compressed_sparse_attention=4, heavily_compressed_attention=8))),
    "deepseek_v2": dict(first=dict(num_experts_per_tok=2)),
    "dots1": dict(first=dict(n_shared_experts=1, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1)),
    "dots3_note": dict(then=dict(text_config=dict(head_dim=24), vision_config=dict(adapter_in_dim=64, adapter_out_dim=64), audio_config=dict(adapter_input_size=64, adapter_out_dim=64))),
    "dots3_note_text": dict(then=dict(head_dim=24)),
    "falcon_h1": dict(then=dict(mamba_d_ssm=128)),
    "flint": dict(then=dict(mlp_only_layers=[0])),
    "gemma3n_text": dict(then=dict(num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "full_attention"], intermediate_size=[96] * 3, num_kv_shared_layers=1, activation_sparsity_pattern=[0.95, 0.0, 0.0])),
    "hunyuan_v1_dense": dict(first=dict(head_dim=16)),
    "hunyuan_v1_moe": dict(first=dict(head_dim=16, moe_topk=2, num_experts=4)),
    "jamba": dict(then=dict(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1)),
    "lfm2_moe": dict(first=dict(layer_types=["conv", "full_attention"] * 16), then=dict(num_dense_layers=1)),
    "mamba2": dict(then=dict(num_heads=8)),
    "ministral": dict(first=dict(head_dim=16)),
    "mllama": dict(then=dict(text_config=dict(num_hidden_layers=3, cross_attention_layers=[1]))),
    "nemotron": dict(first=dict(num_key_value_heads=8)),
    "qwen4_exp": dict(first=dict(text_config=INDEXER)),
    "qwen4_exp_text": dict(first=INDEXER),
    "reformer": dict(then=dict(is_decoder=True, axial_pos_embds=False, feed_forward_size=96, attention_head_size=16, local_attn_chunk_length=8, lsh_attn_chunk_length=8, num_buckets=2, hash_seed=0)),
    "recurrent_gemma": dict(then=dict(num_hidden_layers=3)),
    "roc_bert": dict(then=dict(shape_vocab_size=128, pronunciation_vocab_size=128)),
    "xmod": dict(first=dict(default_language="en_XX")),
    "zamba": dict(then=ZAMBA),
    "zamba2": dict(then=ZAMBA | dict(hybrid_layer_ids=[1, 3], mamba_headdim=16, n_mamba_heads=8)),
    "zaya": dict(then=dict(num_experts_per_tok=1)),
}


NOT_BUILT = {
    "gemma3n": "its vision tower needs the package timm; the text model of the same family, gemma3n_text, is proven",
    "gemma4_assistant": "drafts for another model and computes no keys and values of its own, so it cannot be trained on text alone",
    "gemma4_unified_assistant": "drafts for another model and computes no keys and values of its own, so it cannot be trained on text alone",
    "musicgen": "makes music from a text encoder's states; transformers cannot build its decoder from the configuration it registers for causal language models",
    "musicgen_melody": "makes music from a text encoder's states; transformers cannot build its decoder from the configuration it registers for causal language models",
}


def shrunk(plain):
    "A configuration's dict made small: sizes by name, and of the blocks one of each kind"
    depth = next((plain[n] for n in DEPTH if isinstance(plain.get(n), int)), 0)
    lists = {k: v for k, v in plain.items() if isinstance(v, list) and depth and len(v) == depth}
    kinds = list(zip(*(v for k, v in lists.items() if k in KINDS))) or [()] * depth
    kept = sorted(kinds.index(k) for k in set(kinds))
    kept = kept if len(kept) > 1 else [0, 1][:max(depth, 2)]
    out = {}
    for k, v in plain.items():
        if k == "per_layer_config" and v: out[k] = {kept.index(int(i)): shrunk(c) for i, c in v.items() if int(i) in kept}
        elif isinstance(v, dict): out[k] = shrunk(v) if "model_type" in v else v
        elif k in lists: out[k] = [min(x, SMALL["num_attention_heads"]) if isinstance(x, int) and x > 8 else x for x in (v[i] for i in kept)]
        elif k == "head_dim" and v == plain.get("qk_rope_head_dim"): out[k] = SMALL["qk_rope_head_dim"]
        elif k == "num_key_value_heads" and v and v == plain.get("num_attention_heads"): out[k] = SMALL["num_attention_heads"]
        elif k in DEPTH and isinstance(v, int): out[k] = len(kept)
        else: out[k] = SMALL[k] if k in SMALL and isinstance(v, int) and not isinstance(v, bool) and v > 0 else v
    return out


def changed(plain, changes):
    "A configuration's dict with changes, also inside its parts"
    return plain | {k: changed(plain[k], v) if isinstance(v, dict) and isinstance(plain.get(k), dict) else v for k, v in changes.items()}


def tiny_config(kind):
    "A valid small configuration of a model type"
    by_hand = BY_HAND.get(kind, {})
    plain = changed(shrunk(AutoConfig.for_model(kind, **by_hand.get("first", {})).to_dict()), by_hand.get("then", {}))
    return AutoConfig.for_model(kind, **{k: v for k, v in plain.items() if k not in ("model_type", "transformers_version", "architectures")} | dict(use_cache=False))


def tiny(kind):
    "A tiny model with random weights, on the processor in float32"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():  # as after some training: a weight that is zero hides what comes before it
        for p in dict.fromkeys(model.parameters()): p += 0.02 * torch.randn_like(p)
    return model


def logits(model, ids):
    "The next-token scores of a batch"
    return model(input_ids=ids).logits


def trained(model, ids, steps=2):
    "Train the adapters a few steps; {adapter parameter: its gradient at the last one}"
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        out = logits(model, ids)[:, :-1].flatten(0, 1).float()
        torch.nn.functional.cross_entropy(out, ids[:, 1:].flatten()).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
    return grads


def near(a, b):
    "The largest difference of two tensors, as a share of the first's largest value"
    return float((a - b).abs().max() / a.abs().max())


def prove(kind):
    "One row: what was found for a model type, and whether it holds on a tiny instance"
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    start, row = time.process_time(), dict(model_type=kind, built=False)
    try: base = tiny(kind)
    except Exception as e: return row | dict(reason=NOT_BUILT.get(kind, ""), error=f"{type(e).__name__}: {' '.join(str(e).split())[:200]}")
    row |= dict(built=True)
    try:
        shapes = of(base, kind)
        t = targets(shapes)
    except Exception as e: return row | dict(counted=False, step=False, merged=False, reason=f"{type(e).__name__}: {' '.join(str(e).split())[:200]}")
    row |= dict(parameters=shapes.total, counted=shapes.total == sum(p.numel() for p in base.parameters()), target_modules=list(t.target_modules), target_parameters=list(t.target_parameters), exclude=t.exclude, left_alone=[list(l) for l in t.left_alone],
                coverage=round(t.coverage, 4), peft_default=t.peft_default if isinstance(t.peft_default, str) else list(t.peft_default), peft_coverage=round(t.peft_coverage, 4))
    try: row |= _trial(base, shapes, t)
    except Exception as e: row |= dict(step=False, merged=False, reason=f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")
    return row | dict(cpu_seconds=round(time.process_time() - start, 2))


def _trial(base, shapes, t):
    ids = torch.randint(3, 100, (4, 24), generator=torch.Generator().manual_seed(1))
    before, fresh = {n: p.clone() for n, p in base.named_parameters()}, copy.deepcopy(base)
    recipe = make("stock", lora_r=4, lora_alpha=8, lora_dropout=0.0)
    torch.manual_seed(2)
    model = get_peft_model(base, LoraConfig(**lora_kwargs(recipe, t))).train()
    if shapes.model_type == "reformer": model.enable_input_require_grads()  # its reversible layers pass no gradient on if their input asks for none
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    grads = trained(model, ids)
    bad = sorted(n for n, g in grads.items() if g is None or not torch.isfinite(g).all() or not g.any())
    still = sorted(n for n, p in model.named_parameters() if n in start and torch.equal(p, start[n]))
    moved = [n for n, p in before.items() if not torch.equal(p, dict(fresh.named_parameters())[n])]
    clean = lambda n: n.removeprefix("base_model.model.").replace("base_layer.", "")
    moved += [clean(n) for n, p in model.named_parameters() if "lora_" not in n and clean(n) in before and not torch.equal(p, before[clean(n)])]
    row = dict(trainable=sum(p.numel() for p in start.values()), counted_trainable=sum(p.numel() for p in start.values()) == lora_parameters(shapes, 4, t.target_modules, t.target_parameters),
               no_gradient=bad, not_moved=still, base_moved=moved, step=not (bad or still or moved))
    model.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        plain, wanted = logits(fresh.eval(), ids), logits(model, ids)
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(fresh, folder).eval()
        row |= dict(change=near(plain, wanted), reloaded=near(wanted, logits(again, ids)), files=sorted(f.name for f in Path(folder).iterdir()))
        row |= dict(merge=near(wanted, logits(again.merge_and_unload().eval(), ids)))
    ok = row["change"] > 1e-4 and row["reloaded"] < 1e-6 and row["merge"] < min(1e-4, row["change"] / 10) and "adapter_model.safetensors" in row["files"]
    return row | dict(merged=ok)


def holds(row):
    "Does everything hold for a row"
    return row["built"] and row["counted"] and row.get("counted_trainable", False) and row["step"] and row["merged"]


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("types", nargs="*", default=TYPES, help="model types; all by default")
    p.add_argument("--out", help="write the rows to this JSON file")
    p.add_argument("--processes", type=int, default=os.cpu_count())
    args = p.parse_args()
    torch.set_num_threads(1)
    rows = []
    with Pool(args.processes) as pool:
        for row in pool.imap_unordered(prove, args.types, chunksize=8):
            rows.append(row)
            print("ok  " if holds(row) else "FAIL", {k: v for k, v in row.items() if not holds(row) or k in ("model_type", "cpu_seconds")}, flush=True)
    rows.sort(key=lambda r: r["model_type"])
    print(f"{sum(map(holds, rows))} of {len(rows)} hold, {sum(r['built'] for r in rows)} can be built")
    versions = {p: version(p) for p in ("transformers", "peft", "torch")}
    if args.out: Path(args.out).write_text(json.dumps(dict(question="Do the targets train, save, reload and merge on every causal language model of transformers?", date=str(date.today()), versions=versions, rows=rows), indent=1) + "\n")


if __name__ == "__main__": main()
