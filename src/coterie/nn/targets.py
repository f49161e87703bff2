"""The Linears to adapt where a config names none: PEFT's defaults for LoRA, by the type of model.

A copy of PEFT's table (a test compares them), because importing PEFT for it would cost more than a second.
"""

from __future__ import annotations

_MODELS = {
    ("query", "value"): "bert roberta xlm-roberta electra layoutlm",
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("q", "v"): "t5 mt5",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("q_proj", "v_proj"): "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 "
    "gemma3_text qwen2 qwen3",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
    ("key", "value", "receptance", "output"): "rwkv",
    ("query_key_value",): "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
    ("qkv_proj",): "codegen",
    ("Wqkv",): "mpt",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("c_proj", "c_attn"): "btlm",
}
DEFAULT_TARGETS = {model: names for names, models in _MODELS.items() for model in models.split()}
