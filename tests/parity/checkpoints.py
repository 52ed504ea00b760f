"""Small random-weight checkpoints, and the transformers model that each one is compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

SCALE = 0.2
"""Standard deviation of random weights: large enough that the best token stands out from the second."""
TIED_SCALE = 0.02


def known(config: dict[str, Any]) -> bool:
    """Whether the installed transformers reads a config of this type."""
    return config["model_type"] in CONFIG_MAPPING_NAMES


def reference_class(config: dict[str, Any]) -> type:
    """transformers' class for a config; InternLM has Llama's layers and no class of its own."""
    name = config["architectures"][0]
    return getattr(transformers, "LlamaForCausalLM" if name.startswith("InternLM") else name)


def reference_config(config: dict[str, Any], folder: Path) -> Any:
    """As transformers reads it from a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    if config["model_type"] == "internlm2" or not known(config):
        # InternLM 3 is known from transformers 5.21 on.
        biases = {"attention_bias": config["bias"], "mlp_bias": config["model_type"] == "internlm3" and config["bias"]}
        config = {**config, "model_type": "llama", "architectures": None, **biases}
    (folder / "config.json").write_text(json.dumps(config))
    return transformers.AutoConfig.from_pretrained(folder)


def make_checkpoint(config: dict[str, Any], folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Write config.json and model.safetensors; returns transformers' model with the same weights.

    config.json is `config` as it is given: the spelling of checkpoints on the hub.
    """
    torch.manual_seed(seed)
    read = reference_config(config, folder)
    options = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
    model = reference_class(config)._from_config(read, **options).eval()
    tied = getattr(read.get_text_config(), "tie_word_embeddings", False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            # A tied table would make every token continue itself if it were as large as the layers' output.
            scale = TIED_SCALE if tied and parameter is model.get_input_embeddings().weight else SCALE
            parameter.copy_(centre + torch.randn_like(parameter) * scale)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * SCALE)
    model.to(dtype).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "saved_config.json").write_text(json.dumps(saved))
    (folder / "config.json").write_text(json.dumps(config))
    if config["model_type"] == "internlm2":
        _pack_internlm2(config, folder / "model.safetensors")
    return model


def _pack_internlm2(config: dict[str, Any], file: Path) -> None:
    """Rename a Llama checkpoint's tensors to InternLM 2's, and interleave q, k, v by KV head in wqkv.

    Source: modeling_internlm2.py of internlm/internlm2-7b: `b q (h gs d) -> b q h gs d`, gs = queries a KV head + 2,
    the last two of each group being key and value.
    """
    names = {
        "model.embed_tokens": "model.tok_embeddings", "self_attn.o_proj": "attention.wo", "mlp.gate_proj":
        "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "lm_head": "output",
    }  # fmt: skip
    tensors, heads = load_file(file), config["num_key_value_heads"]
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    packed = {}
    for name, tensor in tensors.items():
        if "q_proj" in name:
            parts = [tensors[name.replace("q_proj", which)] for which in ("q_proj", "k_proj", "v_proj")]
            grouped = [part.view(heads, -1, head_dim, *part.shape[1:]) for part in parts]
            wqkv = torch.cat(grouped, dim=1).reshape(-1, *tensor.shape[1:])
            packed[name.replace("self_attn.q_proj", "attention.wqkv")] = wqkv.contiguous()
        elif "k_proj" not in name and "v_proj" not in name:
            for asked, stored in names.items():
                name = name.replace(asked, stored)
            packed[name] = tensor
    save_file(packed, file)
