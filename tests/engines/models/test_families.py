"""Every family at real sizes, as the hub's config.json files spell them: parameters, windows and ropes against
transformers. Nothing is allocated: both models are built on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engines import discover
from engines.checkpoint import Checkpoint, TensorInfo
from engines.formats import dense
from engines.layers.rotary import attention_factor, inverse_frequencies
from engines.models.decoder import Decoder
from engines.models.spec import RopeSpec
from engines.ops import OpSet
from engines.weights import Weights, check
from tests.parity.checkpoints import known

LLAMA_31 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
MISTRAL_01 = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN_25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
INTERNLM_3 = {
    "architectures": ["InternLM3ForCausalLM"],
    "model_type": "internlm3",
    "bias": False,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 10240,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "qkv_bias": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
    "rope_theta": 50000000,
    "vocab_size": 128512,
}
GEMMA_1 = {
    "architectures": ["GemmaForCausalLM"],
    "model_type": "gemma",
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
GEMMA_2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
GEMMA_3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
PHI_35 = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": [1.0 + 1.3 * i for i in range(48)],
        "short_factor": [1.0 + 0.04 * i for i in range(48)],
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
PHI_4_MINI = {
    **PHI_35,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}
WINDOWS = {
    "llama-3.1": (0, 0),
    "mistral-0.1": (32, 4096),
    "qwen-2.5": (0, 0),
    "qwen-3": (0, 0),
    "internlm-3": (0, 0),
    "gemma-1": (0, 0),
    "gemma-2": (13, 4096),
    "gemma-3": (22, 512),
    "phi-3.5": (0, 0),
    "phi-4-mini": (0, 0),
}
"""(layers with a window, its size); one beyond the model's own length is none"""
CONFIGS: dict[str, dict[str, Any]] = dict(
    zip(
        WINDOWS,
        (LLAMA_31, MISTRAL_01, QWEN_25, QWEN_3, INTERNLM_3, GEMMA_1, GEMMA_2, GEMMA_3, PHI_35, PHI_4_MINI),
        strict=True,
    )
)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_windows_and_ropes(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    if not known(config):
        pytest.skip(f"transformers {transformers.__version__} has no {config['model_type']}")
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        reference: Any = transformers.AutoModelForCausalLM.from_config(read)
    family = discover.family(config["architectures"][0])
    assert family is not None
    spec = family.spec(config)
    parameters = dict(reference.named_parameters())
    tensors = {n: TensorInfo("model.safetensors", "BF16", tuple(p.shape), 0, 0) for n, p in parameters.items()}
    checkpoint = Checkpoint(str(tmp_path), config, config["architectures"][0], {}, tensors)
    weights = Weights(checkpoint, family.CHECKPOINT, torch.bfloat16, torch.device("meta"))
    check(lambda w: Decoder(spec, "logits", 64, w, dense, OpSet()), weights)

    sliding = [window for window in spec.windows if window]
    assert (len(sliding), max(sliding, default=0)) == WINDOWS[name]
    if getattr(read, "layer_types", None):
        kinds = ["sliding_attention" if spec.window(i) else "full_attention" for i in range(spec.num_hidden_layers)]
        assert kinds == list(read.layer_types)
    rotary = type(reference.base_model.rotary_emb)(read)
    if spec.rope_local is not None:
        same_rope(spec.rope, spec.head_dim, rotary.full_attention_inv_freq, rotary.full_attention_attention_scaling)
        same_rope(spec.rope_local, spec.head_dim, rotary.sliding_attention_inv_freq, 1.0)
    else:
        same_rope(spec.rope, spec.head_dim, rotary.inv_freq, rotary.attention_scaling)


def same_rope(spec: RopeSpec, head_dim: int, inv_freq: torch.Tensor, scaling: float) -> None:
    found = inverse_frequencies(spec, spec.rotary_dim or head_dim)
    torch.testing.assert_close(found, inv_freq, rtol=0, atol=0)
    assert attention_factor(spec) == pytest.approx(scaling, rel=1e-12)


def test_families_import_no_torch() -> None:
    """Discovery and plans read families; a second of importing torch would be theirs too."""
    import subprocess
    import sys

    code = "import sys; from engines import discover; assert discover.families(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
