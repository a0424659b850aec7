"""Every causal language model of transformers, made tiny by its configuration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_WIDTHS = "hidden_size d_model n_embd n_embed dim embed_dim embedding_size lru_width word_embed_proj_dim"
_HIDDEN = (
    "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim feed_forward_hidden_size d_ff d_inner "
    "ffn_hidden_size mamba_d_ssm"
)
_HEADS = "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"
_HEADS += " mamba_n_heads mamba_num_heads"
_LAYERS = "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers"
_LENGTHS = "max_position_embeddings n_positions n_ctx seq_length max_seq_len max_seq_length"
_EXPERTS = "num_experts num_local_experts n_routed_experts moe_num_experts"

SIZES: dict[str, Any] = {
    **dict.fromkeys(_WIDTHS.split(), 32),
    **dict.fromkeys(_HIDDEN.split(), 64),
    **dict.fromkeys(_HEADS.split(), 4),
    **dict.fromkeys(_LAYERS.split(), 2),
    **dict.fromkeys(_LENGTHS.split(), 64),
    **dict.fromkeys(_EXPERTS.split(), 4),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 32),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"], 2),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_top_k", "mamba_expand", "conv_kernel"], 2),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"], 1),
    **dict.fromkeys(
        ["head_dim", "global_head_dim", "kv_lora_rank", "q_lora_rank", "v_head_dim", "sliding_window"], 8
    ),
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size", "index_head_dim", "index_topk"], 8),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"], 8),
    **dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads", "index_n_heads"], 2),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"], 4),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim", "attention_window_size"], 16),
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], 100),
    "mamba_n_groups": 1,
    "n_groups": 1,
    "rotary_pct": 1.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "initializer_range": 0.2,
}
"""Sizes for configuration fields, by name."""

TOKENS = {"pad_token_id", "bos_token_id", "eos_token_id"}
"""Fields that models read though a configuration may lack them (transformers 5.0)."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "ctrl": {"dff": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"use_mamba_kernels": False},
    "kolibri1_1": {"head_dim": 16, "index_num_heads": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "roc_bert": {"pronunciation_vocab_size": 100, "shape_vocab_size": 100},
    "zaya": {"num_experts_per_tok": 1},
}

LARGE = "inkling2_text inkling2_loop_text inkling_text kimi_linear minimax_m3_vl_text deepseek_v4 cpmant"
INPUTS = "gemma4_assistant reformer xmod blt"
SIZED = "zamba zamba2 lfm2_moe qwen4_exp_text xlstm dots3_note_text longcat_flash cohere_compass_text"
NESTED = "dots3_note emu3 fuyu gemma3 gemma3n dbrx"
LEFT_OUT = {
    **dict.fromkeys(LARGE.split(), "has sizes of other names"),
    **dict.fromkeys(INPUTS.split(), "wants more than input_ids"),
    **dict.fromkeys(SIZED.split(), "has sizes that depend on each other"),
    **dict.fromkeys(NESTED.split(), "is made of models with configurations of their own"),
}


def families(known: Iterable[str] = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) -> list[str]:
    return [name for name in known if name not in LEFT_OUT and not _nested(name)]


def _nested(name: str) -> bool:
    """Whether a model contains other models; its text part is listed itself."""
    kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING[name]
    return bool(getattr(kind, "sub_configs", None))


def tiny(name: str, auto: Any = transformers.AutoModelForCausalLM, **options: Any) -> Any:
    """A model of the family in evaluation mode, without dropout and router jitter. `options` go to its
    configuration."""
    kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING[name]
    plain = kind()
    fields = plain.to_dict()
    known = fields.keys() | vars(plain).keys() | getattr(kind, "attribute_map", {}).keys() | TOKENS
    chosen = {key: value for key, value in SIZES.items() if key in known}
    if fields.get("layer_types"):
        chosen["layer_types"] = (list(dict.fromkeys(fields["layer_types"])) * 2)[:2]
    if "qk_rope_head_dim" in fields:  # multi-head latent attention: head_dim means something else
        chosen.pop("head_dim", None)
        chosen["num_key_value_heads"] = 4
    torch.manual_seed(0)
    model = auto.from_config(kind(**chosen | OVERRIDES.get(name, {}) | options))
    model.config.use_cache = False
    return model.float().eval()
