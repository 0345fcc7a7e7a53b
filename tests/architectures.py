"""Tiny causal language models with random weights, one per architecture that a retrofit is tested on."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 99
WIDTH = 32
HIDDEN = 64

_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES: dict[str, Any] = {
    **_TOKENS,
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_OPT = {key: value for key, value in _SIZES.items() if key != "intermediate_size"}

CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "gemma2": (Gemma2Config, {**_GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gpt-neox": (GPTNeoXConfig, _SIZES),
    "gpt2": (
        GPT2Config,
        {
            **_TOKENS,
            "vocab_size": VOCABULARY,
            "n_embd": WIDTH,
            "n_inner": HIDDEN,
            "n_head": 4,
            "n_positions": 128,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "llama": (LlamaConfig, _GROUPED),
    "mistral": (MistralConfig, _GROUPED),
    "opt": (OPTConfig, {**_OPT, "ffn_dim": HIDDEN, "word_embed_proj_dim": WIDTH, "dropout": 0.0}),
    "phi3": (Phi3Config, _GROUPED),
    "qwen2": (Qwen2Config, _GROUPED),
    "qwen3": (Qwen3Config, {**_GROUPED, "head_dim": 8}),
}
"""The nine architectures: FFNs of 32 → 64 → 32 channels, no dropout."""

ARCHITECTURES = tuple(CONFIGS)


def make_architecture(name: str, num_blocks: int = 3, **changes: Any) -> PreTrainedModel:
    """Return a model of one architecture with random weights, always the same, in evaluation mode."""
    torch.manual_seed(0)
    kind, sizes = CONFIGS[name]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        kind(**{**sizes, "num_hidden_layers": num_blocks, **changes})
    )
    return model.eval()
